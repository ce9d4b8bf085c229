"""Who is what to whom in a contrastive loss: which row of y is a positive of a row of x, which is a negative, which is neither."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What is known of each row of x (against the rows of y) and of each row of y (against those of x), as rows of one (7, M) tensor.
PUSH = 0  # softmax: log-sum-exp of the logits that count in the denominator; sigmoid: the sum of the binary losses of these
PULL = 1  # the logit of its positive; with groups the sum over its positives
TOTAL = 2  # the sum of the logits in the denominator, for label smoothing
COUNT = 3  # how many those are
HITS = 4  # with groups, how many positives it has
SOFT = 5  # the mean logit under the teacher's distribution
SOFT_LSE = 6  # the log-sum-exp of the teacher's logits
FIELDS = 7


class Pairs(NamedTuple):
    """Relations of the M rows of x and the N rows of y; all tensors of one device. None: of this kind there is no relation.

    A negative is a pair that is there on both sides, is no positive (by index or group), has two ids, is not known and is no
    row with itself. With ``positive`` the denominator holds the negatives alone, with groups the positives too.
    """

    positive: Tensor | None = None  # (M,) int64: the column that belongs to a row; outside 0..N-1: none
    positive_y: Tensor | None = None  # (N,) int64, one side only: the row that belongs to a column
    groups_x: Tensor | None = None  # (M,) int64
    groups_y: Tensor | None = None  # (N,)
    ids_x: Tensor | None = None  # (M,) int64
    ids_y: Tensor | None = None  # (N,)
    there_x: Tensor | None = None  # (M,) bool
    there_y: Tensor | None = None  # (N,)
    known: Tensor | None = None  # (E, 2) int64; pairs outside M x N are of no matter
    diagonal: int | None = None  # one side only: row i is column i + diagonal

    @property
    def by_index_alone(self) -> bool:
        """Whether a row has at most three columns that are no negatives, so that no (M, N) mask is needed."""
        return all(value is None for value in (self.groups_x, self.ids_x, self.there_x, self.there_y, self.known))

    def ranked(self) -> Pairs:
        """The same relations with 32-bit ids and groups: a kernel compares them for every logit."""
        (ids_x, ids_y), (groups_x, groups_y) = _ranked(self.ids_x, self.ids_y), _ranked(self.groups_x, self.groups_y)
        return self._replace(ids_x=ids_x, ids_y=ids_y, groups_x=groups_x, groups_y=groups_y)

    def block(self, rows: slice, columns: slice) -> Pairs:
        """The relations of some rows with some columns, counted from 0 again."""

        def part(value: Tensor | None, of: slice, shift: int = 0) -> Tensor | None:
            return None if value is None else value[of] - shift if shift else value[of]

        return Pairs(
            positive=part(self.positive, rows, columns.start),
            positive_y=part(self.positive_y, columns, rows.start),
            groups_x=part(self.groups_x, rows),
            groups_y=part(self.groups_y, columns),
            ids_x=part(self.ids_x, rows),
            ids_y=part(self.ids_y, columns),
            there_x=part(self.there_x, rows),
            there_y=part(self.there_y, columns),
            known=None if self.known is None else torch.stack([self.known[:, 0] - rows.start, self.known[:, 1] - columns.start], 1),
            diagonal=None if self.diagonal is None else self.diagonal + rows.start - columns.start,
        )


def _ranked(x: Tensor | None, y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The place of each number among those of y, -1 for one that y does not hold."""
    if x is None or y is None:
        return x, y
    if not len(y):
        return x.new_full((len(x),), -1, dtype=torch.int32), y.to(torch.int32)
    ordered = y.sort().values
    place_x, place_y = (torch.searchsorted(ordered, numbers.contiguous()) for numbers in (x, y))
    held = ordered[place_x.clamp(max=len(y) - 1)] == x
    return torch.where(held, place_x, -1).to(torch.int32), place_y.to(torch.int32)


class Masks(NamedTuple):
    """(M, N) bool each."""

    denominator: Tensor  # softmax: what the log-sum-exp runs over
    positive: Tensor  # of the row, by index or group
    positive_y: Tensor  # of the column


def masks(pairs: Pairs, M: int, N: int, device: torch.device) -> Masks:
    """The relations spelled out."""
    row, column = torch.arange(M, device=device)[:, None], torch.arange(N, device=device)
    distinct = torch.ones(M, N, dtype=torch.bool, device=device) if pairs.diagonal is None else row + pairs.diagonal != column
    if pairs.there_x is not None:
        distinct = distinct & pairs.there_x[:, None]
    if pairs.there_y is not None:
        distinct = distinct & pairs.there_y
    negative = distinct
    if pairs.ids_x is not None and pairs.ids_y is not None:
        negative = negative & (pairs.ids_x[:, None] != pairs.ids_y)
    if pairs.known is not None:
        inside = ((pairs.known >= 0) & (pairs.known < pairs.known.new_tensor([M, N]))).all(1)
        here = pairs.known[inside]
        negative = negative.index_put((here[:, 0], here[:, 1]), torch.zeros((), dtype=torch.bool, device=device))
    if pairs.groups_x is not None and pairs.groups_y is not None:
        same = (pairs.groups_x[:, None] == pairs.groups_y) & distinct
        return Masks(negative | same, same, same)
    none = torch.zeros(M, N, dtype=torch.bool, device=device)
    positive = none if pairs.positive is None else pairs.positive[:, None] == column
    positive_y = positive if pairs.positive_y is None else pairs.positive_y == row
    return Masks(negative & ~positive & ~positive_y, positive, positive_y)


def merge(one: Tensor, other: Tensor, form: str) -> Tensor:
    """What is known of the same rows, (7, M), from two parts of their columns. Differentiable."""
    push = _log_add(one[PUSH], other[PUSH]) if form == "softmax" else one[PUSH] + other[PUSH]
    soft_lse = _log_add(one[SOFT_LSE], other[SOFT_LSE])
    soft = one[SOFT] * (one[SOFT_LSE] - soft_lse).exp() + other[SOFT] * (other[SOFT_LSE] - soft_lse).exp()
    return torch.cat([push[None], one[PULL:SOFT] + other[PULL:SOFT], soft[None], soft_lse[None]])


def empty(form: str, M: int, like: Tensor) -> Tensor:
    """(7, M), what is known of rows that have met no column: ``merge`` with it changes nothing."""
    known = like.new_zeros(FIELDS, M)
    known[SOFT_LSE] = -torch.inf
    if form == "softmax":
        known[PUSH] = -torch.inf
    return known


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    # Of two infinities logaddexp has no gradient but NaN; exp of the floor is 0 just as well.
    floor = torch.finfo(a.dtype).min / 4
    return torch.logaddexp(a.clamp(min=floor), b.clamp(min=floor))
