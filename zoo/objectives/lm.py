"""Captioning: each word of a text from the words before it and the picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.abilities import Captioning
from zoo.config import Fraction
from zoo.errors import ZooError
from zoo.objectives._shared import Shared, alone, both_there, mean_of, text_of, tokens_of, wide
from zoo.registry import register
from zoo.shown import pairs_alone
from zoo.types import Batch, Loss


@register("objective", "lm", paper="Li et al., BLIP, ICML 2022, https://arxiv.org/abs/2201.12086")
class Lm(nn.Module):
    """Cross entropy of the next word, averaged over the words of the batch; pairs of which one side is absent do not count.

    Args:
        smoothing: Share of the target that is spread evenly over the vocabulary; 0.1 in BLIP, 0 in CoCa.
    """

    needs_twin = False
    learns_from = pairs_alone("lm")

    def __init__(self, *, smoothing: Fraction = 0.1) -> None:
        super().__init__()
        self.smoothing = smoothing

    def bind(self, model: Any) -> None:
        """Check that the model writes captions.

        Raises:
            ZooError: If it does not.
        """
        if not isinstance(model, Captioning):
            raise ZooError("lm learns to write captions, and this model writes none: leave lm out, or write blip, coca or beit_3")

    def forward(self, model: Any, batch: Batch) -> Loss:
        """The loss; no further parts."""
        return alone(self, model, batch)

    def term(self, model: Any, batch: Batch, shared: Shared) -> tuple[Tensor, dict[str, Tensor], Any]:
        """As `zoo.objectives._shared.Term`."""
        seen, read = tokens_of(shared.out, "lm")
        logits, labels = model.caption(text_of(batch, read), shared.out)  # (B, T, V), (B, T)
        labels = labels.masked_fill(~both_there(seen, read)[:, None], -100)
        losses = F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=self.smoothing)
        return mean_of(losses, labels.flatten() != -100), {}, None
