"""Language modelling: every word of a prompt is predicted from what stands before it, an image included."""

from __future__ import annotations

from torch import nn

from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Batch, Loss, Model, Predicting


@register("objective", "next_token", paper="Liu et al., Visual instruction tuning, 2023, https://arxiv.org/abs/2304.08485")
class NextToken(nn.Module):
    """Cross-entropy of the next word, averaged over the words of the batch.

    On prompts without images it pre-trains a language model. With images before the text and the language model frozen, it aligns a
    connector, as in the first stage of LLaVA.
    """

    def bind(self, model: Model) -> None:
        """Check that the model predicts words.

        Raises:
            ZooError: If it does not.
        """
        if not isinstance(model, Predicting):
            raise ZooError(f"next_token needs a model that predicts words, and {type(model).__name__} does not: write another objective")

    def forward(self, model: Predicting, batch: Batch) -> Loss:
        """The mean over all words."""
        logits, words = model.predict(batch)  # (W, V), (W,)
        return Loss(nn.functional.cross_entropy(logits.float(), words), {})
