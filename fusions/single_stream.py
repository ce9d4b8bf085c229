"""One transformer for all: tokens of text and picture stand in one sequence, and the same layers serve them."""

from __future__ import annotations

from zoo.registry import register


@register(
    "fusion", "single_stream", joints=("trunk",), needs=("sequence",), paper="Kim et al., ViLT, 2021, https://arxiv.org/abs/2102.03334"
)
class SingleStream:
    """No sub-layer is a modality's own, and there is no cross-attention: what `mome` and `multiway` are compared with.

    Args:
        layers: How many blocks.
        first: Not used: all blocks are alike.
    """

    banks: tuple[str, ...] = ()

    def __init__(self, layers: int, first: int) -> None:
        self.layers = layers

    def __call__(self, kind: str, layer: int, fused: bool = False) -> str:
        """All tokens are served alike."""
        return kind

    def reads(self, layer: int) -> bool:
        """No block reads by cross-attention."""
        return False
