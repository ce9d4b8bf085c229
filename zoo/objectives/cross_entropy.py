"""Cross-entropy of classes, on the fused logits."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from zoo.config import Fraction
from zoo.errors import ZooError
from zoo.objectives._labelled import over_rows
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
            ZooError: If the batch has no classes, or says of each class how right it is.
        """
        if batch.targets is None:
            raise ZooError("cross_entropy needs rows of known class: write a data set of labelled rows")
        if batch.targets.is_floating_point():
            raise ZooError(
                "cross_entropy needs one right class a row, and this batch says of each class how right it is: write "
                "objective: binary_cross_entropy, or data.soft: false"
            )
        out: ModelOutput = model(batch)
        rows = F.cross_entropy(out.logits["fused"].float(), batch.targets, reduction="none", label_smoothing=self.label_smoothing)  # (B,)
        return over_rows(model, out, rows, batch.targets)
