"""What writes, word by word, of what it sees: BLIP's captions, and its answers to questions by a decoder of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.models._bert import Embedding, Size, WordHead, real, run, shape_of
from zoo.trunk import Cache, Trunk
from zoo.types import ModalityInputs, ModelOutput, Tokens

IGNORED = -100  # a label that no loss counts


class Answerer(nn.Module):
    """A BERT that writes the answer to a question from its states. It is `zoo.abilities.Captioning`.

    BLIP's fine-tuning for questions has two whole BERTs (Li et al., 2022, https://arxiv.org/abs/2201.12086): one reads the question beside
    the picture, the other begins as the first one's other use and parts from it. This is the other; what it sees is a question's states,
    so its cross-attention reads what is as wide as texts, whatever pictures are.

    Args:
        rows: Of the table of words.
        size: Of the texts' side.
        pad: The id whose row is not learned here.
        decode: The id that an answer begins with.
    """

    def __init__(self, rows: int, size: Size, *, pad: int, decode: int) -> None:
        super().__init__()
        self.prompt: Sequence[int] = [decode]
        self.room = size.places
        self.embed = Embedding(rows, size.places, size.width, pad=pad, typed=False, dropout=size.dropout, init=size.init)
        self.trunk = Trunk(shape_of(size, size.width), size.layers, cross_layers=range(size.layers))
        self.head = WordHead(rows, size.width, size.init)

    def caption(self, text: ModalityInputs, out: ModelOutput) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the next words of answers, and which they are (B, T); ``out.tokens["image"]`` is what `Blip.ask` gives."""
        return spoken(self.embed, self.trunk, self.head, self.prompt, text, out.tokens["image"])

    def next_words(self, ids: Tensor, seen: Tokens, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits (B, V) of the word after ids (B, T), which go on from what the cache holds; and the new cache."""
        return following(self.embed, self.trunk, self.head, ids, seen, cache)


def spoken(
    embed: Embedding, trunk: Trunk, head: WordHead, prompt: Sequence[int], text: ModalityInputs, seen: Tokens
) -> tuple[Tensor, Tensor]:
    """Every word of texts at once, each from those before it and from what is seen.

    Args:
        embed: Ids to vectors.
        trunk: Its route ``decode``, where it has several.
        head: Vectors to words.
        prompt: Ids in the place of the one that opens a text.
        text: (B, N).
        seen: (B, M, Dm).

    Returns:
        (B, T, V) logits and (B, T) labels: -100 for the prompt, for what is not there, and of rows that see nothing.
    """
    mask = real(text)
    begins = torch.tensor([*prompt], device=text.values.device).expand(len(mask), -1)
    ids = torch.cat([begins, text.values[:, 1:]], 1)  # (B, T + 1): the id that opened the text makes room
    mask = torch.cat([mask[:, :1].expand_as(begins), mask[:, 1:]], 1)
    labels = ids.masked_fill(~(mask & seen.present[:, None]), IGNORED)
    labels[:, : len(prompt)] = IGNORED
    how = {"route": "decode", "fused": True, "attend": "causal", "memory": seen.tokens, "memory_mask": seen.mask}
    hidden = run(trunk, embed(ids[:, :-1]), mask[:, :-1], **how)
    return head(hidden, embed.words), labels[:, 1:]  # (B, T, V), (B, T)


def following(embed: Embedding, trunk: Trunk, head: WordHead, ids: Tensor, seen: Tokens, cache: Cache | None) -> tuple[Tensor, Cache]:
    """The word after ids (B, T), which go on from what the cache holds: (B, V) logits, and the new cache."""
    kept = cache or Cache()
    x = embed(ids, kept.length)  # (B, T, D)
    found = trunk(x, route="decode", fused=True, attend="causal", memory=seen.tokens, memory_mask=seen.mask, cache=kept)
    assert isinstance(found, tuple)
    hidden, after = found
    return head(hidden[:, -1], embed.words), after
