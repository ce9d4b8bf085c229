"""The contrastive statistics over several processes: each holds its own rows, and lets them meet the columns of all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from . import _blocks as blocks
from ._blocks import Engine, Gradients, Needs, Side, Teacher
from ._pairs import FIELDS, Pairs, empty, merge


def forward(
    engine: Engine, x: Tensor, y: Tensor | None, teacher: Teacher, pairs: Pairs, columns: bool, group: str, exchange: str
) -> tuple[Tensor, Tensor]:
    """What is known of the own rows against the columns of all processes, (7, M), and of the own columns, (7, N).

    With ``y`` None the rows of all processes are the columns, and nothing is told of these, (7, 0). Indices in ``pairs`` are local; the
    columns of ``known`` may lie beyond the own ones, in another process.

    Raises:
        ValueError: On a CPU, if what the processes hold does not go together.
    """
    world = _join(x, y, teacher, pairs, group)
    y, columns = (x, False) if y is None else (y, columns)
    pairs = world.spread(pairs)
    like = x.new_empty(0, dtype=engine.accumulate)
    of_rows, of_columns = empty(engine.form, len(x), like), empty(engine.form, world.size * len(y), like)
    for part in _parts(len(y), exchange):
        for at, (piece, *taught) in _pieces(world, _columns_of(y, teacher, part), part, exchange):
            related = pairs.block(slice(0, len(x)), at)
            one, other = blocks.forward(engine, x, piece, _beside(teacher, taught), related, columns)
            of_rows = merge(of_rows, one, engine.form)
            of_columns[:, at] = other
        del piece, taught  # or they would still be held while the next part travels
    if not columns:
        return of_rows, empty(engine.form, 0 if pairs.diagonal is not None else len(y), like)
    parts = of_columns.view(FIELDS, world.size, len(y)).transpose(0, 1).contiguous()  # (W, 7, N), by owner
    received = torch.empty_like(parts)  # by the process whose rows they tell of
    dist.all_to_all_single(received, parts, group=world.processes)
    return of_rows, reduce(lambda a, b: merge(a, b, engine.form), received.unbind())


def backward(
    engine: Engine,
    x: Tensor,
    y: Tensor | None,
    teacher: Teacher,
    pairs: Pairs,
    rows: Side,
    columns: Side | None,
    needs: Needs,
    group: str,
    exchange: str,
) -> Gradients:
    """The gradients of the own rows and columns, through all processes' losses, and the own rows' share of scale and bias."""
    world, one_side = _join(x, y, teacher, pairs, group), y is None
    if y is None:
        y, columns, needs = x, None, needs._replace(y=needs.x)
    pairs = world.spread(pairs)
    if columns is not None:
        columns = Side(world.gathered(columns.known), world.gathered(columns.upstream))
    found = Gradients(None, None, None, None)
    dy = torch.zeros_like(y, dtype=engine.accumulate) if needs.y else None
    for part in _parts(len(y), exchange):
        total: Tensor | None = None  # the gradient of a piece, which goes with it from process to process
        for at, (piece, *taught) in _pieces(world, _columns_of(y, teacher, part), part, exchange):
            passed = None if total is None else _Passing([total], [torch.empty_like(total)], world, tag=2)
            at_columns = None if columns is None else columns.at(at)
            related = pairs.block(slice(0, len(x)), at)
            more = blocks.backward(engine, x, piece, _beside(teacher, taught), related, rows, at_columns, needs)
            found = Gradients._make(_sum(a, b) for a, b in zip(found, more._replace(y=None), strict=True))
            total = more.y if passed is None or more.y is None else more.y.add_(passed.wait()[0])
        del piece, taught
        if dy is not None and total is not None:
            dy[part] = world.returned(total, exchange)
    if one_side:
        return found._replace(x=_sum(found.x, dy))
    return found._replace(y=dy)


def mean_over(value: Tensor, group: str) -> Tensor:
    """The mean of a value over the processes of a group."""
    total = value.clone()
    processes = _resolve(group)
    dist.all_reduce(total, group=processes)
    return total / processes.size()


class _World(NamedTuple):
    """The processes of a group, and the place of this one."""

    name: str
    processes: Any
    size: int
    rank: int
    rows: int  # of each process
    columns: int

    def spread(self, pairs: Pairs) -> Pairs:
        """The relations of the own rows with the columns of all processes; what names no column still names none."""
        first_row, first_column = self.rank * self.rows, self.rank * self.columns

        def shifted(index: Tensor, size: int, first: int) -> Tensor:
            return torch.where((index >= 0) & (index < size), index + first, -1)

        positive_y, known = pairs.positive_y, pairs.known
        if positive_y is not None:
            positive_y = self.gathered(shifted(positive_y, self.rows, first_row)) - first_row
        if known is not None:
            known = torch.stack([known[:, 0], known[:, 1] + first_column], 1)
        return pairs._replace(
            positive=None if pairs.positive is None else shifted(pairs.positive, self.columns, first_column),
            positive_y=positive_y,
            groups_y=None if pairs.groups_y is None else self.gathered(pairs.groups_y),
            ids_y=None if pairs.ids_y is None else self.gathered(pairs.ids_y),
            there_y=None if pairs.there_y is None else self.gathered(pairs.there_y.to(torch.uint8)).bool(),
            known=known,
            diagonal=None if pairs.diagonal is None else pairs.diagonal + first_row,
        )

    def gathered(self, value: Tensor) -> Tensor:
        """(N,) to (W N,) and (7, N) to (7, W N), in the order of the processes."""
        if value.ndim == 1:
            return self.stacked(value)
        return self.stacked(value).view(self.size, *value.shape).transpose(0, 1).reshape(len(value), -1)

    def stacked(self, value: Tensor) -> Tensor:
        """(N, ...) to (W N, ...), in the order of the processes."""
        # dist's own function for it changed its name between the releases of torch that are served; the operation did not
        return _finished(torch.ops._c10d_functional.all_gather_into_tensor(value.contiguous(), self.size, self.name))

    def returned(self, total: Tensor, exchange: str) -> Tensor:
        """The gradient of the own columns, of what this process holds when all pieces have been met."""
        if self.size == 1:
            return total
        if exchange == "ring":  # the last piece that was met is the right neighbour's
            return _Passing([total], [torch.empty_like(total)], self, tag=2).wait()[0]
        return _finished(torch.ops._c10d_functional.reduce_scatter_tensor(total, "sum", self.size, self.name))


class _Passing:
    """Tensors under way round the ring: ``sent`` to the right neighbour and, into ``arriving``, those of the left one."""

    def __init__(self, sent: list[Tensor], arriving: list[Tensor], world: _World, tag: int) -> None:
        right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        there = [dist.P2POp(dist.isend, t, None, world.processes, tag + i, right) for i, t in enumerate(sent)]
        here = [dist.P2POp(dist.irecv, t, None, world.processes, tag + i, left) for i, t in enumerate(arriving)]
        self._sent, self._arriving = sent, arriving  # neither may be freed before its time
        self._work = dist.batch_isend_irecv(there + here)

    def wait(self) -> list[Tensor]:
        for work in self._work:
            work.wait()
        return self._arriving


def _join(x: Tensor, y: Tensor | None, teacher: Teacher, pairs: Pairs, group: str) -> _World:
    processes = _resolve(group)
    M, N = len(x), len(x) if y is None else len(y)
    world = _World(group, processes, processes.size(), processes.rank(), M, N)
    if x.device.type == "cpu":  # elsewhere looking at the others' would wait for the device
        own = {
            "rows of x": M,
            "rows of y": N,
            "D": x.shape[1],
            "D' of soft": 0 if teacher is None else teacher[1].shape[1],
            "bits of a number": 8 * x.itemsize,
            "y given": int(y is not None),
            **{f"{name} given": int(value is not None) for name, value in _travelling(pairs).items()},
        }
        held = world.stacked(torch.tensor([list(own.values())])).T.tolist()
        if unequal := [f"{name}: {', '.join(map(str, of))}" for name, of in zip(own, held, strict=True) if len(set(of)) > 1]:
            wanted = "all processes of a group must hand over as many rows, of one width and dtype, and the same tensors"
            raise ValueError(f"{wanted}, not {'; '.join(unequal)}")
    return world


def _travelling(pairs: Pairs) -> dict[str, Tensor | None]:
    """What each process must hand over if one does, by the names that a caller knows."""
    return {"positive": pairs.positive, "groups": pairs.groups_y, "ids": pairs.ids_y, "present": pairs.there_y}


def _resolve(group: Any) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group  # there only where torch is built with it

    return _resolve_process_group(group)


def _finished(value: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(value)


def _pieces(world: _World, own: list[Tensor], part: slice, exchange: str) -> Iterator[tuple[slice, list[Tensor]]]:
    """The columns of all processes, and where they lie among them: all at once, or a part of the share of one after another."""
    if exchange == "gather":
        yield slice(0, world.size * world.columns), [world.stacked(t) for t in own]
        return
    held = [t.contiguous() for t in own]
    buffers = [[torch.empty_like(t) for t in held] for _ in range(min(2, world.size - 1))]
    for hop in range(world.size):
        passed = _Passing(held, buffers[hop % 2], world, tag=0) if hop + 1 < world.size else None
        first = (world.rank - hop) % world.size * world.columns
        yield slice(first + part.start, first + part.stop), held
        if passed is not None:
            held = passed.wait()


def _parts(N: int, exchange: str) -> list[slice]:
    """What a share is cut into: of halves one is used while the next arrives, and both together are one share at most."""
    if exchange == "gather" or N < 2:
        return [slice(0, N)]
    return [slice(0, N // 2), slice(N // 2, N)]


def _columns_of(y: Tensor, teacher: Teacher, part: slice) -> list[Tensor]:
    return [y[part]] if teacher is None else [y[part], teacher[1][part]]


def _beside(teacher: Teacher, taught: list[Tensor]) -> Teacher:
    return None if teacher is None else (teacher[0], taught[0])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
