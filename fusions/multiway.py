"""Every sub-layer exists once per modality; modalities meet in the attention map alone."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from zoo.block import BANKED
from zoo.errors import ZooError
from zoo.registry import register


@register("fusion", "multiway", joints=("trunk",), paper="Wang et al., BEiT-3, 2022, https://arxiv.org/abs/2208.10442")
class Multiway:
    """Norms, projections, feed-forward and the last norm are the modality's own, as in the released base and large models.

    The paper's giant shares its attention and has feed-forwards of pairs in the top three blocks: that is ``mome``.

    Args:
        layers: How many blocks.
        first: The first that reads by cross-attention, in a model that has any, where ``from_layer`` says nothing.
        from_layer: That block, counted from 0; None: as in the model's paper.

    Raises:
        ZooError: If there is no such block.
    """

    banks: tuple[str, ...] = (*BANKED, "norm")

    def __init__(self, layers: int, first: int, *, from_layer: Annotated[int, Field(ge=0)] | None = None) -> None:
        self.first = first if from_layer is None else from_layer
        if not 0 <= self.first <= layers:
            raise ZooError(f"fusion 'multiway': from_layer {self.first} is none of the {layers} blocks: write 0 to {layers}")

    def __call__(self, kind: str, layer: int, fused: bool = False) -> str:
        """Tokens are served by the experts of their own kind."""
        return kind

    def reads(self, layer: int) -> bool:
        """Whether block ``layer``, counted from 0, has cross-attention, in a model that has any."""
        return layer >= self.first
