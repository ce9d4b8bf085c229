"""A transformer over the words of a text, in the base size of the papers on modality balance and in a tiny one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from zoo.config import Positive
from zoo.encoders._words import HashedWords, WordEncoder
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Remote


class Size(NamedTuple):
    """Of a transformer."""

    dim: int
    layers: int
    heads: int
    rows: int
    max_length: int


SIZES = {"base": Size(768, 12, 12, 30_522, 256), "tiny": Size(64, 2, 4, 4096, 128)}  # the rows of BERT's vocabulary


def _remote(settings: Mapping[str, Any]) -> list[Remote]:
    words = settings["tokenizer"]
    return [Remote("tokenizer", words, ("tokenizer.json",))] if isinstance(words, str) else []


@register(
    "encoder",
    "text_transformer",
    paper="Geng et al., Multimodal masked autoencoders learn transferable representations, 2022, https://arxiv.org/abs/2205.14204",
    remote=_remote,
)
def make_text_transformer(
    *,
    arch: Literal["base", "tiny"] = "base",
    tokenizer: str | dict[str, str] | None = None,
    dim: Positive | None = None,
    layers: Positive | None = None,
    heads: Positive | None = None,
    rows: Positive | None = None,
    max_length: Positive | None = None,
) -> WordEncoder:
    """The blocks of a ViT over words, drawn and not pretrained; ``pooled`` is the mean of all tokens, special ones included.

    ``text_transformer:base`` with the tokenizer of BERT is as large as the text's side of M3AE, of which MLA (Zhang et al., 2024,
    https://arxiv.org/abs/2311.10707) takes the weights: 768 wide, 12 blocks, 30522 words, 256 tokens. BERT itself, which norms after
    each block, is ``hf:<folder>``.

    Args:
        arch: A size by name.
        tokenizer: Repository or folder of one that transformers can read; a mapping is one that was saved along with weights. None:
            words are hashed to rows of the table, as `tiny_text` does, and no class token is added.
        dim: Width of the tokens; None: that of ``arch``, as of all that follow.
        layers: Attention blocks.
        heads: Of each block; they divide ``dim``.
        rows: Of the table of word embeddings where words are hashed; a tokenizer says it itself.
        max_length: Tokens; longer texts are cut.

    Raises:
        ZooError: If the settings do not fit, or the tokenizer cannot be had.
    """
    size = SIZES[arch]
    dim, layers, heads = dim or size.dim, layers or size.layers, heads or size.heads
    most = max_length or size.max_length
    if dim % heads:
        raise ZooError(f"text_transformer: dim {dim} must be a multiple of heads {heads}")
    if tokenizer is None:
        rows = rows or size.rows
        if rows < 3:
            raise ZooError(f"text_transformer: {rows} rows hold no words: write 3 or more")
        return WordEncoder(HashedWords(rows, most), dim=dim, layers=layers, heads=heads, rows=rows, max_length=most)
    if rows is not None:
        raise ZooError(f"text_transformer: rows {rows} goes with hashed words; the tokenizer says how many it has: leave one of them out")
    from zoo.encoders._hf_text import HfTextProcessor  # transformers takes seconds to import, and hashed words do without

    words = HfTextProcessor(tokenizer["serialized"], most) if isinstance(tokenizer, dict) else HfTextProcessor.fetched(tokenizer, most)
    kept = {"tokenizer": {"serialized": words.serialized()}}
    return WordEncoder(words, dim=dim, layers=layers, heads=heads, rows=words.rows, max_length=most, portable=kept)
