"""Logits of the modalities weighted by how sure each is, row by row: MLA's fusion at test time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.fusions._weights import Weighted
from zoo.registry import register


@register(
    "fusion",
    "uncertainty",
    joints=("combine",),
    needs=("logits",),
    paper="Zhang et al., Multimodal representation learning by alternating unimodal adaptation, 2024, https://arxiv.org/abs/2311.10707",
)
def uncertainty(names: Sequence[str], dim: int) -> Weighted:
    """sum_m w_m l_m with w = softmax(-e) over the modalities that a row has, e_m the entropy of softmax(l_m) in nats.

    The released code takes its softmax over the batch and sums entropies over it, so that one modality takes nearly all and a row's
    result depends on its company; the paper means rows. Entropy says "this row is hard for this modality" only of calibrated logits:
    each modality's are divided by its temperature first, which `calibrate` fits on validation rows. The same with equal weights: ``late``.

    Args:
        names: The modalities.
        dim: K, the classes.
    """
    return Weighted(names, negative_entropy)


def negative_entropy(logits: Tensor) -> Tensor:
    """(B, K) to (B,) in -log K..0."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)  # exp(log p) is 0 before log p could be infinite
