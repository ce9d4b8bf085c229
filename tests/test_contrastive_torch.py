"""The contrastive loss inside torch: registered, compiled, checkpointed, under autocast; and what it never allocates."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from zoo.kernels import _operator
from zoo.kernels._pairs import FIELDS, Pairs
from zoo.kernels.contrastive import ContrastiveLoss, contrastive_loss

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: a few hundred roundings of 1e-16
IDS = torch.tensor([0, 1, 2, 0, 3, 4])


def vectors(rows: int, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def partners(pairs: int) -> Tensor:
    return (torch.arange(2 * pairs) + pairs) % (2 * pairs)


def outcome(loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Value and all gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = loss(*leaves)
    value.backward()  # as the reentrant checkpoint wants it, which refuses torch.autograd.grad
    return value.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


def check_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


CALLS = {
    "two sides": lambda x, y, s, b: contrastive_loss(x, y, scale=s, bias=b, normalize=True, validate=False),
    "sigmoid": lambda x, y, s, b: contrastive_loss(x, y, scale=s, bias=b, form="sigmoid", validate=False),
    "one side": lambda x, y, s, b: contrastive_loss(
        torch.cat([x, y]), scale=s, bias=b, positive=torch.arange(2 * len(x)).roll(len(x)), validate=False
    ),
    "queue and teacher": lambda x, y, s, b: contrastive_loss(
        x, y, scale=s, bias=b, negatives=y + 1, soft=(y, x, x), soft_weight=0.4, smoothing=0.1, direction="rows", validate=False
    ),
    "groups": lambda x, y, s, b: contrastive_loss(
        x, y, scale=s, bias=b, groups=torch.arange(len(x)) % 3, present=torch.arange(len(x)) != 2, validate=False
    ),
}
INPUTS = vectors(6), vectors(6, seed=1), torch.tensor(2.0, dtype=DOUBLE), torch.tensor(-1.0, dtype=DOUBLE)


class TestRegistration:
    """torch.library.opcheck: schema, fake tensors, autograd and dynamic shapes."""

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at that of its own copies
    @pytest.mark.parametrize("form, bias", [("softmax", None), ("sigmoid", torch.tensor(-1.0, dtype=DOUBLE))])
    @pytest.mark.parametrize("sides", [1, 2])
    @pytest.mark.parametrize("wanted", [("x", "y", "scale"), ("y",), ("scale",), ()])
    def test_forward(self, form, bias, sides, wanted):
        torch.library.opcheck(_operator._forward, arguments(form, bias, sides, wanted))

    @pytest.mark.parametrize("sides", [1, 2])
    @pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, False), (False, False, True, False)])
    def test_backward(self, sides, needs):
        given = arguments("sigmoid", torch.tensor(-1.0, dtype=DOUBLE), sides, ())
        known = list(_operator._forward(*given))
        upstream = [torch.ones_like(k) for k in known]
        torch.library.opcheck(_operator._backward, (known, upstream, [n and (sides == 2 or i != 1) for i, n in enumerate(needs)], *given))


def arguments(form: str, bias: Tensor | None, sides: int, wanted: tuple[str, ...]) -> tuple:
    """Of the registered operation, flat."""
    x, y, scale = vectors(6).T.contiguous().T, vectors(6, seed=1), torch.tensor(2.0, dtype=DOUBLE)
    for name, value in {"x": x, "y": y, "scale": scale}.items():
        value.requires_grad_(name in wanted)
    positive = partners(3) if sides == 1 else torch.arange(6)
    pairs = Pairs(positive=positive, positive_y=positive if sides == 1 else None, ids_x=IDS, ids_y=IDS)
    tensors = [None, None, *pairs[:-1]]
    return x, y if sides == 2 else None, scale, bias, tensors, [True, True], form, "chunked", "ieee", "", "gather"


class TestCompile:
    @pytest.mark.parametrize("call", CALLS)
    def test_one_graph(self, call):
        loss = CALLS[call]
        check_close(outcome(torch.compile(loss, fullgraph=True, backend="aot_eager"), *INPUTS), outcome(loss, *INPUTS))

    def test_one_graph_serves_all_sizes(self):
        loss = CALLS["two sides"]
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for size in (6, 9, 17, 40):
            with torch.compiler.set_stance("fail_on_recompile") if size > 6 else nullcontext():
                inputs = vectors(size), vectors(size, seed=1), *INPUTS[2:]
                check_close(outcome(compiled, *inputs), outcome(loss, *inputs))

    @pytest.mark.slow
    @pytest.mark.parametrize("call", CALLS)
    def test_inductor(self, call):
        loss = CALLS[call]
        compiled = torch.compile(loss, fullgraph=True, dynamic=True)
        for size in (6, 9):
            inputs = vectors(size), vectors(size, seed=1), *INPUTS[2:]
            check_close(outcome(compiled, *inputs), outcome(loss, *inputs))


class TestAutograd:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("call", CALLS)
    def test_activation_checkpointing(self, call, reentrant):
        loss = CALLS[call]
        check_close(outcome(lambda *inputs: checkpoint(loss, *inputs, use_reentrant=reentrant), *INPUTS), outcome(loss, *INPUTS))

    def test_second_derivatives_are_refused_with_what_to_write(self):
        x, y = vectors(6).requires_grad_(), vectors(6, seed=1)
        (first,) = torch.autograd.grad(contrastive_loss(x, y, scale=2.0, impl="chunked"), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"contrastive_loss has first derivatives only.*write impl='reference'"):
            torch.autograd.grad(first.sum(), x)

    def test_second_derivatives_of_the_reference(self):
        x, y = vectors(6).requires_grad_(), vectors(6, seed=1)
        seconds = []
        for loss in (
            contrastive_loss(x, y, scale=2.0, direction="rows", impl="reference"),
            F.cross_entropy(2 * x @ y.T, torch.arange(6)),
        ):
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), x))
        check_close(*seconds)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch itself, when it first meets forward mode
    @pytest.mark.parametrize("place", range(3))
    def test_forward_mode_is_refused_but_by_the_reference(self, place):
        """The registered operation would give a tangent of 0."""

        def tangent(impl: str) -> Tensor:
            def of(value: Tensor) -> Tensor:
                x, y, scale = (value if i == place else t for i, t in enumerate(INPUTS[:3]))
                return contrastive_loss(x, y, scale=scale, impl=impl, validate=False)

            return torch.func.jvp(of, (INPUTS[place],), (torch.ones_like(INPUTS[place]),))[1]

        with pytest.raises(NotImplementedError, match=r"contrastive_loss has no forward-mode derivatives .*write impl='reference'"):
            tangent("chunked")
        _, *gradients = outcome(lambda x, y, s: contrastive_loss(x, y, scale=s, impl="chunked"), *INPUTS[:3])
        torch.testing.assert_close(tangent("reference"), gradients[place].sum(), **EXACT)

    def test_gradients_accumulate_over_two_losses(self):
        x, y, scale = (t.clone().requires_grad_() for t in INPUTS[:3])
        for _ in range(2):
            contrastive_loss(x, y, scale=scale, impl="chunked").backward()
        once = outcome(lambda x, y, s: contrastive_loss(x, y, scale=s, impl="chunked"), *INPUTS[:3])
        check_close((x.grad, y.grad, scale.grad), tuple(2 * g for g in once[1:]))

    def test_without_gradients_nothing_is_kept(self):
        x, y, *_ = (t.clone().requires_grad_() for t in INPUTS)
        with torch.no_grad():
            assert not contrastive_loss(x, y, scale=2.0).requires_grad
        with torch.inference_mode():
            assert contrastive_loss(x, y, scale=2.0).item() == contrastive_loss(x, y, scale=2.0).item()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_mixed_precision_training(self, dtype):
        """Embeddings come out of autocast in half precision; loss and parameters' gradients are float32."""
        towers = nn.ModuleList([nn.Linear(12, 8), nn.Linear(7, 8)])
        loss = ContrastiveLoss()
        of_x, of_y = torch.randn(20, 12), torch.randn(20, 7)

        def step() -> list[Tensor]:
            value = loss(towers[0](of_x), towers[1](of_y))
            return [value, *torch.autograd.grad(value, [*towers.parameters(), *loss.parameters()])]

        exact = step()
        with torch.autocast("cpu", dtype=dtype):
            assert towers[0](of_x).dtype == dtype
            mixed = step()
        for found, expected in zip(mixed, exact, strict=True):
            assert found.dtype == torch.float32
            # The towers' outputs are rounded to 8 (bfloat16) or 11 bits; scale 14 makes 14 roundings of a logit.
            torch.testing.assert_close(found, expected, rtol=0.05, atol=14 * torch.finfo(dtype).eps * expected.abs().max().item())


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that is made under it."""

    def __init__(self, made: list[int]) -> None:
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.made += [t.numel() for t in tree_iter(result) if isinstance(t, Tensor)]
        return result


class TestMemory:
    @pytest.fixture
    def made(self, monkeypatch):
        """Sizes of all tensors made, in and beside the operation, whose inside a mode outside does not see."""
        sizes: list[int] = []

        def watched(function):
            def call(*arguments):
                with Largest(sizes):
                    return function(*arguments)

            return call

        for name in ("forward", "forward_one_side", "backward", "backward_one_side"):
            monkeypatch.setattr(_operator.blocks, name, watched(getattr(_operator.blocks, name)))
        return sizes

    @pytest.mark.parametrize(
        "N, settings",
        [
            (4096, {}),
            (2048, {"form": "sigmoid"}),
            (2048, {"positive": partners(1024), "direction": "rows"}),
            (2048, {"ids_x": torch.arange(2048) // 2, "ids_y": torch.arange(2048) // 2}),
            (2048, {"present": torch.arange(2048) % 3 > 0, "known": torch.tensor([[0, 1]]), "smoothing": 0.1}),
            (2048, {"groups": torch.arange(2048) % 100, "soft": (torch.ones(2048, 2), torch.ones(2048, 2))}),
        ],
        ids=["plain", "sigmoid", "one side", "ids", "present and known", "groups and teacher"],
    )
    def test_never_as_much_as_all_logits(self, made, N, settings):
        x, y = torch.randn(N, 4, requires_grad=True), torch.randn(N, 4, requires_grad=True)
        sides = (x,) if "positive" in settings else (x, y)
        with Largest(made):
            contrastive_loss(*sides, scale=2.0, **settings, impl="chunked").backward()
        assert 100 * N < max(made) <= 512 * N  # a block was seen, and it is no more than 512 rows

    def test_the_dense_form_would_be_seen(self, made):
        x = torch.randn(2048, 4)
        with Largest(made):
            contrastive_loss(x, x, scale=2.0, impl="reference")
        assert max(made) == 2048**2

    def test_what_is_kept_for_the_way_back_is_linear(self):
        kept = []
        x, y = torch.randn(600, 4, requires_grad=True), torch.randn(600, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            contrastive_loss(x, y, scale=torch.tensor(2.0, requires_grad=True), impl="chunked")
        assert max(kept) <= FIELDS * 600
