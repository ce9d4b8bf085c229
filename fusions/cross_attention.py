"""A picture enters through cross-attention: its tokens are keys and values, and never stand in the sequence."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from zoo.errors import ZooError
from zoo.registry import register


@register(
    "fusion",
    "cross_attention",
    joints=("trunk",),
    needs=("memory",),
    paper="Li et al., Align before fuse, 2021, https://arxiv.org/abs/2107.07651",
)
class CrossAttention:
    """Text reads the picture by cross-attention, in the blocks from one on.

    ALBEF's blocks read in the upper half, BLIP's (Li et al., 2022, https://arxiv.org/abs/2201.12086) all, CoCa's (Yu et al., 2022,
    https://arxiv.org/abs/2205.01917) in the half that writes captions.

    Args:
        layers: How many blocks.
        first: The first that reads, where ``from_layer`` says nothing.
        from_layer: The first block that reads, counted from 0; None: as in the model's paper.

    Raises:
        ZooError: If there is no such block.
    """

    banks: tuple[str, ...] = ()

    def __init__(self, layers: int, first: int, *, from_layer: Annotated[int, Field(ge=0)] | None = None) -> None:
        self.first = first if from_layer is None else from_layer
        if not 0 <= self.first < layers:
            raise ZooError(f"fusion 'cross_attention': from_layer {self.first} is none of the {layers} blocks: write 0 to {layers - 1}")

    def __call__(self, kind: str, layer: int, fused: bool = False) -> str:
        """Tokens are served by the expert of their own kind."""
        return kind

    def reads(self, layer: int) -> bool:
        """Whether block ``layer``, counted from 0, has cross-attention."""
        return layer >= self.first
