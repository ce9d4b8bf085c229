"""Matching of pictures and texts: whether the two belong together, asked of pairs that do and of pairs that nearly might."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.abilities import Matching
from zoo.distributed import all_rows, longest, processes
from zoo.errors import ZooError
from zoo.momentum import Negatives, NegativeSampler
from zoo.objectives._shared import Likeness, Shared, alone, both_there, mean_of, rows_of, text_of, tokens_of, unit, wide
from zoo.registry import register
from zoo.shown import pairs_alone
from zoo.types import Batch, Loss, Tokens


class Candidates(NamedTuple):
    """The rows that negatives are drawn from: of this process, or of all, in which case the own ones begin at ``first``."""

    seen: Tokens  # (C, N, D) pictures
    held: Tokens  # (C, N, D) texts
    first: int


@register("objective", "itm", paper="Li et al., ALBEF, NeurIPS 2021, https://arxiv.org/abs/2107.07651")
class Itm(nn.Module):
    """Cross entropy of "belongs together" over 3B pairs: B that do, B pictures with another's text, B texts with another's picture.

    The others are drawn by the softmax of the contrast's logits, so that the hard ones come often (ALBEF); in `together` an `itc` that
    stands before it hands over its own. A row of the same subject (``batch.ids``) or a known positive is never drawn, and a pair of
    which one side is absent, or for which nobody can be drawn, is left out of the mean.

    Args:
        negatives: "sampled": by that softmax. "uniform": all alike, which a small model learns from sooner.
        among: "local": rows of this process. "global": of all that train together, their pictures and texts gathered with gradient (VLMo).
        eps: Added to each probability, 1e-4 in BLIP, so that nobody weighs nothing; 0 in ALBEF.
        temperature: Of the softmax of cosines where no `itc` hands over its logits.

    Raises:
        ZooError: If ``eps`` is below 0, or the temperature not above.
    """

    needs_twin = False
    learns_from = pairs_alone("itm")

    def __init__(
        self,
        *,
        negatives: Negatives = "sampled",
        among: Literal["local", "global"] = "local",
        eps: float = 0.0,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        if eps < 0 or temperature <= 0:
            raise ZooError(f"itm: eps is 0 or more, temperature above 0, not {eps}, {temperature}: write eps: 0.0001, temperature: 0.07")
        self.draw, self.among, self.temperature = NegativeSampler(negatives, eps), among, temperature

    def bind(self, model: Any) -> None:
        """Check that the model tells what belongs together.

        Raises:
            ZooError: If it does not.
        """
        if not isinstance(model, Matching):
            raise ZooError(
                "itm asks the model which pictures and texts belong together, and this one has no answer: leave itm out, or write "
                "albef, blip or vlmo"
            )

    def forward(self, model: Any, batch: Batch) -> Loss:
        """The loss; part: ``matched``, the share of the pairs that was told right."""
        return alone(self, model, batch)

    def term(self, model: Any, batch: Batch, shared: Shared) -> tuple[Tensor, dict[str, Tensor], Any]:
        """As `zoo.objectives._shared.Term`."""
        seen, read = tokens_of(shared.out, "itm")
        there = both_there(seen, read)
        found = self._candidates(seen, model.hold(text_of(batch, read), read))
        row = found.first + torch.arange(len(there), device=there.device)
        to_texts = self.draw(self._logits("image", shared), self._allowed(batch, seen.present, read.present))
        to_images = self.draw(self._logits("text", shared), self._allowed(batch, read.present, seen.present))
        pictures, texts = torch.cat([row, row, to_images.column]), torch.cat([row, to_texts.column, row])
        counted = torch.cat([there, to_texts.found, to_images.found])
        whole = found.first + there.int().argmax()  # in place of a pair that does not count: attention to nothing may be no number
        pictures, texts = torch.where(counted, pictures, whole), torch.where(counted, texts, whole)
        logits = wide(model.match(rows_of(found.held, texts), rows_of(found.seen, pictures)))  # (3B, 2)
        labels = torch.zeros_like(row).new_zeros(len(counted))
        labels[: len(row)] = 1
        told = mean_of((logits.argmax(1) == labels).to(logits.dtype), counted)
        return mean_of(F.cross_entropy(logits, labels, reduction="none"), counted), {"matched": told.detach()}, None

    def _logits(self, name: str, shared: Shared) -> Tensor:
        """(B, C) of the rows of one output to the candidates of the other."""
        likeness = shared.likeness.get(name)
        if likeness is None:
            with torch.no_grad():
                own, other = (unit(shared.out.embeddings[key]) for key in (name, "text" if name == "image" else "image"))
                likeness = Likeness(own, other, own.new_tensor(1 / self.temperature))
        return likeness.logits(all_rows(likeness.columns) if self.among == "global" else None)

    def _allowed(self, batch: Batch, there: Tensor, there_other: Tensor) -> Tensor:
        """(B, C) bool: which candidates may be taken for a row's negative."""
        B, gathers = len(there), self.among == "global"
        first = _first(B) if gathers else 0
        candidates = all_rows(there_other) if gathers else there_other
        allowed = there[:, None] & candidates
        own = torch.arange(B, device=there.device)
        allowed[own, first + own] = False
        if batch.ids is not None:
            allowed &= batch.ids[:, None] != (all_rows(batch.ids) if gathers else batch.ids)
        pairs = [] if batch.known is None else [batch.known]
        if batch.positive is not None:
            pairs.append(torch.stack([own, torch.where(batch.positive >= 0, batch.positive, own)], 1))
        for pair in (*pairs, *(pair.flip(1) for pair in pairs)):
            row, column = pair[:, 0], pair[:, 1] + first
            inside = (row >= 0) & (row < B) & (column >= 0) & (column < len(candidates))
            allowed[torch.where(inside, row, 0), torch.where(inside, column, first)] = False  # or the first with itself
        return allowed

    def _candidates(self, seen: Tokens, held: Tokens) -> Candidates:
        if self.among == "local" or processes() == 1:
            return Candidates(seen, held, 0)
        return Candidates(_gathered(seen), _gathered(held), _first(len(seen.present)))


def _first(B: int) -> int:
    """Where this process's rows begin among those of all."""
    return torch.distributed.get_rank() * B if processes() > 1 else 0


def _gathered(x: Tokens) -> Tokens:
    """The rows of all processes, as long as the longest of them; pooled vectors stay behind."""
    more = longest(x.tokens.shape[1], x.tokens.device) - x.tokens.shape[1]
    tokens, mask = F.pad(x.tokens, (0, 0, 0, more)), F.pad(x.mask, (0, more))
    if torch.is_grad_enabled() and not tokens.requires_grad:  # of pictures that no row here has; others wait for this one's gradient
        tokens = tokens.detach().requires_grad_()
    return Tokens(all_rows(tokens), all_rows(mask), None, all_rows(x.present))
