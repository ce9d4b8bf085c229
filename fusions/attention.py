"""A learned query attends to the modalities: a weight per row and modality that sums to one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.fusions._absent import blanked
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
        there = torch.stack([present[name] for name in self.names], dim=1)  # (B, M)
        scores = vectors @ self.query / math.sqrt(len(self.query))  # (B, M)
        lowest = torch.finfo(scores.dtype).min  # not -inf, which makes NaN of a row where nothing is there
        weights = scores.masked_fill(~there, lowest).softmax(1)
        return (weights[..., None] * vectors).sum(1)
