"""Adds the vectors of the modalities: the baseline that has nothing to learn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.fusions._absent import blanked
from zoo.registry import register


@register("fusion", "sum", joints=("combine",))
class Sum(nn.Module):
    """Sum of the vectors that are there.

    Args:
        names: The modalities.
        dim: Width of every vector; the sum has it too.
    """

    def __init__(self, names: list[str], dim: int) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, D)} and {name: (B,) bool} to (B, D)."""
        return torch.stack(blanked(x, present, self.names)).sum(0)
