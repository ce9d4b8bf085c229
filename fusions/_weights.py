"""Weights of the modalities, row by row, of which absent ones have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zoo.calibration import Temperatures


class Weighted(nn.Module):
    """Logits over their temperatures, weighted by a score of each row's.

    Args:
        names: The modalities.
        score: Logits (B, K) of one modality to scores (B,); a row's weights are the softmax of its scores over the modalities it has.
    """

    def __init__(self, names: Sequence[str], score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.temperatures, self.score = Temperatures(names), score

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, K)} and {name: (B,) bool} to (B, K); zeros, every class the same, for a row that has nothing."""
        logits = self.temperatures(x, present)
        return mixed(self._weights(logits, present), logits)

    def shares(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `zoo.joints.Sharing`: the weight of each modality, the same for every class."""
        logits = self.temperatures(x, present)
        return spread(self._weights(logits, present), logits)

    def calibrate(self, logits: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Tensor) -> dict[str, float]:
        """As `zoo.joints.Calibrating`."""
        return self.temperatures.fit(logits, present, targets)

    def _weights(self, logits: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return weights_of({name: self.score(x) for name, x in logits.items()}, present)


def weights_of(scores: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """softmax of scores {name: (B,)} over the modalities that a row has: {name: (B,)}, exactly 0 where absent, else they sum to 1."""
    there = torch.stack([present[name] for name in scores])  # (M, B)
    known = torch.stack(list(scores.values())).masked_fill(~there, -torch.inf)  # (M, B)
    weights = known.masked_fill(~there.any(0), 0).softmax(0).masked_fill(~there, 0)
    return dict(zip(scores, weights, strict=True))


def mixed(weights: Mapping[str, Tensor], logits: Mapping[str, Tensor]) -> Tensor:
    """{name: (B,)} times {name: (B, K)}, summed to (B, K)."""
    return torch.stack([w[:, None] * logits[name] for name, w in weights.items()]).sum(0)


def spread(weights: Mapping[str, Tensor], logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: (B,)} as {name: (B, K)}."""
    return {name: w[:, None].expand_as(logits[name]) for name, w in weights.items()}
