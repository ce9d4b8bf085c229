"""The library matmuls of `expert_linear` for rows that lie mixed: gathered, one expert's at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def forward(x: Tensor, weights: Tensor, biases: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
    """(M, D_out) from x (M, D_in); order and starts as in `Routing`."""
    y = x.new_zeros(len(x), weights.shape[1])
    for e, rows in enumerate(_rows_of(order, starts)):
        mine = x.index_select(0, rows)
        y.index_copy_(0, rows, mine @ weights[e].T if biases is None else torch.addmm(biases[e], mine, weights[e].T))
    return y


def backward(dy: Tensor, x: Tensor, weights: Tensor, order: Tensor, starts: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weights and biases; empty where not needed."""
    dx, dw, db = _room(x, weights, needs)
    if needs[0]:
        dx.zero_()  # rows without an expert
    for e, rows in enumerate(_rows_of(order, starts)):
        mine = dy.index_select(0, rows)
        if needs[0]:
            dx.index_copy_(0, rows, mine @ weights[e])
        _sum_over_rows(mine, x.index_select(0, rows) if needs[1] else x, dw, db, e, needs)
    return dx, dw, db


def _rows_of(order: Tensor, starts: Tensor) -> list[Tensor]:
    """The rows of each expert."""
    return [order[start:stop] for start, stop in pairwise(starts.tolist()[:-1])]


def _room(x: Tensor, weights: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weights.shape, weights.shape[:2])
    dx, dw, db = (x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))
    return dx, dw, db


def _sum_over_rows(dy: Tensor, x: Tensor, dw: Tensor, db: Tensor, e: int, needs: list[bool]) -> None:
    if needs[1]:
        torch.mm(dy.T, x, out=dw[e])
    if needs[2]:
        torch.sum(dy, 0, out=db[e])
