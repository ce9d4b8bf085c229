"""Ordinary training: one batch, one update, all modalities together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from zoo.joints import Phase
from zoo.registry import register
from zoo.types import Batch


@register("fusion", "joint", joints=("schedule",))
class Joint(nn.Module):
    """One phase a batch, in which every modality takes part."""

    multi_phase = False

    def __init__(self, names: Sequence[str], dim: int, classes: int) -> None:
        super().__init__()

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The batch as it is."""
        yield Phase("joint", batch)
