"""Cross-entropy of classes, on the fused logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import Fraction
from zoo.errors import ZooError
from zoo.joints import Supplementing
from zoo.registry import register
from zoo.types import Batch, Loss, ModelOutput


@register("objective", "cross_entropy")
class CrossEntropy(nn.Module):
    """The mean over rows that have anything of -log softmax(logits)[class], plus what the model's schedule adds.

    Args:
        label_smoothing: In [0, 1).
    """

    def __init__(self, *, label_smoothing: Fraction = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, model: Any, batch: Batch) -> Loss:
        """Loss of a labelled batch.

        Raises:
            ZooError: If the batch has no classes.
        """
        if batch.targets is None:
            raise ZooError("cross_entropy needs rows of known class: write a data set of labelled rows")
        out: ModelOutput = model(batch)
        anyone = torch.stack(list(out.present.values())).any(0)
        rows = F.cross_entropy(out.logits["fused"].float(), batch.targets, reduction="none", label_smoothing=self.label_smoothing)  # (B,)
        losses = {"fused": rows.masked_fill(~anyone, 0).sum() / anyone.sum().clamp(min=1)}
        if isinstance(model.schedule, Supplementing):
            losses |= model.schedule.terms(out, batch.targets)
        return Loss(torch.stack(list(losses.values())).sum(), {name: x.detach() for name, x in losses.items()}, output=_detached(out))


def _detached(out: ModelOutput) -> ModelOutput:
    def plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach() for name, x in named.items()}

    return ModelOutput(plain(out.embeddings), present=dict(out.present), logits=plain(out.logits))
