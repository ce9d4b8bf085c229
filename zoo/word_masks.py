"""Which words of a text are hidden, and what stands in their place: BERT's masking, and one of an exact share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.types import ModalityInputs

HIDDEN, RANDOM = 0.8, 0.1  # of the chosen words: shares that become [MASK], or any word; the rest stay


def words_in(text: ModalityInputs, vocabulary: Any) -> Tensor:
    """(B, N) bool: which of the ids (B, N) are words, neither padding nor special."""
    real = torch.ones_like(text.values, dtype=torch.bool) if text.mask is None else text.mask
    for special in _specials(vocabulary.roles):
        real = real & (text.values != special)
    return real


def choose(text: ModalityInputs, vocabulary: Any, rate: float, whole_words: bool) -> Tensor:
    """(B, N) bool: the words that are to be filled in, drawn by torch's own generator; never padding or a special id.

    Args:
        text: Ids (B, N) with their mask.
        vocabulary: Knows its special ids, and which ids are pieces of one word.
        rate: Of the words, each on its own.
        whole_words: Pieces of a word are chosen together.
    """
    real = words_in(text, vocabulary)
    drawn = torch.rand(text.values.shape, device=text.values.device)
    if whole_words:
        drawn = drawn.gather(1, _first_pieces(text.values, real, vocabulary))
    return real & (drawn < rate)


def choose_share(text: ModalityInputs, vocabulary: Any, rate: float) -> Tensor:
    """(B, N) bool: of each text the same share of its ids, all but the first, what ends it too, as BEiT-3 learns to write captions.

    Args:
        text: Ids (B, N) with their mask.
        vocabulary: Knows which id opens a text.
        rate: Of the real ids, rounded, 1 at least and not all.
    """
    real = torch.ones_like(text.values, dtype=torch.bool) if text.mask is None else text.mask
    open_ = real & (text.values != vocabulary.roles["start"])
    many = (real.sum(1) * rate + 0.5).int().clamp(min=1)
    many = torch.minimum(many, (real.sum(1) - 1).int())
    drawn = torch.rand(text.values.shape, device=text.values.device).masked_fill(~open_, 2)
    return open_ & (drawn.argsort(1).argsort(1) < many[:, None])


def hide(ids: Tensor, chosen: Tensor, vocabulary: Any) -> Tensor:
    """(B, N) ids with those chosen masked, replaced or left, by torch's own generator."""
    fate, anything = torch.rand(ids.shape, device=ids.device), torch.randint_like(ids, vocabulary.own)
    masked = torch.where(chosen & (fate < HIDDEN), vocabulary.roles["mask"], ids)
    return torch.where(chosen & (fate >= HIDDEN) & (fate < HIDDEN + RANDOM), anything, masked)


def _first_pieces(ids: Tensor, real: Tensor, vocabulary: Any) -> Tensor:
    """(B, N) int64: where the word begins that an id is a piece of; each other id where it is."""
    begin = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    for row, (numbers, is_real) in enumerate(zip(ids.tolist(), real.tolist(), strict=True)):
        places = [i for i, here in enumerate(is_real) if here]
        first: dict[int, int] = {}
        for place, word in zip(places, vocabulary.words([numbers[i] for i in places]), strict=True):
            begin[row, place] = first.setdefault(word, place)
    return begin.to(ids.device)


def _specials(roles: Mapping[str, int | None]) -> list[int]:
    return sorted({number for number in roles.values() if number is not None})
