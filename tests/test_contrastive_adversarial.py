"""The contrastive loss where losses go wrong: odd sizes, extreme values, masks that leave nothing, NaN, half precision, odd memory."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import _operator
from zoo.kernels.contrastive import contrastive_loss

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: a few hundred roundings of 1e-16
IMPLS = ("reference", "chunked")


def vectors(rows: int, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def clip(x: Tensor, y: Tensor, scale: Tensor, direction: str = "both", reduction: str = "mean") -> Tensor:
    """Dense cross entropy of two sides of equal length, or, for rows alone, of any."""
    logits, target = (x @ y.T).to(scale.dtype) * scale, torch.arange(len(x))
    rows = F.cross_entropy(logits, target, reduction=reduction)
    if direction == "rows":
        return rows
    columns = F.cross_entropy(logits.T[: len(x)], target, reduction=reduction)
    return columns if direction == "columns" else (rows + columns) / 2


def outcome(loss, *inputs: Tensor, **settings) -> tuple[Tensor, ...]:
    """Value and all gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = loss(*leaves, **settings)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def ours(x: Tensor, y: Tensor, scale: Tensor, **settings) -> Tensor:
    return contrastive_loss(x, y, scale=scale, **settings)


def check_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or EXACT))


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=DOUBLE)


@pytest.fixture
def tiny_blocks(monkeypatch):
    class Tiny(_operator.Chunked):
        columns = 7

        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.rows = 4

    monkeypatch.setattr(_operator, "Chunked", Tiny)


class TestSizes:
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(
        "M, D", [(1, 1), (1, 1000), (2, 1), (2, 4096), (3, 0), (7, 4096), (13, 1000), (31, 33), (127, 7), (129, 1), (513, 5)]
    )
    def test_any_size(self, M, D, impl):
        inputs = vectors(M, D) / max(D, 1) ** 0.5, vectors(M, D, seed=1), double(2.0)
        check_close(outcome(ours, *inputs, impl=impl), outcome(clip, *inputs))

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("M, N", [(1, 9), (3, 4), (130, 131), (5, 8200)])
    def test_more_candidates_than_rows(self, M, N, impl):
        inputs = vectors(M), vectors(N, seed=1), double(2.0)
        call = {"direction": "rows"}
        check_close(outcome(ours, *inputs, impl=impl, **call), outcome(clip, *inputs, **call))

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("form", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("positive", [None, torch.zeros(0, dtype=torch.int64)])
    def test_an_empty_batch_gives_zero_and_empty_gradients(self, impl, form, positive):
        x, y, scale = vectors(0).requires_grad_(), vectors(0).requires_grad_(), double(2.0).requires_grad_()
        loss = contrastive_loss(x, y, scale=scale, positive=positive, form=form, impl=impl, validate=False)
        gradients = torch.autograd.grad(loss, (x, y, scale))
        assert [loss.item(), gradients[2].item()] == [0, 0]
        assert [g.shape for g in gradients[:2]] == [(0, 5), (0, 5)]
        with pytest.raises(ValueError, match="nothing to learn from"):
            contrastive_loss(x, y, scale=scale, impl=impl)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_an_empty_side(self, impl):
        nothing = torch.zeros(0, dtype=torch.int64)
        assert contrastive_loss(vectors(0), positive=nothing, scale=1.0, impl=impl, validate=False).item() == 0
        assert contrastive_loss(vectors(0), vectors(3), scale=1.0, direction="rows", impl=impl, validate=False).item() == 0
        call = {"groups": (torch.arange(3), nothing), "direction": "rows", "reduction": "none", "validate": False}
        assert torch.equal(contrastive_loss(vectors(3), vectors(0), scale=1.0, impl=impl, **call), torch.zeros(3, dtype=DOUBLE))

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("form, value", [("softmax", 0.0), ("sigmoid", math.log1p(math.exp(-2.0)))])
    def test_one_pair_has_no_negative(self, impl, form, value):
        x = torch.ones(1, 1, dtype=DOUBLE)
        found, *gradients = outcome(ours, x, x, double(2.0), form=form, impl=impl)
        assert found.item() == pytest.approx(value, abs=1e-15)
        assert all((g != 0).any() == (form == "sigmoid") for g in gradients)


class TestValues:
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4, -3.0])
    @pytest.mark.parametrize("blocks", ["large", "tiny"])
    def test_any_scale(self, scale, impl, blocks, request):
        if blocks == "tiny":
            request.getfixturevalue("tiny_blocks")
        inputs = vectors(9), vectors(9, seed=1), double(scale)
        # At scale 1e4 logits are 1e5: rounding moves a probability by 1e-11, and its gradient is 1e4 times that.
        check_close(outcome(ours, *inputs, impl=impl), outcome(clip, *inputs), rtol=1e-10, atol=max(1e-12, 1e-11 * abs(scale)))

    @pytest.mark.parametrize("scale", [1e-4, 1e4])
    def test_extreme_scales_in_float32(self, scale):
        inputs = F.normalize(vectors(9), dim=1), F.normalize(vectors(9, seed=1), dim=1), double(scale)
        found = outcome(ours, *(t.float() for t in inputs))
        # A logit of 1e4 is known to 1e4 * 2^-24 = 6e-4 in float32, and so is a probability, times the scale in a gradient.
        exact = [t.float() for t in outcome(clip, *inputs)]
        check_close(found, exact, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_identical_rows(self, impl):
        x = vectors(1).expand(40, 5)
        loss, dx, dy, dscale = outcome(ours, x, x, double(10.0), impl=impl)
        assert loss.item() == pytest.approx(math.log(40), rel=1e-14)
        check_close((dx, dy, dscale), (torch.zeros_like(dx), torch.zeros_like(dy), torch.zeros_like(dscale)))

    @pytest.mark.parametrize("dtype, accuracy", [(torch.float32, 2e-5), (DOUBLE, 1e-13)])  # logits of 30 are known to 30 * epsilon
    @pytest.mark.parametrize("blocks", ["large", "tiny"])
    def test_converged_pairs_keep_their_digits(self, dtype, accuracy, blocks, request):
        """Loss 1e-12: dense cross entropy in float32 has none."""
        if blocks == "tiny":
            request.getfixturevalue("tiny_blocks")
        x, scale = torch.eye(8, dtype=dtype), torch.tensor(math.log(7e12), dtype=dtype)
        s = scale.double().item()
        off = math.exp(-s) / (1 + 7 * math.exp(-s))  # the probability of one negative
        truth_dx = 2 * s / 8 * off * (1 - 8 * torch.eye(8, dtype=DOUBLE)) / 2  # each direction half, through x as row and as column
        loss, dx, dy, dscale = outcome(ours, x, x, scale)
        assert loss.item() == pytest.approx(math.log1p(7 * math.exp(-s)), rel=accuracy)
        assert dscale.item() == pytest.approx(-7 * off, rel=accuracy)
        for gradient in (dx, dy):
            torch.testing.assert_close(gradient.double(), truth_dx, rtol=accuracy, atol=0)
        assert dtype == DOUBLE or clip(x, x, scale).item() == 0

    def test_rows_far_below_their_block_are_done_again(self, monkeypatch):
        """One huge row would underflow all others, were the whole block shifted by its maximum."""
        again = []
        at_once = _operator.Chunked.forward.__globals__["_push_at_once"]
        monkeypatch.setitem(_operator.Chunked.forward.__globals__, "_push_at_once", lambda *a: again.append(at_once(*a)) or again[-1])
        x, y = vectors(16, 64).float(), vectors(16, 64, seed=1).float()
        x[3] *= 1e3
        found = outcome(ours, x, y, torch.tensor(1.0))
        check_close(found, [t.float() for t in outcome(clip, x.double(), y.double(), double(1.0))], rtol=1e-4, atol=1e-4)
        assert again == [False]

    def test_orthogonal_rows_at_a_large_scale_do_not_underflow(self):
        x, y = torch.eye(6)[:3], torch.eye(6)[3:]  # every logit is 0, the largest possible 100: exp(0 - 100) would be lost
        assert contrastive_loss(x, y, scale=100.0).item() == pytest.approx(math.log(3), rel=1e-6)


class TestMasksThatLeaveNothing:
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("form", ["softmax", "sigmoid"])
    def test_a_row_and_a_column_without_negatives(self, impl, form):
        known = torch.tensor([[2, j] for j in range(6)] + [[i, 4] for i in range(6)])
        x, y, call = vectors(6), vectors(6, seed=1), {"known": known, "form": form, "reduction": "none", "impl": impl}
        row = contrastive_loss(x, y, scale=2.0, direction="rows", **call)[2]
        column = contrastive_loss(x, y, scale=2.0, direction="columns", **call)[4]
        alone = [0.0, 0.0] if form == "softmax" else [F.softplus(-2 * x[i] @ y[i]).item() for i in (2, 4)]
        assert [row.item(), column.item()] == pytest.approx(alone, abs=1e-15)
        assert all(g.isfinite().all() for g in outcome(ours, x, y, double(2.0), **call))
        none = outcome(ours, x, y, double(2.0), **call | {"known": torch.cartesian_prod(torch.arange(6), torch.arange(6))})
        assert form == "sigmoid" or not any(t.any() for t in none)

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("form", ["softmax", "sigmoid"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"positive": torch.full((4,), -1)},
            {"present": torch.zeros(4).bool()},
            {"groups": (torch.arange(4), torch.arange(4) + 4)},
            {"weight": torch.zeros(4, dtype=DOUBLE)},
        ],
        ids=["no positive", "all absent", "no common group", "no weight"],
    )
    def test_a_batch_that_teaches_nothing(self, impl, form, settings):
        x, y, bias = vectors(4), vectors(4, seed=1), double(-1.0)
        if "present" in settings:
            x[:] = torch.nan
        call = {"form": form, "impl": impl, **settings}
        found = outcome(lambda x, y, s, b: contrastive_loss(x, y, scale=s, bias=b, validate=False, **call), x, y, double(2.0), bias)
        assert all(torch.equal(t, torch.zeros_like(t)) for t in found)
        if "weight" not in settings:
            with pytest.raises(ValueError, match="no row of the batch has a positive that is there"):
                contrastive_loss(x, y, scale=1.0, **call)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_rows_alone_in_their_group_do_not_count_but_push(self, impl):
        x, groups = vectors(5), torch.tensor([0, 1, 0, 2, 3])
        logits = (x @ x.T).masked_fill(torch.eye(5).bool(), -torch.inf)
        plain = F.cross_entropy(logits[[0, 2]], torch.tensor([2, 0]))
        torch.testing.assert_close(contrastive_loss(x, scale=1.0, groups=groups, impl=impl), plain, **EXACT)


class TestPoison:
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("direction", ["rows", "columns", "both"])
    @pytest.mark.parametrize("blocks", ["large", "tiny"])
    def test_a_nan_reaches_what_it_reaches_in_the_dense_form(self, impl, direction, blocks, request):
        if blocks == "tiny":
            request.getfixturevalue("tiny_blocks")
        x, y = vectors(9), vectors(9, seed=1)
        x[2, 1] = torch.nan
        call = {"direction": direction, "reduction": "none"}
        found, dense = outcome(ours, x, y, double(2.0), impl=impl, **call), outcome(clip, x, y, double(2.0), **call)
        for mine, theirs in zip(found, dense, strict=True):
            torch.testing.assert_close(mine, theirs, **EXACT, equal_nan=True)
        assert bool(found[0].isnan().any())

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_reaches_the_same_in_the_sigmoid_form(self, impl, value):
        def plain(x, y, scale):
            return -F.logsigmoid((2 * torch.eye(9, dtype=DOUBLE) - 1) * (scale * x @ y.T)).sum() / 9

        x, y = vectors(9), vectors(9, seed=1)
        x[2, 1] = value
        found, dense = outcome(ours, x, y, double(2.0), form="sigmoid", impl=impl), outcome(plain, x, y, double(2.0))
        for mine, theirs in zip(found, dense, strict=True):  # inf in one order of the sums is nan in another
            finite = theirs.isfinite()
            assert torch.equal(mine.isfinite(), finite)
            torch.testing.assert_close(mine[finite], theirs[finite], **EXACT)
        assert not found[0].isfinite()

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("value", [torch.inf, -torch.inf])
    def test_an_infinity_is_not_hidden(self, impl, value):
        x, y = vectors(9), vectors(9, seed=1)
        x[2, 1] = value
        loss, dx, dy, dscale = outcome(ours, x, y, double(2.0), impl=impl)
        assert not loss.isfinite()
        assert not dx[2].isfinite().any()
        assert not dy.isfinite().all(dim=1).any()
        assert not dscale.isfinite()

    @pytest.mark.parametrize("impl", IMPLS)
    def test_nothing_beside_the_inputs_is_read(self, impl):
        x, y = vectors(9), vectors(9, seed=1)
        framed = [F.pad(t, (3, 4, 2, 6), value=torch.nan)[2:-6, 3:-4] for t in (x, y)]
        check_close(outcome(ours, *framed, double(2.0), impl=impl), outcome(ours, x, y, double(2.0), impl=impl))


class TestMemory:
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("normalize", [False, True])
    def test_any_layout(self, impl, normalize):
        x, y, scale = vectors(9, 4), vectors(9, 4, seed=1), double(2.0)
        call = {"impl": impl, "normalize": normalize}
        expected = outcome(ours, x, y, scale, **call)
        layouts = {
            "transposed": lambda t: t.T.contiguous().T,
            "strided": lambda t: t.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)[::2, ::3],
            "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(9, 4),
            "from the end": lambda t: t.flip(0)[torch.arange(8, -1, -1)],
        }
        for layout in layouts.values():
            leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), scale.clone().requires_grad_()]
            loss = contrastive_loss(layout(leaves[0]), layout(leaves[1]), scale=leaves[2], **call)
            check_close((loss.detach(), *torch.autograd.grad(loss, leaves)), expected)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_one_tensor_on_both_sides(self, impl):
        x = vectors(9)
        together = outcome(lambda x, s: contrastive_loss(x, x, scale=s, impl=impl), x, double(2.0))
        loss, dx, dy, dscale = outcome(ours, x, x, double(2.0), impl=impl)
        check_close(together, (loss, dx + dy, dscale))

    def test_inputs_are_left_as_they_were(self):
        x, y, ids = vectors(9), vectors(9, seed=1), torch.arange(9) % 4
        copies = [t.clone() for t in (x, y, ids)]
        outcome(ours, x.requires_grad_(), y, double(2.0), ids_x=ids, ids_y=ids, impl="chunked")
        assert all(torch.equal(a, b) for a, b in zip((x, y, ids), copies, strict=True))
