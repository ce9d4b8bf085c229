"""Each class told by itself, more or less right, on the fused logits: the loss of answers that some people gave and others did not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.objectives._labelled import over_rows
from zoo.registry import register
from zoo.types import Batch, Loss, ModelOutput


@register("objective", "binary_cross_entropy", paper="Teney et al., Tips and tricks for VQA, 2017, https://arxiv.org/abs/1708.02711")
class BinaryCrossEntropy(nn.Module):
    """The mean over rows that have anything of the sum over classes of the binary cross-entropy of sigmoid(logits) to how right each is.

    That is the mean over rows and classes times the number of classes, as VLMo (Bao et al., 2021, https://arxiv.org/abs/2111.02358) and
    BEiT-3 (Wang et al., 2022, https://arxiv.org/abs/2208.10442) have it. What the model's schedule adds goes by the class that is right
    most. Rows that have one class each are wrong of all others.
    """

    def forward(self, model: Any, batch: Batch) -> Loss:
        """Loss of a batch whose targets are (B, K) in 0..1, or (B,) classes.

        Raises:
            ZooError: If the batch has neither, or the targets are of classes that the model does not tell.
        """
        if batch.targets is None:
            raise ZooError("binary_cross_entropy needs rows of known class: write a data set of labelled rows")
        out: ModelOutput = model(batch)
        logits = out.logits["fused"].float()  # (B, K)
        soft = batch.targets.is_floating_point()
        targets = batch.targets if soft else _one_hot(batch.targets, logits.shape[1])
        if targets.shape != logits.shape:
            raise ZooError(
                f"binary_cross_entropy: the model tells {logits.shape[1]} classes, and the rows say of {targets.shape[1]} how right they "
                f"are: write model.classes: {targets.shape[1]}"
            )
        rows = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").sum(1)  # (B,)
        return over_rows(model, out, rows, batch.targets.argmax(1) if soft else batch.targets)


def _one_hot(classes: Tensor, K: int) -> Tensor:
    """(B,) classes to (B, K)."""
    if len(wrong := classes[(classes < 0) | (classes >= K)]):
        raise ZooError(
            f"binary_cross_entropy: a row is of class {int(wrong[0])}, and the model tells {K}, 0 to {K - 1}: write as many model.classes "
            "as the rows have"
        )
    return F.one_hot(classes, K)
