"""Joint training with a loss of each modality alone beside: at small scale as good as any method that balances modalities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from zoo.fusions._phases import alone, summed
from zoo.joints import Phase
from zoo.registry import register
from zoo.types import Batch

JOINT = "joint"


@register("fusion", "joint_aux", joints=("schedule",), needs=("classes",))
class JointAux(nn.Module):
    """The gradient of the joint loss plus ``weight`` times that of each modality shown alone, in one update.

    A modality alone goes through the model as a row that lacks the others does, so nothing but the model itself is needed; each encoder
    runs twice a batch.

    Args:
        names: The modalities.
        dim: Width of the features.
        classes: K.
        weight: Of each modality's own loss.
    """

    multi_phase = True

    def __init__(self, names: Sequence[str], dim: int, classes: int, *, weight: Annotated[float, Field(ge=0)] = 1.0) -> None:
        super().__init__()
        self.names, self.weight = tuple(names), weight

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The batch as it is, then each modality's rows with nothing else of them."""
        yield Phase(JOINT, batch)
        yield from alone(batch, self.names)

    def merge(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The weighted sum over the phases."""
        alone = [{p: self.weight * g for p, g in own.items()} for name, own in gradients.items() if name != JOINT]
        return summed([gradients[JOINT], *alone])
