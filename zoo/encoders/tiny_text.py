"""A text encoder small enough to train from nothing in seconds: hashed words, then a few attention blocks."""

from __future__ import annotations

from zoo.config import Positive
from zoo.encoders._words import HashedWords, WordEncoder
from zoo.errors import ZooError
from zoo.registry import register


@register("encoder", "tiny_text")
def make_tiny_text(
    *, dim: Positive = 64, layers: int = 2, heads: Positive = 4, rows: Positive = 4096, max_length: Positive = 128
) -> WordEncoder:
    """Hashed word embeddings and transformer blocks; ``pooled`` is the mean over the real tokens.

    Args:
        dim: Width of the tokens.
        layers: Attention blocks.
        heads: Of each block; they divide ``dim``.
        rows: Of the table of word embeddings.
        max_length: Longer texts are cut.

    Raises:
        ZooError: If ``heads`` do not divide ``dim``, or there are fewer than 3 rows.
    """
    if dim % heads or rows < 3:
        raise ZooError(f"tiny_text: dim {dim} must be a multiple of heads {heads}, and rows {rows} at least 3")
    return WordEncoder(HashedWords(rows, max_length), dim=dim, layers=layers, heads=heads, rows=rows, max_length=max_length)
