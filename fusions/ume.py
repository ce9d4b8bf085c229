"""Unimodal ensemble: each modality learns alone, and their logits are averaged; what any joint training must beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from zoo.fusions._phases import alone, summed
from zoo.joints import Phase
from zoo.registry import register
from zoo.types import Batch


@register(
    "fusion",
    "ume",
    joints={"schedule": None, "combine": "late"},
    needs=("logits",),
    paper="Du et al., On uni-modal feature learning in supervised multi-modal learning, 2023, https://arxiv.org/abs/2305.01233",
)
class Ume(nn.Module):
    """A loss for each modality on the rows that have it, one update of their sum. With ``shared_head: false`` no parameter is shared.

    Args:
        names: The modalities.
        dim: Width of the features.
        classes: K.
    """

    multi_phase = True

    def __init__(self, names: Sequence[str], dim: int, classes: int) -> None:
        super().__init__()
        self.names = tuple(names)

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The rows that have it, for each modality that any row has."""
        return alone(batch, self.names)

    def merge(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The sum over the phases."""
        return summed(gradients.values())
