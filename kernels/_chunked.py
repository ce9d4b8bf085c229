"""The contrastive statistics in plain torch, block by block: bounded memory on any device, and faster on a CPU than the dense form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._blocks import Gradient, Side, Teacher
from ._pairs import FIELDS, PULL, PUSH, SOFT, SOFT_LSE, TOTAL, Masks, Pairs, masks
from ._reference import known_of_block

_LOST = 1e-18  # a sum of exponentials below this lost digits to underflow and is done again with a maximum of its own
_FAR = 40.0  # exp(2 * 40) still fits float32


class Chunked:
    """Blocks large enough for the matrix products and small enough for the cache.

    Args:
        scale: () factor of the inner products; its type is that of all sums.
        bias: () summand, for the sigmoid form.
        form: "softmax" or "sigmoid".
        plain: Whether the softmax form, without groups, teacher and totals, is asked for: then everything happens in place.
    """

    columns = 8192
    gives_scale = False

    def __init__(self, scale: Tensor, bias: Tensor | None, form: str, plain: bool) -> None:
        self.scale, self.bias, self.form, self.plain = scale, bias, form, plain
        self.accumulate = scale.dtype
        self.rows = 512 if plain else 128
        self._memory = [scale.new_empty(0), scale.new_empty(0)]

    @property
    def forward_block(self) -> tuple[int, int]:
        return self.rows, self.columns

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def relate(self, pairs: Pairs) -> Pairs:
        return pairs

    def tell(self, side: Side) -> Side:
        return side

    def forward(self, x: Tensor, y: Tensor, teacher: Teacher, pairs: Pairs, columns: bool, mirror: bool) -> tuple[Tensor, Tensor | None]:
        logits = self._logits(x, y)
        if not self.plain:
            who = masks(pairs, len(x), len(y), x.device)
            return known_of_block(logits, self._taught(teacher), who, self.form, columns)
        of_rows, of_columns = _nothing(logits, len(x)), _nothing(logits, len(y)) if columns else None
        if pairs.positive is not None:
            of_rows[PULL] = _at(logits, 1, pairs.positive)
        if of_columns is not None and pairs.positive_y is not None:
            of_columns[PULL] = _at(logits, 0, pairs.positive_y)
        _exclude(logits, pairs)
        asked = [(1, of_rows)] if of_columns is None else [(1, of_rows), (0, of_columns)]
        if not _push_at_once(logits, asked):
            _exclude(self._logits(x, y), pairs)
            for dim, known in asked:
                known[PUSH] = logits.logsumexp(dim)
        return of_rows, of_columns

    def backward(
        self, x: Tensor, y: Tensor, teacher: Teacher, pairs: Pairs, rows: Side, columns: Side | None, mirror: bool, bias: bool
    ) -> Gradient:
        logits = self._logits(x, y)
        if self.plain:
            return Gradient(self._plain_backward(logits, pairs, rows, columns), None, None)
        gradient = _full_backward(logits, self._taught(teacher), masks(pairs, len(x), len(y), x.device), rows, columns, self.form)
        of_bias = gradient.sum() / (2 if mirror else 1) if bias else None  # a mirrored block holds each pair twice
        return Gradient(gradient, None, of_bias)

    def _logits(self, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.mm(x * self.scale, y.T, out=self._buffer(0, len(x), len(y)))
        return logits if self.bias is None else logits.add_(self.bias)

    def _taught(self, teacher: Teacher) -> Tensor | None:
        return None if teacher is None else (teacher[0] * self.scale) @ teacher[1].T

    def _buffer(self, which: int, R: int, C: int) -> Tensor:
        """(R, C) of memory that is there already: fresh pages for each block would cost more than its exponentials."""
        if self._memory[which].numel() < R * C:
            self._memory[which] = self.scale.new_empty(R * C)
        return self._memory[which][: R * C].view(R, C)

    def _plain_backward(self, logits: Tensor, pairs: Pairs, rows: Side, columns: Side | None) -> Tensor:
        _exclude(logits, pairs)
        if columns is None:
            logits.sub_(_finite(rows)[:, None]).exp_().mul_(rows.upstream[PUSH][:, None])
        else:
            self._shares_of_both(logits, rows, columns)
        if pairs.positive is not None:
            _put(logits, 1, pairs.positive, rows.upstream[PULL])
        if columns is not None and pairs.positive_y is not None:
            _put(logits, 0, pairs.positive_y, columns.upstream[PULL])
        return logits

    def _shares_of_both(self, logits: Tensor, rows: Side, columns: Side) -> None:
        """logits = a_i exp(logits - l_i) + b_j exp(logits - m_j), with one exponential: that of the distance to (l_i + m_j) / 2."""
        (lse, a), (lse_y, b) = ((_finite(side), side.upstream[PUSH]) for side in (rows, columns))
        other = self._buffer(1, *logits.shape)
        if logits.device.type == "cpu":  # elsewhere looking at the values would wait for the device
            center = float(lse.mean())
            u, v = (lse - center) / 2, (lse_y - center) / 2
            if max(float(u.abs().max()), float(v.abs().max())) < _FAR:
                logits.sub_((u + center)[:, None]).sub_(v).exp_()
                torch.mul((a * (-u).exp())[:, None], v.exp(), out=other).addr_(u.exp(), b * (-v).exp())
                logits.mul_(other)
                return
        torch.sub(logits, lse_y, out=other).exp_().mul_(b)
        logits.sub_(lse[:, None]).exp_().mul_(a[:, None]).add_(other)


def _push_at_once(logits: Tensor, asked: list[tuple[int, Tensor]]) -> bool:
    """One exponential a logit for its row and its column, shifted by the block's maximum; False: too far below it, do it again."""
    shift = float(logits.max()) if logits.device.type == "cpu" and logits.numel() else math.nan  # see _shares_of_both
    if not math.isfinite(shift):
        return False
    logits.sub_(shift).exp_()
    sums = [logits.sum(dim) for dim, _ in asked]
    if not all(float(total.min()) >= _LOST for total in sums):  # a NaN ends here too, and poisons its own row alone
        return False
    for total, (_, known) in zip(sums, asked, strict=True):
        known[PUSH] = total.log_().add_(shift)
    return True


def _full_backward(logits: Tensor, taught: Tensor | None, who: Masks, rows: Side, columns: Side | None, form: str) -> Tensor:
    gradient = torch.zeros_like(logits)
    for side, dim, positive in ((rows, 1, who.positive), (columns, 0, who.positive_y)):
        if side is None:
            continue
        upstream = side.upstream.unsqueeze(dim + 1)  # (7, R, 1) or (7, 1, C)
        if form == "softmax":
            share = (logits - _finite(side).unsqueeze(dim)).exp()
        else:
            share = torch.sigmoid(logits) - positive.to(logits.dtype)
        gradient += torch.where(who.denominator, upstream[PUSH] * share + upstream[TOTAL], 0)
        gradient += torch.where(positive, upstream[PULL], 0)
        if taught is not None:
            share = (taught - side.known[SOFT_LSE].unsqueeze(dim)).exp()
            gradient += torch.where(who.denominator | positive, upstream[SOFT] * share, 0)
    return gradient


def _finite(side: Side) -> Tensor:
    """The log-sum-exp, 0 where it runs over nothing: all logits there are -inf, and their share shall be 0, not NaN."""
    lse = side.known[PUSH]
    return torch.where(lse < torch.finfo(lse.dtype).min / 8, 0, lse)


def _nothing(like: Tensor, n: int) -> Tensor:
    known = like.new_zeros(FIELDS, n)
    known[PUSH] = known[SOFT_LSE] = -torch.inf
    return known


def _at(logits: Tensor, dim: int, index: Tensor) -> Tensor:
    """The logit of each row (dim 1) or column (dim 0) at its index, 0 where that lies outside."""
    size = logits.shape[dim]
    found = logits.gather(dim, index.clamp(0, size - 1).unsqueeze(dim)).squeeze(dim)
    return torch.where((index >= 0) & (index < size), found, 0)


def _put(gradient: Tensor, dim: int, index: Tensor, value: Tensor) -> None:
    """Add to each row (dim 1) or column (dim 0) at its index, nothing where that lies outside."""
    size = gradient.shape[dim]
    inside = torch.where((index >= 0) & (index < size), value, 0)
    gradient.scatter_add_(dim, index.clamp(0, size - 1).unsqueeze(dim), inside.unsqueeze(dim))


def _exclude(logits: Tensor, pairs: Pairs) -> None:
    """-inf to all that is no negative."""
    if not pairs.by_index_alone:
        logits.masked_fill_(~masks(pairs, logits.shape[0], logits.shape[1], logits.device).denominator, -torch.inf)
        return
    if pairs.diagonal is not None:
        logits.diagonal(pairs.diagonal).fill_(-torch.inf)
    for dim, index in ((1, pairs.positive), (0, pairs.positive_y)):
        if index is not None:
            at, size = index.clamp(0, logits.shape[dim] - 1).unsqueeze(dim), logits.shape[dim]
            outside = ((index < 0) | (index >= size)).unsqueeze(dim)
            logits.scatter_(dim, at, torch.where(outside, logits.gather(dim, at), -torch.inf))
