"""Logits of the modalities weighted by what each was worth on validation rows: one weight a modality, the same for every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.calibration import Temperatures
from zoo.fusions._weights import mixed, spread, weights_of
from zoo.registry import register

_ROUNDS = 200


@register("fusion", "learned", joints=("combine",), needs=("logits",))
class Learned(nn.Module):
    """sum_m w_m l_m / sum_m w_m over the modalities that a row has, w_m > 0; until `calibrate` has fitted them, the weights are equal.

    Entropy or energy tell that this row is hard for a modality; they cannot tell that a modality is the weaker one in general. This
    is that alone. The weights are fitted after the temperatures, by the cross-entropy of the fused logits, in which rows of one modality
    have no say.

    Args:
        names: The modalities.
        dim: K, the classes.
    """

    scores: Tensor  # (M,) float32, logarithms of the weights up to a constant

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__()
        self.temperatures = Temperatures(names)
        self.register_buffer("scores", torch.zeros(len(names)))

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, K)} and {name: (B,) bool} to (B, K); zeros, every class the same, for a row that has nothing."""
        logits = self.temperatures(x, present)
        return mixed(_weights(self.scores, logits, present), logits)

    def shares(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `zoo.joints.Sharing`: the weight of each modality, the same for every class."""
        logits = self.temperatures(x, present)
        return spread(_weights(self.scores, logits, present), logits)

    @torch.no_grad()
    def calibrate(self, logits: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Tensor) -> dict[str, float]:
        """As `zoo.joints.Calibrating`; then the weights, which stay equal where no row has two modalities."""
        found = self.temperatures.fit(logits, present, targets)
        warm = {name: x.cpu().double() for name, x in self.temperatures(logits, present).items()}
        self.scores.copy_(fit_scores(warm, {name: present[name].cpu() for name in warm}, targets.cpu()))
        return found


def fit_scores(logits: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """The scores (M,) whose weights give the fused logits the least cross-entropy; finite, as a weight near 0 has no slope left to follow.

    Args:
        logits: {name: (N, K)} float64.
        present: {name: (N,) bool}.
        targets: (N,) int64 classes.
    """
    scores = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([scores], max_iter=_ROUNDS, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        found = F.cross_entropy(mixed(_weights(scores, logits, present), logits), targets)
        found.backward()
        return found

    search.step(loss)  # with gradients, wherever it is called
    return scores.detach()


def _weights(scores: Tensor, logits: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows = {name: s.to(x.dtype).expand(len(x)) for (name, x), s in zip(logits.items(), scores, strict=True)}
    return weights_of(rows, present)
