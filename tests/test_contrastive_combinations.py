"""Arguments of the contrastive loss in generated combinations: block by block against dense, in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.kernels import _operator
from zoo.kernels.contrastive import contrastive_loss

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # scale 300 makes logits and gradients of a few thousand, known to 1e-12
RUNS = settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])


class Call(NamedTuple):
    inputs: dict[str, Tensor | None]  # what may have a gradient
    wanted: frozenset[str]  # what asks for one
    settings: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _tiny_blocks():
    """So small that a dozen rows make many blocks, with a remainder on both sides."""

    class Tiny(_operator.Chunked):
        columns = 5

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.rows = 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_operator, "Chunked", Tiny)
        yield


@st.composite
def calls(draw, one_side: bool) -> Call:
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def often(values: list[Any]) -> Any:
        return draw(st.sampled_from(values))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DOUBLE, generator=random)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=random)

    def coins(n: int) -> Tensor:
        return torch.rand(n, generator=random) > 0.3

    direction, form = often(["rows", "columns", "both"]), often(["softmax", "sigmoid"])
    M, D, K = draw(st.integers(0, 12)), often([1, 4]), often([None, 0, 4])
    grouped, spread = draw(st.booleans()), often([None, "soft", "smoothing", "soft and smoothing"])
    N = M if one_side or (grouped and direction != "rows") else M + often([0, 1, 4])
    inputs = {
        "x": normal(M, D),
        "y": None if one_side else normal(N, D),
        "negatives": None if K is None else normal(K, D),
        "scale": torch.tensor(often([0.0, 0.5, 3.0, 300.0]), dtype=DOUBLE),
        "bias": often([None, torch.tensor(-1.0, dtype=DOUBLE)]),
    }
    chosen = {
        "direction": direction,
        "form": form,
        "normalize": draw(st.booleans()),
        "reduction": often(["none", "sum", "mean"]),
        "validate": False,
    }
    if grouped:
        chosen["groups"] = integers(3, M) if one_side or (M == N and draw(st.booleans())) else (integers(3, M), integers(3, N))
    elif one_side:
        chosen["positive"] = (torch.arange(M) + 1 + integers(max(M - 1, 1), M)) % M if M > 1 else torch.full((M,), -1)
    elif draw(st.booleans()):
        distinct = spread is not None or M == 0 or draw(st.booleans())  # spread targets need a row for each column
        chosen["positive"] = torch.randperm(N, generator=random)[:M] if distinct else integers(N, M)
    if "positive" in chosen and draw(st.booleans()):
        chosen["positive"] = chosen["positive"].masked_fill(~coins(M), -1)
    if draw(st.booleans()):
        chosen |= {"ids_x": integers(6, M)} if one_side else {"ids_x": integers(6, M), "ids_y": integers(6, N)}
        chosen |= {"ids_negatives": integers(6, K)} if K is not None and draw(st.booleans()) else {}
    if draw(st.booleans()):
        chosen["present"] = coins(M) if one_side or draw(st.booleans()) else (coins(M), coins(N))
    if draw(st.booleans()):
        chosen["known"] = torch.stack([integers(M, 3), integers(N, 3)], dim=1) if M and N else torch.zeros(0, 2, dtype=torch.int64)
    if draw(st.booleans()):
        chosen["weight"] = torch.rand(M, dtype=DOUBLE, generator=random)
    if spread is not None and "smoothing" in spread:
        chosen["smoothing"] = 0.2
    if spread is not None and "soft" in spread and form == "softmax":
        sides = [M] + ([] if one_side else [N]) + ([] if K is None else [K])
        chosen |= {"soft": tuple(normal(rows, 3) for rows in sides), "soft_weight": often([0.3, 0.8])}
    given_inputs = [name for name, value in inputs.items() if value is not None]
    return Call(inputs, draw(st.frozensets(st.sampled_from(given_inputs))), chosen)


def outcome(call: Call, impl: str) -> dict[str, Tensor | None]:
    """The loss, and the gradients that are asked for."""
    inputs = {name: None if value is None else value.clone().requires_grad_(name in call.wanted) for name, value in call.inputs.items()}
    loss = contrastive_loss(**inputs, **call.settings, impl=impl)
    found = {"loss": loss.detach()}
    if loss.requires_grad:  # not so where negatives alone ask for a gradient and the columns' direction has none for them
        leaves = {name: inputs[name] for name in sorted(call.wanted)}
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=DOUBLE).view(loss.shape)
        found |= zip(leaves, torch.autograd.grad((loss * upstream).sum(), list(leaves.values()), allow_unused=True), strict=True)
    return found


def check(call: Call) -> None:
    truth, blockwise = outcome(call, "reference"), outcome(call, "chunked")
    assert truth.keys() == blockwise.keys()
    for name, expected in truth.items():
        if expected is None or blockwise[name] is None:  # such as negatives in the columns' direction
            given = [g for g in (expected, blockwise[name]) if g is not None]
            assert not any(bool(g.any()) for g in given), name
        else:
            assert bool(expected.isfinite().all()), name
            torch.testing.assert_close(blockwise[name], expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@RUNS
@given(calls(one_side=False))
def test_two_sides(call):
    check(call)


@RUNS
@given(calls(one_side=True))
def test_one_side(call):
    check(call)
