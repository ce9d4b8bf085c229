"""Alternating unimodal adaptation: encoders of their own, one shared head, one modality an update, fused by certainty.

Where paper and released code of MLA differ, and what stands here:

- The code's gradient modification never runs (it looks for a parameter of another name), and its gain divides by a matrix where the
  paper's has a scalar. Here it is the paper's, with the scalar, without the code's rescaling of P.
- The code tells P of the current modality before it filters that modality's own gradient. Here P knows only what came before, as in
  the paper.
- P is told of means of batches, as in the code, where the paper takes a mean over all of a modality's data. The code's alpha falls from 0.1
  to 0.01 within each epoch; here it is constant, so that P has a closed form.
- The code filters the gradient; momentum and weight decay then pass by the filter. Here the update is projected, after the optimizer
  made it.
- The code forwards all encoders, then steps M times. Here a phase sees one modality: the others have no gradient and do not move, and rows
  without the modality take no part.
- The bias of the head is not protected in either; ``bias: protected`` treats it as one more feature that is always 1.
- The code's entropies are summed over the batch. See `zoo.fusions.uncertainty`.

No benefit of the projection has been shown by others or by us on complete modalities; ``remember: null`` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.config import Fraction, Positive
from zoo.errors import ZooError
from zoo.fusions._phases import alone
from zoo.joints import Phase
from zoo.projection import OtherClasses, OtherMeans, PreviousMeans
from zoo.registry import register
from zoo.types import Batch, Loss

Above = Annotated[float, Field(gt=0)]


@register(
    "fusion",
    "mla",
    joints={"schedule": None, "combine": "uncertainty"},
    needs=("logits", "head"),
    paper="Zhang et al., Multimodal representation learning by alternating unimodal adaptation, 2024, https://arxiv.org/abs/2311.10707",
)
class Mla(nn.Module):
    """One update for each modality that a batch has, with the shared head's step kept off what it remembers of the others.

    Args:
        names: The modalities.
        dim: D, width of the features that the head reads.
        classes: K.
        remember: ``previous``: the means of all batches before, as in the paper; ``others``: those of the other modalities alone;
            ``classes``: the means of the other modalities' classes, within ``rank``; None: nothing, the head's steps are free.
        alpha: Of the projection of means: smaller projects harder.
        rank: Of ``classes``.
        decay: Of the running means of ``classes``.
        bias: ``free``, or ``protected`` together with the weight.
        order: The modalities in the order of their updates; None: as they stand in the model.
    """

    multi_phase = True

    def __init__(
        self,
        names: Sequence[str],
        dim: int,
        classes: int,
        *,
        remember: Literal["previous", "others", "classes"] | None = "previous",
        alpha: Above = 0.1,
        rank: Positive = 8,
        decay: Fraction = 0.9,
        bias: Literal["free", "protected"] = "free",
        order: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        if order is not None and sorted(order) != sorted(names):
            raise ZooError(f"mla: order {list(order)} must name each modality once: {', '.join(names)}")
        self.order, self.bias = tuple(order or names), bias
        width = dim + (bias == "protected")
        made = {
            "previous": lambda: PreviousMeans(names, width, alpha),
            "others": lambda: OtherMeans(names, width, alpha),
            "classes": lambda: OtherClasses(names, width, classes, rank, decay),
        }
        self.memory: Any = None if remember is None else made[remember]()

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The rows that have it, for each modality that any row has."""
        return alone(batch, self.order)

    def watched(self, model: Any) -> Mapping[str, Tensor]:
        """The head, where its step is to be projected."""
        return {} if self.memory is None else dict(model.head.named_parameters())

    @torch.no_grad()
    def after_step(self, model: Any, phase: Phase, previous: Mapping[str, Tensor], loss: Loss) -> None:
        """Project the step that the head just made, then remember the features that it was made from."""
        if self.memory is None:
            return
        assert loss.output is not None, "the objective hands over the model's output"
        head, features = model.head, loss.output.embeddings[phase.name]  # (B, D)
        protects_bias = self.bias == "protected"
        step = head.weight - previous["weight"]  # (K, D)
        if protects_bias:
            step = torch.cat([step, (head.bias - previous["bias"])[:, None]], dim=1)
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        step = self.memory.protect(phase.name, step)
        head.weight.copy_(previous["weight"] + step[:, : head.in_features])
        if protects_bias:
            head.bias.copy_(previous["bias"] + step[:, -1])
        self.memory.remember(phase.name, features, phase.batch.targets)
