"""A transformer over words, and the words that need no vocabulary, for text encoders that are built from settings alone."""

from __future__ import annotations

import re
from typing import Any
from zlib import crc32

import torch
from torch import nn

from zoo.types import ModalityInputs, Processor, Tokens

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_PIECE = re.compile(rf"[{_CJK}]|\d+|[^\W\d_{_CJK}]+|\S")  # a CJK character, a number, a word, a mark


class HashedWords:
    """A text to the rows of an embedding table that its words fall into.

    The hashing trick (Weinberger et al., Feature hashing for large scale multitask learning, 2009,
    https://arxiv.org/abs/0902.2206). Row 0 is padding, row 1 stands for an empty text.

    Args:
        rows: Of the table, at least 3.
        max_length: Longer texts are cut.
    """

    def __init__(self, rows: int, max_length: int) -> None:
        self.rows, self.max_length = rows, max_length

    def __call__(self, thing: Any) -> ModalityInputs:
        """One text."""
        pieces = _PIECE.findall(str(thing).lower())[: self.max_length]
        ids = [2 + crc32(p.encode("utf-8", "replace")) % (self.rows - 2) for p in pieces] or [1]
        return ModalityInputs(torch.tensor(ids))

    def config(self) -> dict[str, Any]:
        """The arguments that make an equal one."""
        return {"rows": self.rows, "max_length": self.max_length}


class WordEncoder(nn.Module):
    """Word embeddings, positions that are learned, pre-norm attention blocks; ``pooled`` is the mean over the real tokens.

    Args:
        processor: Of its texts.
        dim: Width of the tokens.
        layers: Attention blocks.
        heads: Of each block; they divide ``dim``.
        rows: Of the table of word embeddings.
        max_length: Of the longest text.
        portable: What `portable` gives.
    """

    def __init__(
        self, processor: Processor, *, dim: int, layers: int, heads: int, rows: int, max_length: int, portable: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.dim, self.processor, self._portable = dim, processor, portable or {}
        self.words = nn.Embedding(rows, dim)
        self.position = nn.Parameter(torch.randn(1, max_length, dim) * 0.02)
        nn.init.normal_(self.words.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Ids (B, N) and their mask to Tokens."""
        mask = x.mask if x.mask is not None else torch.ones_like(x.values, dtype=torch.bool)
        place = torch.arange(x.values.shape[1], device=x.values.device)  # a slice would write the most tokens into an exported graph
        tokens = self.words(x.values) + self.position[:, place]  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens, src_key_padding_mask=~mask)
        tokens = self.norm(tokens)
        weight = mask[..., None].to(tokens.dtype)
        pooled = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
        return Tokens(tokens, mask, pooled, torch.ones_like(mask[:, 0]))

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network, for weights that come from elsewhere."""
        return dict(self._portable)
