"""MMPareto: where the joint and a modality's own gradient disagree, an encoder takes the step that helps both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.fusions._phases import alone, summed
from zoo.joints import Phase
from zoo.registry import register
from zoo.types import Batch

JOINT = "joint"


def pareto(joint: Tensor, own: Tensor, boost: float) -> Tensor:
    """Two gradients (P,) to one, ``boost`` times as long as their sum: along it where they agree, else along their shortest mixture.

    Args:
        joint: g1.
        own: g2.
        boost: Of the length.
    """
    if joint @ own >= 0:
        return boost * (joint + own)
    apart = joint - own
    share = (-(own @ apart) / (apart @ apart)).clamp(0, 1)  # of g1 in the shortest mixture
    mixture = share * joint + (1 - share) * own
    return mixture * (boost * (joint + own).norm() / mixture.norm().clamp(min=1e-30))


@register(
    "fusion",
    "mmpareto",
    joints=("schedule",),
    needs=("classes",),
    paper="Wei and Hu, MMPareto: boosting multimodal learning with innocent unimodal assistance, 2024, https://arxiv.org/abs/2405.17730",
)
class MMPareto(nn.Module):
    """Joint loss and each modality's own loss in backward passes of their own; an encoder's two gradients become one by `pareto`.

    Only so can they disagree: gradients read after all backward passes are sums, of which all point the same way. Parameters that no
    encoder holds get the plain sum. A modality's own loss is that of rows that lack the others, as in `joint_aux`; the paper gives each
    a head of its own.

    Args:
        names: The modalities.
        dim: Width of the features.
        classes: K.
        boost: gamma of the paper, by which an encoder's gradient is made longer, whether its two agree or not.
    """

    multi_phase = True

    def __init__(self, names: Sequence[str], dim: int, classes: int, *, boost: Annotated[float, Field(ge=1)] = 1.5) -> None:
        super().__init__()
        self.names, self.boost = tuple(names), boost

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The batch as it is, then each modality's rows with nothing else of them."""
        yield Phase(JOINT, batch)
        yield from alone(batch, self.names)

    def merge(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Encoder by encoder."""
        merged = dict(summed(gradients.values()))
        for name in self.names:
            both = [p for p in gradients.get(name, {}) if f"encoders.{name}." in p and p in gradients[JOINT]]
            if both:
                joint, own = (torch.cat([gradients[phase][p].flatten() for p in both]) for phase in (JOINT, name))
                pieces = pareto(joint, own, self.boost).split([gradients[name][p].numel() for p in both])
                merged |= {p: piece.view_as(gradients[name][p]) for p, piece in zip(both, pieces, strict=True)}
        return merged
