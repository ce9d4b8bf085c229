"""The contrastive loss in half precision and under change: its error beside the dense form's, its derivatives, its symmetries."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import _operator
from zoo.kernels.contrastive import contrastive_loss

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: a few hundred roundings of 1e-16
FORMS = ("softmax", "sigmoid")
INPUTS = ("value", "x", "y", "scale", "bias")


def vectors(rows: int, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def partners(pairs: int) -> Tensor:
    return (torch.arange(2 * pairs) + pairs) % (2 * pairs)


def dense(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, form: str) -> Tensor:
    """As open_clip writes it."""
    logits = scale * x @ y.T
    if form == "softmax":
        target = torch.arange(len(x))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return -F.logsigmoid((2 * torch.eye(len(x), dtype=logits.dtype) - 1) * (logits + bias)).sum() / len(x)


def ours(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, form: str) -> Tensor:
    return contrastive_loss(x, y, scale=scale, bias=bias, form=form, impl="chunked")


def outcome(loss, *inputs: Tensor, form: str = "softmax") -> dict[str, Tensor]:
    """Value and all gradients; 0 where an input has no part."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = loss(*leaves, form=form)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]
    return dict(zip(INPUTS, [value.detach(), *filled], strict=True))


def aligned(dtype: torch.dtype, noise: float) -> tuple[Tensor, ...]:
    """Unit rows, each nearest to its partner, rounded to ``dtype``; scale and bias in float32 at least, as parameters are."""
    x = F.normalize(vectors(96, 48), dim=1)
    y = F.normalize(x + noise * vectors(96, 48, seed=1), dim=1)
    of_scale = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), y.to(dtype), torch.tensor(50.0, dtype=of_scale), torch.tensor(-10.0, dtype=of_scale)


class TestErrorTriangle:
    """Truth in float64, the dense form in the inputs' type, ours: we err by no more than the dense form, elementwise."""

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])  # from converged to not at all
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_no_element_errs_more(self, dtype, noise, form):
        inputs = aligned(dtype, noise)
        truth = outcome(dense_exact, *(t.double() for t in inputs), form=form)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            plain = outcome(dense, *inputs, form=form)
            found = outcome(ours, *inputs, form=form)
        for name in INPUTS:
            error, others = ((t[name].double() - truth[name]).abs() for t in (found, plain))
            size = truth[name].abs()
            # Ours is the truth up to the sums' float32, a logit of 50 known to 50 * 2^-24 * sqrt(D), and one rounding to the result's type.
            tolerance = torch.finfo(found[name].dtype).eps / 2 * size + 4e-5 * size + 1e-6 * size.max() + tiny(found[name].dtype)
            excess = (error - others - tolerance).max().item()
            assert excess <= 0, f"{name} errs by {excess:g} more"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_costs_one_rounding_of_the_result(self, dtype):
        inputs = aligned(dtype, 0.1)
        truth, found = outcome(dense_exact, *(t.double() for t in inputs)), outcome(ours, *inputs)
        assert [t.dtype for t in found.values()] == [torch.float32, dtype, dtype, torch.float32, torch.float32]
        for name in INPUTS:
            size = truth[name].abs()
            allowed = (torch.finfo(found[name].dtype).eps / 2 + 4e-5) * size + 1e-6 * size.max() + tiny(found[name].dtype)
            assert bool(((found[name].double() - truth[name]).abs() <= allowed).all()), name

    @pytest.mark.parametrize(
        "of_x, of_y, result",
        [
            (torch.float64, torch.float64, torch.float64),
            (torch.float32, torch.float64, torch.float64),
            (torch.bfloat16, torch.float32, torch.float32),
            (torch.bfloat16, torch.float16, torch.float32),
        ],
    )
    def test_types_are_promoted_and_gradients_come_in_the_inputs_own(self, of_x, of_y, result):
        x, y = vectors(6).to(of_x).requires_grad_(), vectors(6, seed=1).to(of_y).requires_grad_()
        loss = contrastive_loss(x, y, scale=2.0, impl="chunked")
        loss.backward()
        assert (loss.dtype, x.grad.dtype, y.grad.dtype) == (result, of_x, of_y)
        truth = contrastive_loss(x.double(), y.double(), scale=2.0, impl="reference")
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


def dense_exact(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, form: str) -> Tensor:
    """The truth: in float64 and without the cancellation of dense cross entropy."""
    return contrastive_loss(x, y, scale=scale, bias=bias, form=form, impl="reference")


def tiny(dtype: torch.dtype) -> float:
    """Half the distance of the smallest numbers of a type."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


class TestDerivatives:
    @pytest.mark.parametrize("impl", ["reference", "chunked"])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"form": "sigmoid", "smoothing": 0.1},
            {"normalize": True, "direction": "columns", "reduction": "none"},
            {"ids_x": torch.tensor([0, 1, 0, 2]), "ids_y": torch.tensor([0, 1, 0, 2]), "smoothing": 0.2},
            {"groups": torch.tensor([0, 1, 0, 1]), "weight": torch.tensor([1.0, 2.0, 0.5, 0.0])},
            {"groups": torch.tensor([0, 1, 0, 1]), "form": "sigmoid", "reduction": "sum"},
        ],
        ids=["plain", "sigmoid", "columns", "ids", "groups", "sigmoid groups"],
    )
    def test_gradients_equal_finite_differences(self, impl, settings):
        def loss(x, y, negatives, scale, bias):
            return contrastive_loss(x, y, negatives=negatives, scale=scale, bias=bias, impl=impl, **settings)

        inputs = (
            vectors(4, 3),
            vectors(4, 3, seed=1),
            vectors(2, 3, seed=2),
            torch.tensor(1.5, dtype=DOUBLE),
            torch.tensor(-1.0, dtype=DOUBLE),
        )
        if settings.get("direction") == "columns":
            inputs = (*inputs[:2], None, *inputs[3:])
        inputs = [t if t is None else t.requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(loss, inputs)
        if impl == "reference":
            assert torch.autograd.gradgradcheck(loss, inputs, atol=1e-4)

    @pytest.mark.parametrize("impl", ["reference", "chunked"])
    def test_one_side(self, impl):
        def loss(x, scale):
            return contrastive_loss(x, scale=scale, positive=partners(3), normalize=True, impl=impl)

        assert torch.autograd.gradcheck(loss, (vectors(6, 3).requires_grad_(), torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)))

    def test_soft_targets_are_constants(self):
        teacher = vectors(4, 3, seed=2).requires_grad_(), vectors(4, 3, seed=3).requires_grad_()
        x = vectors(4, 3).requires_grad_()
        contrastive_loss(x, vectors(4, 3, seed=1), scale=2.0, soft=teacher, impl="chunked").backward()
        assert [t.grad for t in teacher] == [None, None]
        assert x.grad is not None


class TestProperties:
    @pytest.mark.parametrize("form", FORMS)
    def test_permuted_pairs_permute_the_gradients(self, form):
        inputs = vectors(20), vectors(20, seed=1), torch.tensor(2.0, dtype=DOUBLE), torch.tensor(-1.0, dtype=DOUBLE)
        order = torch.randperm(20)
        one, other = outcome(ours, *inputs, form=form), outcome(ours, inputs[0][order], inputs[1][order], *inputs[2:], form=form)
        for name in INPUTS:
            torch.testing.assert_close(other[name], one[name][order] if name in "xy" else one[name], **EXACT)

    @pytest.mark.parametrize("form", FORMS)
    def test_swapped_sides_swap_the_gradients(self, form):
        x, y, *scalars = vectors(20), vectors(20, seed=1), torch.tensor(2.0, dtype=DOUBLE), torch.tensor(-1.0, dtype=DOUBLE)
        one, other = outcome(ours, x, y, *scalars, form=form), outcome(ours, y, x, *scalars, form=form)
        for name, swapped in zip(INPUTS, ("value", "y", "x", "scale", "bias"), strict=True):
            torch.testing.assert_close(other[swapped], one[name], **EXACT)
        rows = contrastive_loss(x, y, scale=2.0, direction="rows", impl="chunked")
        torch.testing.assert_close(contrastive_loss(y, x, scale=2.0, direction="columns", impl="chunked"), rows, **EXACT)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (64, 5), (5, 64)])
    def test_the_cut_into_blocks_changes_nothing(self, monkeypatch, form, rows, columns):
        class Cut(_operator.Chunked):
            def __init__(self, *arguments) -> None:
                super().__init__(*arguments)
                self.rows, self.columns = rows, columns

        def one_side(x, y, scale, bias, form):
            return contrastive_loss(torch.cat([x, y]), scale=scale, bias=bias, positive=partners(20), form=form, impl="chunked")

        inputs = vectors(20), vectors(20, seed=1), torch.tensor(2.0, dtype=DOUBLE), torch.tensor(-1.0, dtype=DOUBLE)
        whole = [outcome(loss, *inputs, form=form) for loss in (ours, one_side)]
        monkeypatch.setattr(_operator, "Chunked", Cut)
        for loss, expected in zip((ours, one_side), whole, strict=True):
            found = outcome(loss, *inputs, form=form)
            for name in INPUTS:
                torch.testing.assert_close(found[name], expected[name], **EXACT)

    def test_the_same_bits_each_time(self):
        inputs = [t.float() for t in (vectors(700, 9), vectors(700, 9, seed=1), torch.tensor(3.0), torch.tensor(-1.0))]
        for form in FORMS:
            one, other = outcome(ours, *inputs, form=form), outcome(ours, *inputs, form=form)
            assert all(torch.equal(one[name], other[name]) for name in INPUTS)

    @pytest.mark.parametrize("form", FORMS)
    def test_embeddings_and_scale_agree_about_the_scale(self, form):
        """Scaling x by a factor is scaling the scale: sum of dX * X equals scale * dscale."""
        x, y, scale, bias = vectors(20), vectors(20, seed=1), torch.tensor(2.5, dtype=DOUBLE), torch.tensor(-1.0, dtype=DOUBLE)
        found = outcome(ours, x, y, scale, bias, form=form)
        for side, gradient in ((x, found["x"]), (y, found["y"])):
            torch.testing.assert_close((side * gradient).sum(), scale * found["scale"], **EXACT)
