"""The one differentiable operation under the contrastive loss, registered with torch, and the choice of what carries it out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from . import _blocks as blocks
from . import _exchange as processes
from . import _reference as reference
from ._blocks import Engine, Needs, Side, Teacher
from ._choice import choose, precision_of_torch
from ._chunked import Chunked
from ._pairs import FIELDS, Pairs

_NAME = __name__.rpartition(".")[0].replace(".", "_")  # a lifted copy beside this one registers an operation of its own


class Setting(NamedTuple):
    """How the statistics are computed, and which."""

    impl: str
    precision: str
    form: str
    columns: bool  # whether the columns' direction is asked for; the rows' costs nothing more
    total: bool
    group: str  # name of a process group, "" for none
    exchange: str
    operand: torch.dtype  # of the products
    accumulate: torch.dtype  # of their sums


def resolve(
    impl: str, precision: str, group: Any, exchange: str, x: Tensor, y: Tensor | None, form: str, direction: str, total: bool
) -> Setting:
    """Settle "auto", and refuse what cannot run.

    Raises:
        ValueError: If ``impl`` does not fit the tensors, or ``group`` is none of this process's.
    """
    dtype = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    accumulate = torch.promote_types(dtype, torch.float32)
    impl = choose(impl, x.device, dtype, "chunked")
    if impl == "reference" and group is not None:
        raise ValueError("impl='reference' knows one process only: leave out group, or write impl='chunked'")
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):  # a number where this process is outside
        raise ValueError(f"group must be a process group that this process is a member of, not {group!r}: write dist.group.WORLD")
    operand = accumulate
    if impl == "triton":  # under autocast its operands are rounded, as those of any product are; its logits are not
        operand = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else dtype
    if precision == "auto":
        precision = precision_of_torch()
    name = "" if group is None else group.group_name
    return Setting(impl, precision, form, direction != "rows", total, name, exchange, operand, accumulate)


def known_of_rows(
    x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None, teacher: Teacher, pairs: Pairs, setting: Setting
) -> tuple[Tensor, Tensor]:
    """What is known of each row of x, (7, M), and of each row of y, (7, N); empty: not asked for, or there is one side only."""
    if setting.impl == "reference":
        return reference.known_of_all(x, x if y is None else y, scale, bias, teacher, pairs, setting.form)
    tensors = [*(teacher or (None, None)), *pairs[:-1]]
    flags = [setting.columns, setting.total]
    return _forward(x, y, scale, bias, tensors, flags, setting.form, setting.impl, setting.precision, setting.group, setting.exchange)


class _Call(NamedTuple):
    """What comes out of the flat arguments that torch can register."""

    engine: Engine
    teacher: Teacher
    pairs: Pairs
    columns: bool


def _call(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    tensors: list[Tensor | None],
    flags: list[bool],
    form: str,
    impl: str,
    precision: str,
) -> _Call:
    first, second, *related = tensors
    pairs = Pairs._make([*related, 0 if y is None else None])
    teacher = None if first is None or second is None else (first, second)
    columns, total = flags
    plain = form == "softmax" and pairs.groups_x is None and teacher is None and not total
    if impl == "chunked":
        return _Call(Chunked(scale, bias, form, plain), teacher, pairs, columns)
    from ._contrastive_triton import Tiled  # only where triton is installed

    weight = "full" if not plain else "plain" if pairs.by_index_alone else "masked"
    return _Call(Tiled(scale, bias, form, total, weight, y is None, precision, x.dtype, x.shape[1]), teacher, pairs, columns)


@torch.library.custom_op(f"{_NAME}::contrastive", mutates_args=())
def _forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    tensors: list[Tensor | None],
    flags: list[bool],
    form: str,
    impl: str,
    precision: str,
    group: str,
    exchange: str,
) -> tuple[Tensor, Tensor]:
    call = _call(x, y, scale, bias, tensors, flags, form, impl, precision)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors lie on
        if group:
            return processes.forward(call.engine, x, y, call.teacher, call.pairs, call.columns, group, exchange)
        if y is None:
            return blocks.forward_one_side(call.engine, x, call.teacher, call.pairs), scale.new_empty(FIELDS, 0)
        return blocks.forward(call.engine, x, y, call.teacher, call.pairs, call.columns)


@_forward.register_fake
def _(x, y, scale, bias, tensors, flags, form, impl, precision, group, exchange):
    return scale.new_empty(FIELDS, x.shape[0]), scale.new_empty(FIELDS, 0 if y is None else y.shape[0])


@torch.library.custom_op(f"{_NAME}::contrastive_backward", mutates_args=())
def _backward(
    known: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    tensors: list[Tensor | None],
    flags: list[bool],
    form: str,
    impl: str,
    precision: str,
    group: str,
    exchange: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _call(x, y, scale, bias, tensors, flags, form, impl, precision)
    size = _size(upstream, group) if x.dtype == torch.float16 else torch.ones_like(scale)
    rows, columns = (Side(k, u / size) for k, u in zip(known, upstream, strict=True))
    of_columns, asked = columns if call.columns else None, Needs(*needs)
    with torch.cuda.device_of(x):
        if group:
            gradients = processes.backward(call.engine, x, y, call.teacher, call.pairs, rows, of_columns, asked, group, exchange)
        elif y is None:
            gradients = blocks.backward_one_side(call.engine, x, call.teacher, call.pairs, rows, asked)
        else:
            gradients = blocks.backward(call.engine, x, y, call.teacher, call.pairs, rows, of_columns, asked)
    dx, dy = (d.mul_(scale * size).to(x.dtype) if d is not None and n else None for d, n in zip(gradients[:2], needs[:2], strict=True))
    dscale, dbias = (None if d is None else d * size for d in gradients[2:])
    dx, dy, dscale, dbias = (scale.new_empty(0) if d is None else d for d in (dx, dy, dscale, dbias))
    return dx, dy, dscale, dbias


def _size(upstream: list[Tensor], group: str) -> Tensor:
    """The largest upstream gradient, to be taken out before logits' gradients are written in float16: 1/N would vanish in it."""
    largest = torch.cat([u.abs().flatten() for u in upstream]).amax() if upstream[0].numel() else upstream[0].new_zeros(())
    if group:  # columns are other processes' too, and all must take out the same
        largest = processes.mean_over(largest, group)
    return torch.where(largest > 0, largest, 1)


@_backward.register_fake
def _(known, upstream, needs, x, y, scale, bias, tensors, flags, form, impl, precision, group, exchange):
    wanted = zip(needs, (x, y, scale, bias), strict=True)
    return tuple(t.new_empty(t.shape) if asked and t is not None else scale.new_empty(0) for asked, t in wanted)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, scale, bias, tensors, *choice = inputs
    ctx.save_for_backward(x, y, scale, bias, *tensors, *output)
    ctx.choice = choice


def _through(ctx: Any, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor | None, ...]:
    x, y, scale, bias, *tensors, rows, columns = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    upstream = [of_rows.contiguous(), of_columns.contiguous()]
    with torch.autocast(x.device.type, enabled=False):  # a backward pass called inside autocast would round the products
        gradients = _backward([rows, columns], upstream, needs, x, y, scale, bias, tensors, *ctx.choice)
    given = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*given, *[None] * (1 + len(ctx.choice)))


def _refuse_twice(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("contrastive_loss has first derivatives only: for second ones, as with create_graph=True, write impl='reference'")


_forward.register_autograd(_through, setup_context=_keep)
_backward.register_autograd(_refuse_twice)


@torch.library.custom_op(f"{_NAME}::mean_over", mutates_args=())
def mean_over(value: Tensor, group: str) -> Tensor:
    """The mean of a value over the processes of a group. Not differentiable."""
    return processes.mean_over(value, group)


@mean_over.register_fake
def _(value, group):
    return torch.empty_like(value)
