"""The walk over blocks of the logits: one driver for every implementation that never holds them all.

An engine knows blocks only: what a block adds to what is known of its rows and columns, and the gradient of its logits. The
driver cuts, merges, and turns the gradients of logits into those of embeddings by matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._pairs import Pairs, empty, merge

Teacher = tuple[Tensor, Tensor] | None


class Side(NamedTuple):
    """The rows, or the columns, on the way back; (7, M) each."""

    known: Tensor
    upstream: Tensor  # gradient of the loss with respect to ``known``

    def at(self, part: slice) -> Side:
        return Side(self.known[:, part], self.upstream[:, part])


class Gradient(NamedTuple):
    """Of a block's logits, or of all that they depend on."""

    logits: Tensor  # (R, C) in the type of the operands; valid until the engine's next call
    scale: Tensor | None  # () sum of the gradients times the unscaled products, of an engine that gives it
    bias: Tensor | None  # ()


class Engine(Protocol):
    """What an implementation gives. ``teacher`` holds its embeddings of the block's rows and columns."""

    rows: int  # the largest block it takes on the way back
    columns: int
    form: str
    accumulate: torch.dtype
    gives_scale: bool  # whether its gradients tell that of the scale; else the driver takes it from dx

    @property
    def forward_block(self) -> tuple[int, int]:
        """The largest block on the way forward."""
        ...

    def prepare(self, x: Tensor) -> Tensor:
        """Embeddings as the engine wants them, perhaps with zeros behind each row; done once, before they are cut."""
        ...

    def relate(self, pairs: Pairs) -> Pairs:
        """Relations as the engine wants them; done once, before they are cut."""
        ...

    def tell(self, side: Side) -> Side:
        """A side as the engine reads it on the way back; done once, before it is cut."""
        ...

    def forward(self, x: Tensor, y: Tensor, teacher: Teacher, pairs: Pairs, columns: bool, mirror: bool) -> tuple[Tensor, Tensor | None]:
        """(R, D), (C, D) to (7, R) and, if asked for, (7, C). ``mirror``: x is y, and columns would tell the same."""
        ...

    def backward(
        self, x: Tensor, y: Tensor, teacher: Teacher, pairs: Pairs, rows: Side, columns: Side | None, mirror: bool, bias: bool
    ) -> Gradient: ...


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    y: bool
    scale: bool
    bias: bool


class Gradients(NamedTuple):
    """With respect to the embeddings in the type of accumulation, those that are asked for, not yet times the scale."""

    x: Tensor | None
    y: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


def forward(engine: Engine, x: Tensor, y: Tensor, teacher: Teacher, pairs: Pairs, columns: bool) -> tuple[Tensor, Tensor]:
    """What is known of M rows against N columns, (7, M), and of the columns, (7, N); the latter empty of content if not asked for."""
    x, y, teacher, pairs = engine.prepare(x), engine.prepare(y), _prepared(engine, teacher), engine.relate(pairs)
    like = x.new_empty(0, dtype=engine.accumulate)
    of_rows, of_columns = empty(engine.form, len(x), like), empty(engine.form, len(y), like)
    for r, c in _cuts(len(x), len(y), *engine.forward_block):
        one, other = engine.forward(x[r], y[c], _part(teacher, r, c), pairs.block(r, c), columns, mirror=False)
        _add(of_rows, r, one, engine.form)
        _add(of_columns, c, other, engine.form)
    return of_rows, of_columns


def forward_one_side(engine: Engine, x: Tensor, teacher: Teacher, pairs: Pairs) -> Tensor:
    """What is known of M rows against each other, (7, M): a block beside the diagonal tells of its rows and its columns."""
    x, teacher, pairs = engine.prepare(x), _prepared(engine, teacher), engine.relate(pairs)
    known = empty(engine.form, len(x), x.new_empty(0, dtype=engine.accumulate))
    for r, c in _upper_cuts(len(x), engine):
        beside = r != c
        one, other = engine.forward(x[r], x[c], _part(teacher, r, c), pairs.block(r, c), beside, mirror=not beside)
        _add(known, r, one, engine.form)
        _add(known, c, other, engine.form)
    return known


def backward(
    engine: Engine, x: Tensor, y: Tensor, teacher: Teacher, pairs: Pairs, rows: Side, columns: Side | None, needs: Needs
) -> Gradients:
    """The gradients of both sides. ``columns`` None: nothing comes back through them."""
    D, through_x = x.shape[1], needs.x or (needs.scale and not engine.gives_scale)
    x, y, teacher, pairs = engine.prepare(x), engine.prepare(y), _prepared(engine, teacher), engine.relate(pairs)
    rows, columns = engine.tell(rows), None if columns is None else engine.tell(columns)
    dx = torch.zeros_like(x, dtype=engine.accumulate) if through_x else None
    dy = torch.zeros_like(y, dtype=engine.accumulate) if needs.y else None
    scale, bias = x.new_zeros((), dtype=engine.accumulate), x.new_zeros((), dtype=engine.accumulate)
    for r, c in _cuts(len(x), len(y), engine.rows, engine.columns):
        at_c = None if columns is None else columns.at(c)
        gradient = engine.backward(x[r], y[c], _part(teacher, r, c), pairs.block(r, c), rows.at(r), at_c, False, needs.bias)
        if dx is not None:
            accumulate(dx[r], gradient.logits, y[c])
        if dy is not None:
            accumulate(dy[c], gradient.logits.T, x[r])
        if gradient.scale is not None:
            scale = scale + gradient.scale
        if gradient.bias is not None:
            bias = bias + gradient.bias
    if dx is not None and not engine.gives_scale:
        scale = (dx * x).sum()
    dx, dy = (None if d is None else d[:, :D].contiguous() for d in (dx, dy))
    return Gradients(dx, dy, scale if needs.scale else None, bias if needs.bias else None)


def backward_one_side(engine: Engine, x: Tensor, teacher: Teacher, pairs: Pairs, side: Side, needs: Needs) -> Gradients:
    """The gradients of the one side: each logit serves as (i, j) and as (j, i), so its gradient is the sum of both."""
    D, through_x = x.shape[1], needs.x or (needs.scale and not engine.gives_scale)
    x, teacher, pairs, side = engine.prepare(x), _prepared(engine, teacher), engine.relate(pairs), engine.tell(side)
    dx = torch.zeros_like(x, dtype=engine.accumulate) if through_x else None
    scale, bias = x.new_zeros((), dtype=engine.accumulate), x.new_zeros((), dtype=engine.accumulate)
    for r, c in _upper_cuts(len(x), engine):
        beside = r != c
        gradient = engine.backward(x[r], x[c], _part(teacher, r, c), pairs.block(r, c), side.at(r), side.at(c), not beside, needs.bias)
        if dx is not None:
            accumulate(dx[r], gradient.logits, x[c])
            if beside:
                accumulate(dx[c], gradient.logits.T, x[r])
        if gradient.scale is not None:
            scale = scale + gradient.scale
        if gradient.bias is not None:
            bias = bias + gradient.bias
    if dx is not None and not engine.gives_scale:
        scale = (dx * x).sum() / 2  # dx holds each logit's share twice, once a row
    return Gradients(None if dx is None else dx[:, :D].contiguous(), None, scale if needs.scale else None, bias if needs.bias else None)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in place, summed in the type of ``out``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)  # half precision in, float32 out, never rounded between
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _cuts(M: int, N: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for r in range(0, M, rows):
        for c in range(0, N, columns):
            yield slice(r, min(r + rows, M)), slice(c, min(c + columns, N))


def _upper_cuts(M: int, engine: Engine) -> Iterator[tuple[slice, slice]]:
    """Square blocks on the diagonal, and what lies right of each."""
    height = min(engine.rows, engine.columns)
    for r in range(0, M, height):
        rows = slice(r, min(r + height, M))
        yield rows, rows
        for c in range(rows.stop, M, engine.columns):
            yield rows, slice(c, min(c + engine.columns, M))


def _prepared(engine: Engine, teacher: Teacher) -> Teacher:
    return None if teacher is None else (engine.prepare(teacher[0]), engine.prepare(teacher[1]))


def _part(teacher: Teacher, rows: slice, columns: slice) -> Teacher:
    return None if teacher is None else (teacher[0][rows], teacher[1][columns])


def _add(known: Tensor, part: slice, more: Tensor | None, form: str) -> None:
    if more is not None:
        known[:, part] = merge(known[:, part], more, form)
