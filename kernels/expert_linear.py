"""One linear map per modality for rows that lie mixed in one tensor, without sending every row through every map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _expert_linear_grouped as grouped
from ._choice import choose
from ._faults import faults_of_devices, faults_of_floats, faults_of_types, named, refuse_forward_mode, type_named

Impl = Literal["auto", "reference", "grouped", "triton"]

_NAME = __name__.replace(".", "_")  # a lifted copy beside this one registers operations of its own


class Routing(NamedTuple):
    """Which rows go to which expert, sorted; made once by `route` for all the layers that share it."""

    expert: Tensor  # (...) int64
    order: Tensor  # (M,) int64, the rows (counted through all leading dimensions) sorted by expert, those without one last
    starts: Tensor  # (E + 2,) int64, where each expert's rows begin in ``order``, then those without one, then the end


def route(expert: Tensor, experts: int) -> Routing:
    """Sort rows by their expert, stably and without waiting for the device.

    Args:
        expert: (...) int64, -1..experts - 1; -1 for none. On a CPU, outside torch.compile, the range is checked; elsewhere
            what lies outside of it counts as -1.
        experts: E, how many there are.

    Raises:
        TypeError: If ``expert`` is no tensor.
        ValueError: If it is not int64, or if an index was checked and lies outside the range.
    """
    if faults := faults_of_types({"expert": expert}, {}):
        raise TypeError("; ".join(faults))
    if expert.dtype != torch.int64:
        raise ValueError(f"expert must be int64, not {named(expert.dtype)}")
    _check_range(expert, experts)
    inside = (expert >= 0) & (expert < experts)
    ordered, order = torch.sort(torch.where(inside, expert, experts).flatten(), stable=True)
    starts = torch.searchsorted(ordered, torch.arange(experts + 2, device=expert.device))
    return Routing(expert, order, starts)


def _check_range(expert: Tensor, experts: int) -> None:
    if expert.device.type != "cpu" or torch.compiler.is_compiling():
        return  # looking would wait for the device, or break the graph
    if not bool(((expert >= -1) & (expert < experts)).all()):
        raise ValueError(f"expert must lie in -1..{experts - 1}, but holds {int(expert.min())}..{int(expert.max())}")


def expert_linear(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    biases: Tensor | Sequence[Tensor] | None = None,
    *,
    expert: Tensor | Routing | None = None,
    sizes: Sequence[int] | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Each row through the weights of its own expert: the feed-forwards of VLMo, the multiway layers of BEiT-3, CogVLM's visual expert.

    Bao et al., VLMo, 2022, https://arxiv.org/abs/2111.02358. Wang et al., BEiT-3, 2023, https://arxiv.org/abs/2208.10442.
    Wang et al., CogVLM, 2023, https://arxiv.org/abs/2311.03079.

    A row without an expert (-1) gives a row of zeros and gets a gradient of zeros; an expert without rows gets a gradient of zeros.
    What stands in the rows of one expert, NaN included, never reaches the gradient of another. Products of float32 are as exact as
    `torch.set_float32_matmul_precision` says. Results repeat bit for bit. Under autocast, arguments are cast as those of `F.linear` are.
    With ``expert`` reverse mode only: no jvp, vmap or other transforms of `torch.func`, but with impl="reference".

    Args:
        x: (..., D_in), of any strides; float16, bfloat16, float32 or float64, as the weights.
        weights: (E, D_out, D_in), each as `nn.Linear` holds it; or a list of E, of experts that are modules of their own, which with
            ``sizes`` is not laid together.
        biases: (E, D_out), or a list of E, or None.
        expert: (...) int64, the expert of each row, -1 for none; or what `route` made of it. For modalities that alternate.
        sizes: Instead of ``expert``: how many tokens of x (..., N, D_in) each expert has, in order, N together. For modalities that
            lie one after the other: each slice is a product of its own.
        impl: reference: every row through every expert, masked; differentiable twice. grouped: library matmuls of one expert's rows at
            a time; waits for the device where ``expert`` lies on one. triton: one grouped matmul, rows gathered as they are loaded. auto:
            triton for ``expert`` on CUDA (capability 8.0 or more, not float64), else grouped.

    Returns:
        (..., D_out)

    Raises:
        TypeError: On what is no tensor, or on sizes that are no whole numbers.
        ValueError: On shapes, dtypes, devices or an ``impl`` that do not fit; see `route` for values.
        RuntimeError: On a second derivative with ``expert``, but for impl="reference"; NotImplementedError on one in forward mode.
    """
    _check(x, weights, biases, expert, sizes, impl)
    if sizes is not None and impl in ("auto", "grouped"):
        own = [None] * len(sizes) if biases is None else biases
        slices = (piece.contiguous() for piece in x.split(list(sizes), -2))  # torch adds the bias within the product only to such
        return torch.cat([F.linear(*of) for of in zip(slices, weights, own, strict=True)], -2)
    weights, biases = _together(weights), None if biases is None else _together(biases)
    if impl != "reference":
        refuse_forward_mode("expert_linear", (x, weights, biases))
    x, weights, biases = _autocast(x, weights, biases)
    *lead, d_in = x.shape
    E, d_out, _ = weights.shape
    if sizes is not None:
        expert = torch.cat([torch.full((size,), e, device=x.device) for e, size in enumerate(sizes)]).expand(lead)
    assert expert is not None
    if impl == "reference":
        if isinstance(expert, Tensor):
            _check_range(expert, E)
        return _reference(x, weights, biases, expert.expert if isinstance(expert, Routing) else expert)
    routing = expert if isinstance(expert, Routing) else route(expert, E)
    chosen = choose(impl, x.device, x.dtype, "grouped")
    y = _rows(x.reshape(math.prod(lead), d_in), weights, biases, routing.order, routing.starts, chosen)
    return y.reshape(*lead, d_out)


def _together(tensors: Tensor | Sequence[Tensor]) -> Tensor:
    return tensors if isinstance(tensors, Tensor) else torch.stack(list(tensors))


def _check(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    biases: Tensor | Sequence[Tensor] | None,
    expert: Tensor | Routing | None,
    sizes: Sequence[int] | None,
    impl: str,
) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} is no choice: one of {', '.join(get_args(Impl))}")
    _check_types(x, weights, biases, expert, sizes)
    shape = _shape(weights)
    if len(shape) != 3 or x.ndim < 2 or x.shape[-1] != shape[2]:
        raise ValueError(f"x must be (..., D_in) and weights (E, D_out, D_in), not {tuple(x.shape)} and {shape}")
    tensors, E = {"x": x} | _each("weights", weights) | _each("biases", biases), shape[0]
    placed = {**tensors, "expert": expert.order if isinstance(expert, Routing) else expert}
    faults = faults_of_floats(tensors) + faults_of_devices(placed)
    if biases is not None and _shape(biases) != shape[:2]:
        faults.append(f"biases must be {shape[:2]}, not {_shape(biases)}")
    if (expert is None) == (sizes is None):
        faults.append("the experts of the rows are named by expert or by sizes, by one of the two")
    elif sizes is not None:
        if len(sizes) != E or sum(sizes) != x.shape[-2] or any(size < 0 for size in sizes):
            faults.append(f"sizes must be {E} numbers from 0 that sum to N={x.shape[-2]}, not {list(sizes)}")
    elif isinstance(expert, Routing):
        if expert.expert.shape != x.shape[:-1] or len(expert.starts) != E + 2:
            of = f"{tuple(expert.expert.shape)} rows and {len(expert.starts) - 2} experts"
            faults.append(f"the routing is one of {of}, but here are {tuple(x.shape[:-1])} and {E}")
    elif expert is not None and (expert.shape != x.shape[:-1] or expert.dtype != torch.int64):
        faults.append(f"expert must be {tuple(x.shape[:-1])} int64, not {tuple(expert.shape)} {named(expert.dtype)}")
    dtypes = {t.dtype for t in tensors.values() if t is not None}
    if x.device.type == "meta" and sizes is None:
        faults.append("x lies on meta, where there are no values: move it to a device")
    elif len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type):
        faults.append(f"x, weights and biases must have one dtype, not {', '.join(sorted(map(named, dtypes)))}")
    if faults:
        raise ValueError("; ".join(faults))


def _check_types(x: object, weights: object, biases: object, expert: object, sizes: object) -> None:
    where = {} if isinstance(expert, Routing) else {"expert": expert}
    faults = faults_of_types({"x": x} | _each("weights", weights), _each("biases", biases) | where)
    if isinstance(sizes, str) or not isinstance(sizes, Sequence | None):
        faults.append(f"sizes must be a sequence of whole numbers, not {type_named(sizes)}")
    elif wrong := [size for size in sizes or () if not isinstance(size, Integral)]:
        faults.append(f"sizes must be whole numbers, not {type_named(wrong[0])}")
    if faults:
        raise TypeError("; ".join(faults))


def _each(name: str, given: Any) -> dict[str, Any]:
    """One tensor by its name, or those of a list by name and number."""
    return {f"{name}[{i}]": value for i, value in enumerate(given)} if isinstance(given, list | tuple) else {name: given}


def _shape(given: Tensor | Sequence[Tensor]) -> tuple[int, ...]:
    """That of all together."""
    if isinstance(given, Tensor):
        return tuple(given.shape)
    shapes = {tuple(each.shape) for each in given}
    if len(shapes) != 1:
        raise ValueError(f"a list of weights or biases must be of one shape, not {', '.join(map(str, sorted(shapes))) or 'empty'}")
    return (len(given), *shapes.pop())


def _autocast(x: Tensor, weights: Tensor, biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weights, biases
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weights.to(dtype), None if biases is None else biases.to(dtype)


def _reference(x: Tensor, weights: Tensor, biases: Tensor | None, expert: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:-1], weights.shape[1])
    for e, weight in enumerate(weights):
        others = (expert != e)[..., None]
        mine = F.linear(x.masked_fill(others, 0), weight, None if biases is None else biases[e])
        y = y + mine.masked_fill(others, 0)
    return y


@torch.library.custom_op(f"{_NAME}::rows", mutates_args=())
def _rows(x: Tensor, weights: Tensor, biases: Tensor | None, order: Tensor, starts: Tensor, impl: str) -> Tensor:
    if impl == "grouped":
        return grouped.forward(x, weights, biases, order, starts)
    from ._expert_linear_triton import forward  # triton is there on Linux only

    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors lie on
        return forward(x, weights, biases, order, starts)


@_rows.register_fake
def _(x, weights, biases, order, starts, impl):
    return x.new_empty(x.shape[0], weights.shape[1])


@torch.library.custom_op(f"{_NAME}::rows_backward", mutates_args=())
def _rows_backward(
    dy: Tensor, x: Tensor, weights: Tensor, order: Tensor, starts: Tensor, needs: list[bool], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "grouped":
        return grouped.backward(dy, x, weights, order, starts, needs)
    from ._expert_linear_triton import backward

    with torch.cuda.device_of(x):
        return backward(dy, x, weights, order, starts, needs)


def _fake_gradients(x: Tensor, weights: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weights.shape, weights.shape[:2])
    dx, dw, db = (x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))
    return dx, dw, db


_rows_backward.register_fake(lambda dy, x, weights, order, starts, needs, impl: _fake_gradients(x, weights, needs))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, _, *where = inputs
    tensors = [value for value in where if isinstance(value, Tensor)]
    ctx.save_for_backward(x, weights, *tensors)
    ctx.choice = where[len(tensors) :]


def _given(ctx: Any, gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)]


def _through_rows(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _rows_backward(dy.contiguous(), *ctx.saved_tensors, list(ctx.needs_input_grad[:3]), *ctx.choice)
    return (*_given(ctx, gradients), None, None, None)


def _refuse_twice(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("expert_linear has first derivatives only: for second ones, as with create_graph=True, write impl='reference'")


_rows.register_autograd(_through_rows, setup_context=_keep)
_rows_backward.register_autograd(_refuse_twice)
