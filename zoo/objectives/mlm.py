"""Masked words: some words of a text are hidden, and the model fills them in from the others and the picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.abilities import Unmasking
from zoo.config import Fraction
from zoo.errors import ZooError
from zoo.momentum import SoftTarget
from zoo.objectives._shared import Shared, alone, both_there, text_of, tokens_of, wide
from zoo.registry import register
from zoo.shown import pairs_alone
from zoo.types import Batch, Loss
from zoo.word_masks import choose, hide


@register("objective", "mlm", paper="Li et al., ALBEF, NeurIPS 2021, https://arxiv.org/abs/2107.07651")
class Mlm(nn.Module):
    """Mean cross entropy of the words that BERT's masking chose (Devlin et al., NAACL 2019, https://arxiv.org/abs/1810.04805).

    Of the chosen words 80 % become the mask, 10 % any word of the vocabulary, 10 % stay. Special ids are never chosen, nor are words that
    the vocabulary lacks, nor those of a row without a picture. Beside a momentum twin ``alpha`` of the target is what the twin says of the
    same masked text and its own view of the picture. ALBEF's code may choose a [SEP]; its tokenizer writes none.

    Args:
        rate: Share of the words that are chosen, each on its own.
        whole_words: All pieces of a word are chosen together, each then masked, replaced or left on its own, as in BERT.
        alpha: Share of the target that is the twin's, 0.4 in ALBEF.
        ramp: Optimizer steps over which this share rises from 0: those of the first epoch in ALBEF.

    Raises:
        ZooError: If ``ramp`` is below 0, or ``rate`` is 0.
    """

    learns_from = pairs_alone("mlm")

    def __init__(self, *, rate: Fraction = 0.15, whole_words: bool = False, alpha: Fraction = 0.0, ramp: int = 0) -> None:
        super().__init__()
        if ramp < 0 or rate == 0:
            raise ZooError(f"mlm: ramp is a count and rate above 0, not {ramp} and {rate}: write ramp: 0, rate: 0.15")
        self.rate, self.whole_words = rate, whole_words
        self.soft = SoftTarget(alpha, ramp)

    @property
    def needs_twin(self) -> bool:
        """Soft targets come from one."""
        return self.soft.alpha > 0

    def bind(self, model: Any) -> None:
        """Check that the model fills in words.

        Raises:
            ZooError: If it does not, or its vocabulary has no mask.
        """
        if not isinstance(model, Unmasking):
            raise ZooError("mlm hides words for the model to fill in, and this one fills in none: leave mlm out")
        if model.vocabulary.roles["mask"] is None:  # type: ignore[attr-defined]
            raise ZooError("mlm hides words behind a mask, and this model's vocabulary has none: write another model.vocabulary")

    def forward(self, model: Any, batch: Batch) -> Loss:
        """The loss; parts: ``filled``, the share of the chosen words that was found, and with soft targets ``alpha``.

        Raises:
            ZooError: If it needs a twin.
        """
        return alone(self, model, batch)

    def term(self, model: Any, batch: Batch, shared: Shared) -> tuple[Tensor, dict[str, Tensor], Any]:
        """As `zoo.objectives._shared.Term`.

        Raises:
            ZooError: If it needs a twin and there is none.
        """
        seen, read = tokens_of(shared.out, "mlm")
        text = text_of(batch, read)
        chosen = choose(text, model.vocabulary, self.rate, self.whole_words) & both_there(seen, read)[:, None]
        masked = text._replace(values=hide(text.values, chosen, model.vocabulary))
        logits, words = wide(model.unmask(masked, seen, chosen)), text.values[chosen]  # (n, V) of the chosen words alone, (n,)
        of = max(len(words), 1)
        loss = F.cross_entropy(logits, words, reduction="sum") / of
        parts = {"filled": (logits.argmax(1) == words).to(logits.dtype).sum().detach() / of}
        if self.needs_twin:
            if shared.teacher is None:
                raise ZooError(
                    "mlm: alpha needs a momentum twin: write objective: {name: together, of: [...], momentum: 0.995} around it, or alpha: 0"
                )
            with torch.no_grad():
                taught = wide(shared.twin.unmask(masked, shared.teacher.tokens["image"], chosen)).softmax(1)
            soft = -(taught * logits.log_softmax(1)).sum() / of
            loss = (1 - self.soft.share) * loss + self.soft.share * soft
            parts["alpha"] = loss.new_tensor(self.soft.share)
        return loss, parts, None

    def before_step(self, model: Any) -> None:
        """Nothing: the state moves behind the optimizer."""

    def after_step(self, model: Any, state: Any) -> None:
        """Raise alpha."""
        self.soft.step()
