"""Cross-entropy of classes, on the fused logits and, if asked, on those of each modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import Fraction
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Batch, Loss, ModelOutput


@register("objective", "cross_entropy")
class CrossEntropy(nn.Module):
    """The mean over rows that have anything of -log softmax(logits)[class].

    Args:
        unimodal: Weight of the mean of the same loss of each modality's own logits, over the rows that have it; 0: none. For models
            that combine logits.
        label_smoothing: In [0, 1).
    """

    def __init__(self, *, unimodal: Annotated[float, Field(ge=0)] = 0.0, label_smoothing: Fraction = 0.0) -> None:
        super().__init__()
        self.unimodal, self.label_smoothing = unimodal, label_smoothing

    def forward(self, model: Any, batch: Batch) -> Loss:
        """Loss of a labelled batch.

        Raises:
            ZooError: If the batch has no classes, or ``unimodal`` is asked of a model without logits of each modality.
        """
        if batch.targets is None:
            raise ZooError("cross_entropy needs rows of known class: write a data set of labelled rows")
        out: ModelOutput = model(batch)
        anyone = torch.stack(list(out.present.values())).any(0)
        total = self._loss(out.logits["fused"], batch.targets, anyone)
        parts = {"fused": total.detach()}
        if self.unimodal:
            own = {name: self._loss(out.logits[name], batch.targets, out.present[name]) for name in self._modalities(out)}
            total = total + self.unimodal * torch.stack(list(own.values())).mean()
            parts |= {name: loss.detach() for name, loss in own.items()}
        return Loss(total, parts, output=_detached(out))

    def _loss(self, logits: Tensor, targets: Tensor, there: Tensor) -> Tensor:
        rows = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=self.label_smoothing)  # (B,)
        return rows.masked_fill(~there, 0).sum() / there.sum().clamp(min=1)

    def _modalities(self, out: ModelOutput) -> list[str]:
        names = [name for name in out.present if name in out.logits]
        if not names:
            raise ZooError(
                "cross_entropy.unimodal: this model combines features, and has no logits of each modality: choose a fusion of logits"
            )
        return names


def _detached(out: ModelOutput) -> ModelOutput:
    def plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach() for name, x in named.items()}

    return ModelOutput(plain(out.embeddings), present=dict(out.present), logits=plain(out.logits))
