"""The Triton kernels of the contrastive loss, interpreted on a CPU; tests/test_contrastive_triton.py runs this in a process of its own.

Tiles and macro-blocks are made tiny, so that a few dozen rows meet every kind of tile: at an edge, on the diagonal, with and without
a positive. The truth is the reference in float64.
"""

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import _configurations as configurations
from zoo.kernels import _contrastive_triton as in_triton
from zoo.kernels._configurations import Configuration, Tiles
from zoo.kernels.contrastive import contrastive_loss

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on logarithms of 0 and exponentials of 300 that a mask drops
POINTERS = Tiles(Configuration(8, 16, 16, 4, 1, split=2, group=2), Configuration(16, 8, 16, 4, 1, split=2, group=2))
DESCRIPTORS = Tiles(Configuration(16, 8, 16, 4, 1, group=2, tma=True), Configuration(8, 16, 16, 4, 1, group=2, tma=True))
FLAG = in_triton.forward_tile.arg_names.index("flag")
LOADS = {"pointers": POINTERS, "descriptors": DESCRIPTORS}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    assert in_triton.INTERPRETED
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(configurations, "INTERPRETED", POINTERS)
    monkeypatch.setattr(in_triton, "_macro_block", lambda D, itemsize: (32, 48))
    monkeypatch.setattr(in_triton, "_forward_block", lambda tile, fields: (48, 32))


def outcome(impl: str, x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None = None, negatives: Tensor | None = None, **given):
    """The loss and its gradients, in float64; the reference computes in it too."""

    def widened(t):
        if isinstance(t, tuple):
            return tuple(map(widened, t))
        is_number = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().double() if is_number and impl == "reference" else t.detach() if is_number else t

    tensors = [None if t is None else widened(t).clone().requires_grad_() for t in (x, y, scale, bias, negatives)]
    x, y, scale, bias, negatives = tensors
    call = {name: widened(value) for name, value in given.items()}
    loss = contrastive_loss(x, y, scale=scale, bias=bias, negatives=negatives, impl=impl, validate=False, **call)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    gradients = torch.autograd.grad((loss * upstream).sum(), [t for t in tensors if t is not None], materialize_grads=True)
    return [loss.detach().double(), *(g.double() for g in gradients)]


def check(tolerance: float, x, y, scale, **given) -> None:
    for ours, truth in zip(outcome("triton", x, y, scale, **given), outcome("reference", x, y, scale, **given), strict=True):
        assert ours.isfinite().all()
        size = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance * size * max(1.0, float(scale) / 10))


def some_call(seed: int) -> dict:
    """Arguments drawn from all that can be combined."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    one_side, form = draw.random() < 0.4, draw.choice(["softmax", "softmax", "sigmoid"])
    M, K, D = draw.choice([2, 7, 23, 50]), draw.choice([0, 0, 20]), draw.choice([3, 4, 33])
    N = M if one_side else M + draw.choice([0, 0, 3, 10])
    call = {"x": numbers(M, D), "y": None if one_side else numbers(N, D), "direction": draw.choice(["rows", "columns", "both"])}
    if draw.random() < 0.35:
        call["groups"] = integers(3, M) if one_side else (integers(3, M), integers(3, N))
        call["direction"] = call["direction"] if M == N else "rows"
    elif one_side:
        call["positive"] = (torch.arange(M) + 1 + integers(M - 1, M)) % M
        call["positive"][0] = -1
    elif draw.random() < 0.5:
        call["positive"] = torch.randperm(N, generator=generator)[:M]
    if draw.random() < 0.4:
        call |= {"ids_x": integers(6, M)} | ({} if one_side else {"ids_y": integers(6, N)})
        call |= {"ids_negatives": integers(6, K)} if K else {}
    if draw.random() < 0.4:
        here, there = (torch.rand(n, generator=generator) > 0.3 for n in (M, N))
        call["present"] = here if one_side or draw.random() < 0.5 else (here, there)
    if draw.random() < 0.3:
        call["known"] = torch.stack([integers(M, 3), integers(N, 3)], dim=1)
    if form == "softmax" and draw.random() < 0.3:
        call["soft"] = (numbers(M, 3), *([] if one_side else [numbers(N, 3)]), *([numbers(K, 3)] if K else []))
        call["soft_weight"] = 0.4
    call |= {"negatives": numbers(K, D)} if K else {}
    call |= {"weight": torch.rand(M, generator=generator)} if draw.random() < 0.3 else {}
    call |= {"bias": torch.tensor(-1.0)} if draw.random() < 0.4 else {}
    call |= {"smoothing": 0.2} if draw.random() < 0.3 else {}
    scale = torch.tensor(draw.choice([0.5, 3.0, 30.0, 300.0]))
    return call | {"scale": scale, "form": form, "normalize": True, "reduction": draw.choice(["none", "sum", "mean"])}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("seed", range(14))
def test_every_combination_equals_the_reference(seed, load, monkeypatch):
    monkeypatch.setattr(configurations, "INTERPRETED", LOADS[load])
    check(2e-5, **some_call(1000 * (load == "pointers") + seed))  # float32: sums of some hundred roundings of 6e-8


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])  # a rounding of operand and of gradient each
@pytest.mark.parametrize("one_side", [False, True])
def test_half_precision(dtype, tolerance, one_side):
    x, y = F.normalize(torch.randn(2, 40, 20), dim=2).to(dtype)
    given = {"positive": (torch.arange(40) + 20) % 40} if one_side else {}
    check(tolerance, x, None if one_side else y, torch.tensor(10.0), **given)


def test_errs_no_more_than_the_dense_form_in_bfloat16():
    x, y = F.normalize(torch.randn(2, 48, 32), dim=2).bfloat16()
    scale = torch.tensor(50.0)

    def dense(x, y, scale):  # as under autocast: the logits are rounded
        tensors = [t.clone().requires_grad_() for t in (x, y, scale)]
        logits, target = (tensors[0] @ tensors[1].T * tensors[2].to(x.dtype)).float(), torch.arange(len(x))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, tensors))]

    every = zip(outcome("triton", x, y, scale), dense(x, y, scale), outcome("reference", x, y, scale), strict=True)
    for ours, plain, truth in every:  # the interpreter cuts bfloat16 off where a device rounds it: 2 ** -7 of what is written
        assert ((ours - truth).abs() <= (plain - truth).abs() + 2**-7 * truth.abs().max()).all()


def test_small_upstream_gradients_do_not_vanish_in_float16():
    x, y = F.normalize(torch.randn(2, 40, 20), dim=2).half().requires_grad_().unbind()
    (ours,) = torch.autograd.grad(contrastive_loss(x, y, scale=20.0, impl="triton") / 1024, x)
    x, y = x.detach().double().requires_grad_(), y.detach().double()
    (truth,) = torch.autograd.grad(contrastive_loss(x, y, scale=20.0, impl="reference") / 1024, x)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-3 * float(truth.abs().max()))  # float16: 5e-4 a rounding


def test_converged_pairs_keep_their_digits():
    x = torch.eye(16).repeat(2, 1)
    loss, dx, dscale = outcome("triton", x, None, torch.tensor(30.0), positive=(torch.arange(32) + 16) % 32)
    truth = outcome("reference", x, None, torch.tensor(30.0), positive=(torch.arange(32) + 16) % 32)
    assert 0 < truth[0] < 1e-10
    for ours, exact in zip((loss, dx, dscale), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=float(exact.abs().max()) * 1e-6)


def test_sums_lost_to_underflow_are_repaired(monkeypatch):
    x, y = F.normalize(torch.randn(2, 40, 64), dim=2)
    y[5] = x[3]  # no partners: a logit of 100 beside others of 40 at most
    launched = []
    real = in_triton.forward_tile.__class__.__getitem__

    def counted(kernel, grid):
        def launch(*arguments, **switches):
            real(kernel, grid)(*arguments, **switches)
            if "REPAIR" in switches:  # the forward kernel
                launched.append((switches["REPAIR"], int(arguments[FLAG].sum())))

        return launch

    monkeypatch.setattr(in_triton.forward_tile.__class__, "__getitem__", counted)
    check(2e-5, x, y, torch.tensor(100.0))
    assert any(flagged for repair, flagged in launched if repair), "no tile was flagged: the test shows nothing"


def test_a_nan_poisons_its_row_alone_and_nothing_hangs():
    x, y = torch.randn(2, 40, 8)
    x[7] = torch.nan
    loss = contrastive_loss(x, y, scale=1.0, direction="rows", reduction="none", impl="triton")
    assert loss.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("load", LOADS)
def test_what_lies_around_the_operands_has_no_influence(load, monkeypatch):
    monkeypatch.setattr(configurations, "INTERPRETED", LOADS[load])
    around = torch.full((2, 90, 48), torch.nan)
    around[:, 20:60, 16:32] = F.normalize(torch.randn(2, 40, 16), dim=2)
    inside = around[:, 20:60, 16:32]
    apart = inside.clone()
    for ours, plain in zip(outcome("triton", *inside, torch.tensor(5.0)), outcome("triton", *apart, torch.tensor(5.0)), strict=True):
        assert torch.equal(ours, plain)


def test_offsets_beyond_31_bits():
    far = torch.empty(3, 2**30 + 16, dtype=torch.float16)[:, :16]  # 4 GiB from first to last, most of it never touched
    near = torch.randn(3, 16).half()
    far.copy_(near)
    y = torch.randn(3, 16).half()
    for ours, plain in zip(outcome_of_rows(far, y), outcome_of_rows(near, y), strict=True):
        assert torch.equal(ours, plain)


def outcome_of_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.clone().requires_grad_()  # x itself: a clone of it would lie close together
    loss = contrastive_loss(x, y, scale=1.0, impl="triton")
    return loss.detach(), torch.autograd.grad(loss, y)[0]


@pytest.mark.parametrize("one_side", [False, True])
def test_twice_the_same_to_the_last_bit(one_side):
    x, y = torch.randn(2, 50, 9)
    given = {"positive": torch.arange(50).roll(1)} if one_side else {}
    first, second = (outcome("triton", x, None if one_side else y, torch.tensor(2.0), **given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_any_row():
    assert contrastive_loss(torch.zeros(0, 4), torch.zeros(0, 4), scale=1.0, impl="triton", validate=False).item() == 0


@pytest.mark.parametrize("asked", ["x", "y", "scale"])
def test_gradient_of_one_thing_alone(asked):
    tensors = {"x": torch.randn(20, 8), "y": torch.randn(20, 8), "scale": torch.tensor(2.0)}
    tensors[asked].requires_grad_()
    (ours,), (truth,) = (torch.autograd.grad(contrastive_loss(**tensors, impl=impl), tensors[asked]) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph():
    def loss(x, y, log_scale):
        return contrastive_loss(x, y, scale=log_scale.exp(), normalize=True, impl="triton", validate=False)

    tensors = [torch.randn(20, 8).requires_grad_(), torch.randn(20, 8).requires_grad_(), torch.tensor(1.0, requires_grad=True)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_autocast_rounds_the_operands_and_not_the_logits():
    x, y = F.normalize(torch.randn(2, 40, 16), dim=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(x, y, scale=50.0, impl="triton")
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, contrastive_loss(x.bfloat16(), y.bfloat16(), scale=50.0, impl="triton"), rtol=0, atol=0)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"impl='triton' computes in float32, float16 or bfloat16, not in float64"):
        contrastive_loss(torch.zeros(2, 2).double(), torch.zeros(2, 2).double(), scale=1.0, impl="triton")
