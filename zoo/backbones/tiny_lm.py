"""A language model small enough to train from nothing in seconds, in the shape of a Llama."""

from __future__ import annotations

from typing import Literal

from transformers import LlamaConfig, LlamaModel

from zoo.backbones._decoder import Decoder, build
from zoo.backbones._tokenizers import ByteTokenizer, WordTokenizer
from zoo.config import Positive
from zoo.errors import ZooError
from zoo.registry import register


@register("backbone", "tiny_lm")
def make_tiny_lm(
    *,
    dim: Positive = 128,
    layers: Positive = 2,
    heads: Positive = 4,
    vocab_size: Positive = 8192,
    tokenizer: Literal["words", "bytes"] = "words",
) -> Decoder:
    """A few Llama layers over hashed words.

    Args:
        dim: Width.
        layers: How many.
        heads: Of each; ``dim`` is an even multiple of them.
        vocab_size: Rows of the embedding; at least 6 for words, 261 for bytes.
        tokenizer: Hashed words make short sequences; bytes keep every letter.

    Raises:
        ZooError: If the sizes do not fit each other.
    """
    if dim % (2 * heads):  # rotary positions turn pairs
        raise ZooError(f"tiny_lm: dim {dim} is no even multiple of heads {heads}")
    chosen = WordTokenizer(vocab_size) if tokenizer == "words" else ByteTokenizer()
    if chosen.vocab_size > vocab_size:
        raise ZooError(f"tiny_lm: {tokenizer} need {chosen.vocab_size} rows: write vocab_size: {chosen.vocab_size} or more")
    config = LlamaConfig(
        hidden_size=dim,
        # a gated unit with as many weights as a plain one of 4 dim; sizes that are no multiple of 64 multiply at half the speed
        intermediate_size=-(-dim * 8 // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
    )
    built = build("tiny_lm", LlamaModel, config, chosen, source=None, dtype="float32", device="cpu")
    return Decoder(built.model, chosen, trained=False, portable={})
