"""From a loss for each labelled row to the loss of a batch: what the objectives of classes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.joints import Supplementing
from zoo.types import Loss, ModelOutput


def over_rows(model: Any, out: ModelOutput, rows: Tensor, classes: Tensor) -> Loss:
    """The mean over rows that show anything, plus what the model's schedule adds.

    Args:
        model: Whose schedule is asked.
        out: Of the batch.
        rows: (B,) losses.
        classes: (B,) int64, what the schedule takes for right.
    """
    anyone = torch.stack(list(out.present.values())).any(0)  # (B,)
    losses = {"fused": rows.masked_fill(~anyone, 0).sum() / anyone.sum().clamp(min=1)}
    if isinstance(model.schedule, Supplementing):
        losses |= model.schedule.terms(out, classes)
    return Loss(torch.stack(list(losses.values())).sum(), {name: x.detach() for name, x in losses.items()}, output=_detached(out))


def _detached(out: ModelOutput) -> ModelOutput:
    def plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach() for name, x in named.items()}

    return ModelOutput(plain(out.embeddings), present=dict(out.present), logits=plain(out.logits))
