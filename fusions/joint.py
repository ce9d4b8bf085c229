"""Ordinary training: one batch, one update, all modalities together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from zoo.joints import Phase
from zoo.registry import register
from zoo.types import Batch, Loss


@register("fusion", "joint", joints=("schedule",))
class Joint(nn.Module):
    """One phase a batch, in which every modality takes part."""

    multi_phase = False
    merges = False

    def __init__(self, names: Sequence[str], dim: int, classes: int) -> None:
        super().__init__()

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The batch as it is."""
        yield Phase("joint", batch)

    def before_step(self, model: nn.Module, phase: Phase, loss: Loss) -> None:
        """Leaves the gradients alone."""

    def after_step(self, model: nn.Module, phase: Phase, previous: Mapping[str, Tensor], loss: Loss) -> None:
        """Leaves the parameters alone."""

    def merge(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The one phase's gradient."""
        (only,) = gradients.values()
        return only

    def watched(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Needs none of the parameters as they were."""
        return {}
