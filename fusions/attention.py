"""A learned query attends to the modalities: a weight per row and modality that sums to one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.fusions._absent import blank, blanked
from zoo.registry import register


@register("fusion", "attention", joints=("combine",), paper="Yang et al., NAACL 2016, https://aclanthology.org/N16-1174")
class Attention(nn.Module):
    """Weighted mean of the vectors that are there, with weights softmax(<query, x> / sqrt(D)).

    The paper scores a hidden layer of x; we score x itself, which comes out of a learned projection already. The query
    starts at zero, so that training starts at the plain mean.

    Args:
        names: The modalities.
        dim: D, width of every vector and of the result.
    """

    def __init__(self, names: list[str], dim: int) -> None:
        super().__init__()
        self.names = names
        self.query = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, D)} and {name: (B,) bool} to (B, D)."""
        vectors = torch.stack(blanked(x, present, self.names), dim=1)  # (B, M, D)
        return (self._weights(vectors, present)[..., None] * vectors).sum(1)

    def shares(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: (B, D)}: the weight of each vector, the same for every feature."""
        vectors = torch.stack(blanked(x, present, self.names), dim=1)  # (B, M, D)
        weights = self._weights(vectors, present)[..., None].expand_as(vectors)
        return {name: blank(weights[:, i], present[name]) for i, name in enumerate(self.names)}

    def _weights(self, vectors: Tensor, present: Mapping[str, Tensor]) -> Tensor:
        """(B, M), summing to one."""
        there = torch.stack([present[name] for name in self.names], dim=1)  # (B, M)
        scores = vectors @ self.query / math.sqrt(len(self.query))  # (B, M)
        lowest = torch.finfo(scores.dtype).min  # not -inf, which makes NaN of a row where nothing is there
        return scores.masked_fill(~there, lowest).softmax(1)
