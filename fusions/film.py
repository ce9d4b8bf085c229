"""FiLM: the other modalities scale and shift the features of the first."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from zoo.fusions._absent import blank, blanked
from zoo.registry import register


@register("fusion", "film", joints=("combine",), paper="Perez et al., FiLM, AAAI 2018, https://arxiv.org/abs/1709.07871")
class Film(nn.Module):
    """(1 + scale) * first + shift, where scale and shift are the sums of what each other modality predicts linearly.

    The paper conditions feature maps of a network on one other input; here one vector is conditioned on any number, and the
    scale is predicted as a difference from 1, so that a modality that is absent changes nothing. Where the first is absent, the shift
    of the others is all there is.

    Args:
        names: The modalities; the first is modulated by the others.
        dim: D, width of every vector and of the result.
    """

    def __init__(self, names: list[str], dim: int) -> None:
        super().__init__()
        self.names = names
        self.conditions = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in names[1:])

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, D)} and {name: (B,) bool} to (B, D)."""
        first, *others = blanked(x, present, self.names)
        mixed = first
        for name, other, condition in zip(self.names[1:], others, self.conditions, strict=True):
            scale, shift = blank(condition(other), present[name]).chunk(2, dim=1)  # (B, D) each
            mixed = mixed + scale * first + shift
        return mixed
