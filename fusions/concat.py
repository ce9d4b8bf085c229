"""One linear map over the vectors side by side: the plain baseline of late fusion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.fusions._absent import blank, blanked
from zoo.registry import register


@register("fusion", "concat", joints=("combine",))
class Concat(nn.Module):
    """Linear(n D, D) over the vectors side by side; an absent one stands there as zeros.

    Args:
        names: The modalities, in the order in which their vectors are laid.
        dim: D, width of every vector and of the result.
        bias: Whether the map has one.
    """

    def __init__(self, names: list[str], dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.names = names
        self.project = nn.Linear(len(names) * dim, dim, bias=bias)

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, D)} and {name: (B,) bool} to (B, D)."""
        mixed = self.project(torch.cat(blanked(x, present, self.names), dim=1))  # (B, D)
        anyone = torch.stack([present[name] for name in self.names]).any(0)
        return blank(mixed, anyone)
