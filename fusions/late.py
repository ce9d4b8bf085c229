"""The mean of the modalities' logits: late fusion with equal weights, the honest baseline of every cleverer one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zoo.calibration import Temperatures
from zoo.registry import register


@register("fusion", "late", joints=("combine",), needs=("logits",))
class Late(nn.Module):
    """Equal weights over the modalities that a row has, of logits over temperatures, which `calibrate` fits.

    With ``shared_head: false`` and joint training it is concatenation of the features with one linear head, up to scale.

    Args:
        names: The modalities.
        dim: K, the classes.
    """

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__()
        self.temperatures = Temperatures(names)

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, K)} and {name: (B,) bool} to (B, K); zeros for a row that has nothing."""
        there = torch.stack([present[name] for name in self.temperatures.names]).sum(0)  # (B,)
        return torch.stack(list(self.temperatures(x, present).values())).sum(0) / there.clamp(min=1)[:, None]

    def calibrate(self, logits: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Tensor) -> dict[str, float]:
        """As `zoo.joints.Calibrating`."""
        return self.temperatures.fit(logits, present, targets)
