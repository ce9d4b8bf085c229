"""Mixture of modality experts: attention is shared, a feed-forward is one modality's, and in the upper blocks there is one for pairs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from zoo.errors import ZooError
from zoo.registry import register

PAIR = "vl"  # the expert of pairs


@register("fusion", "mome", joints=("trunk",), paper="Bao et al., VLMo, 2021, https://arxiv.org/abs/2111.02358")
class Mome:
    """Each modality has its own feed-forward and the norm before it; from one block on a pair has one for all of its tokens.

    A modality alone goes through its own experts in all blocks. Where a text reads a picture by cross-attention, as in ALBEF, it is a pair,
    and the first block with the expert of pairs is the first that reads.

    Args:
        layers: How many blocks.
        first: The first with the expert of pairs, where ``from_layer`` says nothing.
        from_layer: That block, counted from 0, up to ``layers`` for none; None: as in the model's paper.

    Raises:
        ZooError: If there is no such block.
    """

    banks: tuple[str, ...] = ("norm2", "ffn")

    def __init__(self, layers: int, first: int, *, from_layer: Annotated[int, Field(ge=0)] | None = None) -> None:
        self.first = first if from_layer is None else from_layer
        if not 0 <= self.first <= layers:
            raise ZooError(f"fusion 'mome': from_layer {self.first} is none of the {layers} blocks: write 0 to {layers}, {layers} for none")

    def __call__(self, kind: str, layer: int, fused: bool = False) -> str:
        """Tokens of a pair above are the pair's, all others their own kind's."""
        return PAIR if fused and layer >= self.first else kind

    def reads(self, layer: int) -> bool:
        """Whether block ``layer``, counted from 0, has cross-attention, in a model that has any."""
        return layer >= self.first
