"""Logits of the modalities weighted by how sure each is, row by row: MLA's fusion at test time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zoo.fusions._absent import blank
from zoo.registry import register


@register(
    "fusion",
    "uncertainty",
    joints=("combine",),
    needs=("logits",),
    paper="Zhang et al., Multimodal representation learning by alternating unimodal adaptation, 2024, https://arxiv.org/abs/2311.10707",
)
class Uncertainty(nn.Module):
    """sum_m w_m l_m with w = softmax(-e) over the modalities that a row has, e_m the entropy of softmax(l_m) in nats.

    The released code takes its softmax over the batch and sums entropies over it, so that one modality takes nearly all and a row's
    result depends on its company; the paper means rows. Entropy says "this row is hard for this modality" only of calibrated logits:
    each modality's are divided by its temperature first, which `calibrate` fits on validation rows.

    Args:
        names: The modalities.
        dim: K, the classes.
        weigh: Off: all modalities that are there weigh the same.
    """

    log_temperature: Tensor  # (M,)

    def __init__(self, names: Sequence[str], dim: int, *, weigh: bool = True) -> None:
        super().__init__()
        self.names, self.weigh = list(names), weigh
        self.register_buffer("log_temperature", torch.zeros(len(self.names)))

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, K)} and {name: (B,) bool} to (B, K); zeros, every class the same, for a row that has nothing."""
        weights = self.shares(x, present)
        return torch.stack([weights[n] * blank(x[n], present[n]) / t for n, t in zip(self.names, self._temperatures(), strict=True)]).sum(0)

    def shares(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: (B, K)} in 0..1: the weight of each modality, exactly 0 where it is absent, else they sum to 1."""
        scores = torch.stack(
            [self._score(blank(x[n], present[n]) / t) for n, t in zip(self.names, self._temperatures(), strict=True)]
        )  # (M, B)
        there = torch.stack([present[name] for name in self.names])  # (M, B)
        scores = scores.masked_fill(~there, -torch.inf).masked_fill(~there.any(0), 0)
        weights = scores.softmax(0).masked_fill(~there, 0)
        return {name: w[:, None].expand_as(x[name]) for name, w in zip(self.names, weights, strict=True)}

    def _score(self, logits: Tensor) -> Tensor:
        """(B, K) to (B,)."""
        if not self.weigh:
            return logits.new_zeros(len(logits))
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1)  # -entropy; exp(log p) is 0 before log p could be infinite

    def _temperatures(self) -> list[Tensor]:
        return list(self.log_temperature.exp())
