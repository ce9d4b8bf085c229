"""Logits made as sure as they are right: one temperature a modality, fitted on rows that no weight was fitted on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The positive number that logits are divided by so that their cross-entropy is least, within 0.01 and 100.

    Guo et al., On calibration of modern neural networks, 2017, https://arxiv.org/abs/1706.04599; by golden-section search over its
    logarithm, in which the loss has one valley.

    Args:
        logits: (N, K) finite, of rows that no weight was fitted on; N at least 1.
        targets: (N,) int64 classes.
    """
    x, y = logits.detach().cpu().double(), targets.cpu()

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(x / math.exp(log_t), y))

    low, high = math.log(0.01), math.log(100)
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return math.exp((low + high) / 2)


class Temperatures(nn.Module):
    """One temperature a modality, 1 until it is fitted.

    Args:
        names: The modalities.
    """

    logarithms: Tensor  # (M,) float32

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.register_buffer("logarithms", torch.zeros(len(self.names)))

    def forward(self, logits: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: (B, K)} and {name: (B,) bool} to {name: (B, K)}: each over its temperature; zeros where absent, whatever stood there."""
        warm = zip(self.names, self.logarithms.exp(), strict=True)
        return {name: logits[name].masked_fill(~present[name][:, None], 0) / t.to(logits[name].dtype) for name, t in warm}

    @torch.no_grad()
    def fit(self, logits: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Tensor) -> dict[str, float]:
        """Set them by the rows (N) that have each modality; one that no row has keeps its own, and is not in {name: temperature}."""
        found = {name: fit_temperature(logits[name][there], targets[there]) for name in self.names if bool((there := present[name]).any())}
        for name, temperature in found.items():
            self.logarithms[self.names.index(name)] = math.log(temperature)
        return found
