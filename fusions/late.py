"""The mean of the modalities' logits: late fusion with equal weights, the honest baseline of every cleverer one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zoo.fusions._absent import blanked
from zoo.registry import register


@register("fusion", "late", joints=("combine",), needs=("logits",))
class Late(nn.Module):
    """Equal weights over the modalities that a row has.

    With ``shared_head: false`` and joint training it is concatenation of the features with one linear head, up to scale.

    Args:
        names: The modalities.
        dim: K, the classes.
    """

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__()
        self.names = list(names)

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, K)} and {name: (B,) bool} to (B, K); zeros for a row that has nothing."""
        there = torch.stack([present[name] for name in self.names]).sum(0)  # (B,)
        return torch.stack(blanked(x, present, self.names)).sum(0) / there.clamp(min=1)[:, None]
