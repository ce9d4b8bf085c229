"""The contrastive loss's Triton kernels where losses go wrong, interpreted; tests/test_contrastive_triton.py runs this by itself."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import _contrastive_triton as in_triton
from zoo.kernels.contrastive import contrastive_loss

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on logarithms of 0 and exponentials of 300 that a mask drops


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(in_triton, "_macro_block", lambda D, itemsize: (64, 64))
    monkeypatch.setattr(in_triton, "_forward_block", lambda tile, fields: (64, 64))


def outcome(impl: str, x: Tensor, y: Tensor | None, scale: float, **given) -> list[Tensor]:
    """The loss and the gradients of x, y and scale; of the reference in float64."""
    dtype = torch.float64 if impl == "reference" else x.dtype
    leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in (x, y, torch.tensor(scale))]
    loss = contrastive_loss(leaves[0], leaves[1], scale=leaves[2], impl=impl, validate=False, **given)
    gradients = torch.autograd.grad(loss.sum(), [t for t in leaves if t is not None], materialize_grads=True)
    return [t.detach().double() for t in (loss, *gradients)]


def check(x: Tensor, y: Tensor | None, scale: float, tolerance: float = 1e-5, **given) -> list[Tensor]:
    """Ours against the reference, within a share of each result's largest entry."""
    found = outcome("triton", x, y, scale, **given)
    for ours, truth in zip(found, outcome("reference", x, y, scale, **given), strict=True):
        size = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance * max(1.0, size))
    return found


def units(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("M, D", [(1, 1), (1, 1000), (2, 1), (2, 4096), (7, 4096), (13, 1000), (31, 33), (65, 7), (129, 1), (3, 0)])
def test_any_size(M, D):
    x, y = units(2, M, D) if D else torch.zeros(2, M, 0)
    check(x, y, 2.0)


@pytest.mark.parametrize("M, N", [(1, 9), (3, 4), (40, 41), (5, 300)])
def test_more_candidates_than_rows(M, N):
    check(units(M, 6), units(N, 6), 3.0, direction="rows")


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("one_side", [False, True])
def test_extreme_scales(scale, one_side):
    x, y = units(2, 40, 8)
    given = {"positive": (torch.arange(40) + 20) % 40} if one_side else {}
    # a logit of 1e4 is known to 1e-3, and a share of the softmax then to 1e-3 of itself; the gradients are of the size of the scale
    check(x, None if one_side else y, scale, tolerance=2e-3 if scale > 1 else 1e-5, **given)


@pytest.mark.parametrize("one_side", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_identical_rows(scale, one_side):
    x = units(1, 8).repeat(40, 1)
    given = {"positive": (torch.arange(40) + 20) % 40} if one_side else {}
    loss, *_ = check(x, None if one_side else x.clone(), scale, **given)
    # the same logit everywhere: log of the number of candidates
    torch.testing.assert_close(loss, torch.tensor(40.0 - one_side).double().log(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_all_rows_absent(what):
    found = outcome("triton", units(20, 8), units(20, 8), 5.0, present=torch.zeros(20, dtype=torch.bool))
    assert all(float(t.abs().sum()) == 0 for t in (found[:1] if what == "loss" else found[1:]))


@pytest.mark.parametrize("direction", ["rows", "columns", "both"])
def test_all_negatives_masked(direction):
    same = torch.zeros(20, dtype=torch.int64)  # the same item everywhere: only positives are left, so nothing is to be told apart
    found = check(units(20, 8), units(20, 8), 5.0, ids_x=same, ids_y=same, direction=direction)
    assert all(float(t.abs().sum()) == 0 for t in found)


def test_rows_without_a_positive():
    positive = torch.arange(40)
    positive[::3] = -1
    found = check(units(40, 8), units(40, 8), 5.0, positive=positive, direction="rows", reduction="none")
    assert bool((found[0][::3] == 0).all())
    assert bool((found[0][1::3] > 0).all())


def test_no_row_has_a_positive():
    found = outcome("triton", units(20, 8), units(20, 8), 5.0, positive=torch.full((20,), -1), direction="rows")
    assert all(float(t.abs().sum()) == 0 for t in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_and_never_hangs(bad):
    x, y = units(40, 8), units(40, 8)
    x[7, 3] = bad
    loss, dx, *_ = outcome("triton", x, y, 5.0)
    assert not loss.isfinite()
    assert not dx[7].isfinite().all()
    one_side = outcome("triton", x, None, 5.0, positive=(torch.arange(40) + 20) % 40)
    assert not one_side[0].isfinite()


def test_what_is_not_finite_in_an_absent_row_has_no_influence():
    x, y, present = units(40, 8), units(40, 8), torch.ones(40, dtype=torch.bool)
    x[7], y[7], present[7] = float("nan"), float("inf"), False
    for t in outcome("triton", x, y, 5.0, present=(present, present)):
        assert t.isfinite().all()


def test_strided_and_transposed():
    x, y = units(8, 40).T, units(40, 16)[:, ::2]
    check(x, y, 5.0)
    flat = units(1, 8).expand(40, 8)
    check(flat, y, 5.0)


def test_converged_pairs_of_two_sides():
    x = torch.eye(32)
    loss, dx, dy, dscale = outcome("triton", x, x.clone(), 30.0)
    truth = outcome("reference", x, x.clone(), 30.0)
    assert 0 < truth[0] < 1e-10
    for ours, exact in zip((loss, dx, dy, dscale), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=float(exact.abs().max()) * 1e-6)
