"""What each row of a contrastive loss should answer, what it costs not to, and how the costs become one number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._operator import mean_over
from ._pairs import COUNT, HITS, PUSH, SOFT, TOTAL


class Targets(NamedTuple):
    """What a row should answer, and what it costs not to."""

    form: str
    grouped: bool
    smoothing: float
    soft: float

    def loss(self, known: Tensor, pull: Tensor) -> Tensor:
        """(7, M) of the anchors and the pull of the positive of each, (M,), to losses (M,)."""
        push, total, count = known[PUSH], known[TOTAL], known[COUNT]
        if self.grouped:
            return self._grouped_loss(push, pull, total, count, known[HITS].clamp(min=1), known[SOFT])
        # -logsigmoid(-z) is softplus(z), without the cut-off of F.softplus that costs float64 its digits.
        if self.form == "sigmoid":
            loss = push - F.logsigmoid(pull)
            return loss + self.smoothing / 2 * (pull - total) if self.smoothing else loss
        loss = -F.logsigmoid(pull - push)  # the cross entropy of the positive alone
        if self.soft:
            loss = loss + self.soft * (pull - known[SOFT])
        if self.smoothing:
            loss = loss + self.smoothing * (pull - (total + pull) / (count + 1))
        return loss

    def _grouped_loss(self, push: Tensor, pull: Tensor, total: Tensor, count: Tensor, hits: Tensor, soft: Tensor) -> Tensor:
        if self.form == "sigmoid":
            return push + self.smoothing / 2 * (2 * pull - total) if self.smoothing else push
        target = (1 - self.soft - self.smoothing) * pull / hits
        if self.soft:
            target = target + self.soft * soft
        if self.smoothing:
            target = target + self.smoothing * total / count.clamp(min=1)
        return push - target


def reduce(loss: Tensor, counted: Tensor, weight: Tensor | None, reduction: str, group: str) -> Tensor:
    """Losses (M,) of the anchors, of which those that count (M,) bool, to () or, for "none", (M,)."""
    weight = torch.ones_like(loss) if weight is None else weight.to(loss.dtype)
    weight = weight.masked_fill(~counted, 0)
    loss = torch.where(counted, loss, 0) * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = weight.sum()
    if group:
        total = mean_over(total, group)
    return loss.sum() / torch.where(total > 0, total, 1)
