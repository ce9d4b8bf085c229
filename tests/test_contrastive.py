"""The contrastive loss against its formulas, written plainly in float64, and against its contract."""

import math

import pytest
import torch
from torch.nn import functional as F

from zoo.kernels.contrastive import contrastive_loss

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: a few hundred roundings of 1e-16


def vectors(rows: int, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def partners(pairs: int) -> torch.Tensor:
    """Rows q1..qB, d1..dB."""
    return (torch.arange(2 * pairs) + pairs) % (2 * pairs)


def note_loss(x: torch.Tensor, log_scale: float) -> torch.Tensor:
    """NoteLLM-2's call."""
    return contrastive_loss(x, scale=math.exp(log_scale), positive=partners(len(x) // 2), direction="rows", normalize=True)


def naive(logits: torch.Tensor, positive: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Dense cross entropy over the candidates ``allowed`` (M, N), for the rows that have a positive."""
    rows = positive >= 0
    return F.cross_entropy(logits.masked_fill(~allowed, -torch.inf)[rows], positive[rows])


def check_gradients(ours, plain, *inputs: torch.Tensor) -> None:
    """Value and every gradient of two functions of the same inputs."""
    a, b = [x.clone().requires_grad_() for x in inputs], [x.clone().requires_grad_() for x in inputs]
    torch.testing.assert_close(ours(*a), plain(*b), **EXACT)
    for mine, theirs in zip(torch.autograd.grad(ours(*a), a), torch.autograd.grad(plain(*b), b), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


class TestNoteLLM2:
    """Known values of the loss among 2B rows."""

    @pytest.mark.parametrize("pairs", [1, 2, 7])
    def test_equal_rows_give_log_of_the_number_of_others(self, pairs):
        assert note_loss(torch.ones(2 * pairs, 3, dtype=DOUBLE), 3.0).item() == pytest.approx(math.log(2 * pairs - 1), abs=1e-12)

    @pytest.mark.parametrize("rows, value", [(4, 3.784e-9), (256, 4.806e-7)])
    def test_orthonormal_pairs(self, rows, value):
        x = torch.eye(rows // 2, dtype=DOUBLE).repeat(2, 1)
        exact = math.log1p((rows - 2) * math.exp(-math.exp(3.0)))
        assert note_loss(x, 3.0).item() == pytest.approx(exact, rel=1e-10)
        assert note_loss(x, 3.0).item() == pytest.approx(value, rel=1e-3)

    @pytest.mark.parametrize("log_scale, value", [(0.0, 0.8680600177), (math.log(2), 0.7986569580), (3.0, 3.6762507545)])
    def test_planar_vectors(self, log_scale, value):
        angle = torch.deg2rad(torch.tensor([0.0, 90.0, 60.0, 150.0], dtype=DOUBLE))
        x = 3 * torch.stack([angle.cos(), angle.sin()], dim=1)
        assert note_loss(x, log_scale).item() == pytest.approx(value, abs=1e-9)

    def test_one_pair_has_no_negative_and_nothing_to_learn(self):
        x = vectors(2).requires_grad_()
        loss = note_loss(x, 3.0)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros_like(x))

    @pytest.mark.parametrize("direction", ["rows", "columns", "both"])
    def test_gradients_equal_dense_cross_entropy(self, direction):
        positive, allowed = partners(4), ~torch.eye(8, dtype=torch.bool)

        def plain(x, log_scale):
            e = F.normalize(x, dim=1)
            return naive(e @ e.T * log_scale.exp(), positive, allowed)

        def ours(x, log_scale):
            return contrastive_loss(x, scale=log_scale.exp(), positive=positive, direction=direction, normalize=True)

        check_gradients(ours, plain, vectors(8), torch.tensor(1.3, dtype=DOUBLE))

    def test_small_losses_keep_their_digits_in_float32(self):
        x = torch.eye(8).repeat(2, 1).requires_grad_()
        loss = note_loss(x, math.log(30.0))
        assert loss.item() == pytest.approx(math.log1p(14 * math.exp(-30.0)), rel=1e-5)  # 1.3e-12: dense float32 gives 0


class TestTwoSides:
    """CLIP, SigLIP and their parts."""

    def test_clip(self):
        def plain(x, y, log_scale):
            logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * log_scale.exp()
            target = torch.arange(len(x))
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        def ours(x, y, log_scale):
            return contrastive_loss(x, y, scale=log_scale.exp(), normalize=True)

        check_gradients(ours, plain, vectors(6), vectors(6, seed=1), torch.tensor(2.0, dtype=DOUBLE))

    def test_siglip(self):
        def plain(x, y, log_scale, bias):
            logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * log_scale.exp() + bias
            sign = 2 * torch.eye(len(x), dtype=DOUBLE) - 1
            return torch.log1p(torch.exp(-sign * logits)).sum() / len(x)

        inputs = vectors(6), vectors(6, seed=1), torch.tensor(2.0, dtype=DOUBLE), torch.tensor(-1.5, dtype=DOUBLE)
        for direction in ("rows", "columns", "both"):

            def ours(x, y, log_scale, bias, direction=direction):
                kind = {"form": "sigmoid", "direction": direction}
                return contrastive_loss(x, y, scale=log_scale.exp(), bias=bias, normalize=True, **kind)

            check_gradients(ours, plain, *inputs)

    def test_rows_and_columns(self):
        x, y, positive = vectors(3), vectors(5, seed=1), torch.tensor([4, 0, 2])
        logits = x @ y.T
        rows = contrastive_loss(x, y, scale=1.0, positive=positive, direction="rows")
        columns = contrastive_loss(x, y, scale=1.0, positive=positive, direction="columns")
        both = contrastive_loss(x, y, scale=1.0, positive=positive)
        torch.testing.assert_close(rows, F.cross_entropy(logits, positive), **EXACT)
        torch.testing.assert_close(columns, F.cross_entropy(logits.T[positive], torch.arange(3)), **EXACT)
        torch.testing.assert_close(both, (rows + columns) / 2, **EXACT)

    def test_two_rows_may_share_a_positive_without_pushing_each_other(self):
        x, y, positive = vectors(3), vectors(2, seed=1), torch.tensor([0, 0, 1])
        s = (x @ y.T).tolist()
        expected = [math.log1p(math.exp(s[2][0] - s[0][0])), math.log1p(math.exp(s[2][0] - s[1][0]))]
        expected.append(math.log1p(math.exp(s[0][1] - s[2][1]) + math.exp(s[1][1] - s[2][1])))
        each = contrastive_loss(x, y, scale=1.0, positive=positive, direction="columns", reduction="none")
        torch.testing.assert_close(each, torch.tensor(expected, dtype=DOUBLE), **EXACT)

    def test_bias_cancels_in_the_softmax_form(self):
        x, y = vectors(4), vectors(4, seed=1)
        torch.testing.assert_close(contrastive_loss(x, y, scale=2.0, bias=7.0), contrastive_loss(x, y, scale=2.0), **EXACT)

    def test_reductions_and_weights(self):
        x, y, weight = vectors(4), vectors(4, seed=1), torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=DOUBLE)
        plain = F.cross_entropy(x @ y.T, torch.arange(4), reduction="none")
        call = {"scale": 1.0, "weight": weight, "direction": "rows"}
        torch.testing.assert_close(contrastive_loss(x, y, **call, reduction="none"), weight * plain, **EXACT)
        torch.testing.assert_close(contrastive_loss(x, y, **call, reduction="sum"), (weight * plain).sum(), **EXACT)
        torch.testing.assert_close(contrastive_loss(x, y, **call), (weight * plain).sum() / 6, **EXACT)


class TestMasks:
    """What is no negative, and who is not there."""

    def test_equal_ids_are_no_negatives(self):
        ids, positive = torch.tensor([1, 2, 3, 4, 5, 1]), partners(3)  # rows 0 and 5 are one item
        allowed = (ids[:, None] != ids) | (positive[:, None] == torch.arange(6))

        def plain(x):
            return naive(x @ x.T, positive, allowed & ~torch.eye(6, dtype=torch.bool))

        check_gradients(lambda x: contrastive_loss(x, scale=1.0, positive=positive, ids_x=ids, direction="rows"), plain, vectors(6))

    def test_a_positive_of_equal_id_stays_the_positive(self):
        ids = torch.arange(4)
        x, y = vectors(4), vectors(4, seed=1)
        torch.testing.assert_close(contrastive_loss(x, y, scale=1.0, ids_x=ids, ids_y=ids), contrastive_loss(x, y, scale=1.0), **EXACT)

    @pytest.mark.parametrize("known", [[[0, 1]], [[1, 0]], [[0, 1], [1, 0], [0, 1]]])
    def test_known_pairs_are_no_negatives_in_either_order_on_one_side(self, known):
        positive, allowed = partners(3), ~torch.eye(6, dtype=torch.bool)
        allowed[0, 1] = allowed[1, 0] = False
        x = vectors(6)
        ours = contrastive_loss(x, scale=1.0, positive=positive, known=torch.tensor(known), direction="rows")
        torch.testing.assert_close(ours, naive(x @ x.T, positive, allowed), **EXACT)

    def test_known_pairs_of_two_sides_are_row_of_x_and_row_of_y(self):
        x, y, allowed = vectors(4), vectors(4, seed=1), torch.ones(4, 4, dtype=torch.bool)
        allowed[0, 2] = False
        target = torch.arange(4)
        plain = (naive(x @ y.T, target, allowed) + naive(y @ x.T, target, allowed.T)) / 2
        torch.testing.assert_close(contrastive_loss(x, y, scale=1.0, known=torch.tensor([[0, 2]])), plain, **EXACT)

    def test_no_known_pairs(self):
        x, none = vectors(6), torch.zeros(0, 2, dtype=torch.int64)
        with_none = contrastive_loss(x, scale=1.0, positive=partners(3), known=none)
        torch.testing.assert_close(with_none, contrastive_loss(x, scale=1.0, positive=partners(3)), rtol=0, atol=0)

    @pytest.mark.parametrize("form", ["softmax", "sigmoid"])
    def test_absent_rows_equal_rows_left_out_and_get_no_gradient(self, form):
        x, there = vectors(8), torch.tensor([1, 1, 0, 1, 1, 0, 0, 1]).bool()  # pairs (0,4) and (3,7) remain; 1 lost its partner
        x[~there] = torch.nan
        x.requires_grad_()
        loss = contrastive_loss(x, scale=2.0, positive=partners(4), present=there, normalize=True, form=form)
        (gradient,) = torch.autograd.grad(loss, x)
        left = x.detach()[there].requires_grad_()  # rows 0, 1, 3, 4, 7
        plain = contrastive_loss(left, scale=2.0, positive=torch.tensor([3, -1, 4, 0, 2]), normalize=True, form=form)
        torch.testing.assert_close(loss, plain, **EXACT)
        torch.testing.assert_close(gradient[there], torch.autograd.grad(plain, left)[0], **EXACT)
        assert torch.equal(gradient[~there], torch.zeros(3, 5, dtype=DOUBLE))

    def test_absent_rows_of_two_sides(self):
        x, y = vectors(4), vectors(4, seed=1)
        here, there = torch.tensor([1, 0, 1, 1]).bool(), torch.tensor([1, 1, 1, 0]).bool()
        logits, rows = (x @ y.T)[here][:, there], torch.tensor([0, 2, -1])  # x 0, 2, 3 against y 0, 1, 2
        plain = (naive(logits, rows, torch.ones(3, 3).bool()) + naive(logits.T, torch.tensor([0, -1, 1]), torch.ones(3, 3).bool())) / 2
        x[1], y[3] = torch.inf, torch.nan
        torch.testing.assert_close(contrastive_loss(x, y, scale=1.0, present=(here, there)), plain, **EXACT)
        only_x = contrastive_loss(x, y.nan_to_num(), scale=1.0, present=here)
        torch.testing.assert_close(only_x, contrastive_loss(x, y.nan_to_num(), scale=1.0, present=(here, torch.ones(4).bool())))

    def test_a_row_without_a_positive_is_not_counted_but_still_a_negative(self):
        x, y, positive = vectors(3), vectors(3, seed=1), torch.tensor([0, -1, 2])
        logits = x @ y.T
        plain = (F.cross_entropy(logits[[0, 2]], torch.tensor([0, 2])) + F.cross_entropy(logits.T[[0, 2]], torch.tensor([0, 2]))) / 2
        torch.testing.assert_close(contrastive_loss(x, y, scale=1.0, positive=positive), plain, **EXACT)

    @pytest.mark.parametrize("form", ["softmax", "sigmoid"])
    def test_no_positive_in_the_whole_batch_gives_zero_and_zero_gradients(self, form):
        x, y, scale, bias = vectors(3), vectors(3, seed=1), torch.tensor(2.0), torch.tensor(-1.0)
        inputs = [t.requires_grad_() for t in (x, y, scale, bias)]
        call = {"positive": torch.full((3,), -1), "form": form, "scale": scale, "bias": bias}
        loss = contrastive_loss(x, y, **call, validate=False)
        assert loss.item() == 0
        assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(torch.autograd.grad(loss, inputs), inputs, strict=True))
        with pytest.raises(ValueError, match="no row of the batch has a positive that is there"):
            contrastive_loss(x, y, **call)

    def test_rows_without_any_negative_have_clean_gradients(self):
        x, scale = vectors(4).requires_grad_(), torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)
        ids = torch.tensor([1, 2, 1, 1])  # row 1 is the only negative there is, and row 3's positive
        each = contrastive_loss(x, scale=scale, positive=partners(2), ids_x=ids, reduction="none", direction="rows")
        alone = contrastive_loss(x, scale=scale, positive=partners(2), ids_x=torch.ones(4).long(), reduction="none")
        assert each.gt(0).tolist() == [True, True, True, False]
        assert torch.equal(alone, torch.zeros(4, dtype=DOUBLE))
        for loss in (each.sum(), alone.sum()):
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, scale), retain_graph=True))

    def test_empty_batch(self):
        nothing = torch.zeros(0, 4)
        assert contrastive_loss(nothing, nothing, scale=1.0, validate=False).item() == 0


class TestPrecision:
    def test_half_precision_inputs_are_accumulated_in_float32(self):
        x, y = vectors(32, 64).bfloat16(), vectors(32, 64, seed=1).bfloat16()
        exact = contrastive_loss(x.double(), y.double(), scale=20.0, normalize=True)
        ours = contrastive_loss(x.requires_grad_(), y, scale=20.0, normalize=True)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(ours, x)
        assert gradient.dtype == torch.bfloat16
        assert bool(gradient.isfinite().all())

    @pytest.mark.parametrize("impl", ["reference", "chunked"])
    @pytest.mark.parametrize("soft", [False, True])
    def test_autocast_does_not_round_the_logits(self, impl, soft):
        x, y = vectors(32, 64).float().requires_grad_(), vectors(32, 64, seed=1).float()
        call = {"scale": 50.0, "normalize": True, "impl": impl, "soft": (y, x) if soft else None, "soft_weight": 0.5}
        outside = contrastive_loss(x, y, **call)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = contrastive_loss(x, y, **call)
            (gradient,) = torch.autograd.grad(inside, x)
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)
        if impl == "chunked":  # the reference's derivatives are torch's own, which autocast rounds if they are taken inside
            torch.testing.assert_close(gradient, torch.autograd.grad(outside, x)[0], rtol=0, atol=0)

    @pytest.mark.parametrize("scale", [1e-4, 1e4])
    def test_extreme_scales_stay_finite(self, scale):
        x, y = vectors(8).float().requires_grad_(), vectors(8, seed=1).float()
        loss = contrastive_loss(x, y, scale=scale, normalize=True)
        assert bool(loss.isfinite())
        assert bool(torch.autograd.grad(loss, x)[0].isfinite().all())

    @pytest.mark.parametrize("form", ["softmax", "sigmoid"])
    def test_compiles_into_one_graph(self, form):
        there, known = torch.tensor([1, 1, 0, 1, 1, 1]).bool(), torch.tensor([[0, 1]])

        def loss(x, log_scale):
            masks = {"positive": partners(3), "ids_x": torch.arange(6), "present": there, "known": known}
            return contrastive_loss(x, scale=log_scale.exp(), bias=-1.0, **masks, form=form, normalize=True, validate=False)

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        check_gradients(compiled, loss, vectors(6), torch.tensor(1.0, dtype=DOUBLE))
