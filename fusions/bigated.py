"""Gated fusion in both directions: each modality decides which features of the others pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.fusions._absent import blank
from zoo.registry import register


@register(
    "fusion",
    "bigated",
    joints=("combine",),
    paper="Kiela et al., Efficient Large-Scale Multi-Modal Classification, AAAI 2018, https://arxiv.org/abs/1802.02892",
)
class BiGated(nn.Module):
    """Sum over the modalities of value(x) * sigmoid(sum of the gates of all others).

    Kiela et al. let one modality gate the other. OGM-GE (Peng et al., 2022, https://arxiv.org/abs/2203.15332), among whose
    baselines it is, has to say which of the two is the gate. Here the choice is symmetric: each takes both roles, with a
    map for each, and the order of the names means nothing. A modality that is there alone passes ungated.

    Args:
        names: The modalities.
        dim: D, width of every vector and of the result.
    """

    def __init__(self, names: list[str], dim: int) -> None:
        super().__init__()
        self.names = names
        self.values = nn.ModuleList(nn.Linear(dim, dim) for _ in names)
        self.gates = nn.ModuleList(nn.Linear(dim, dim) for _ in names if len(names) > 1)

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, D)} and {name: (B,) bool} to (B, D)."""
        there = [present[name] for name in self.names]
        vectors = [blank(x[name], here) for name, here in zip(self.names, there, strict=True)]
        values = [blank(value(v), here) for value, v, here in zip(self.values, vectors, there, strict=True)]
        if len(values) == 1:
            return values[0]
        votes = [blank(gate(v), here) for gate, v, here in zip(self.gates, vectors, there, strict=True)]
        mixed = []
        for i, value in enumerate(values):
            others = [j for j in range(len(values)) if j != i]
            passes = torch.sigmoid(torch.stack([votes[j] for j in others]).sum(0))  # (B, D)
            gated = torch.stack([there[j] for j in others]).any(0)
            mixed.append(torch.where(gated[:, None], passes * value, value))
        return torch.stack(mixed).sum(0)
