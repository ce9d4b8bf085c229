"""OGM-GE: the modality that is ahead learns slower, by how far it is ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.config import Positive
from zoo.joints import Phase
from zoo.registry import register
from zoo.types import Batch, Loss

_ROUNDING = 1e-6  # the coefficient jumps at 1, where rounding alone must not make one lead


@register(
    "fusion",
    "ogm_ge",
    joints={"schedule": None, "combine": "late"},
    needs=("logits",),
    paper="Peng et al., Balanced multimodal learning via on-the-fly gradient modulation, 2022, https://arxiv.org/abs/2203.15332",
)
class OgmGe(nn.Module):
    """Joint training; an encoder's gradient is multiplied by 1 - tanh(alpha rho) where its modality is rho > 1 times as sure of the class.

    The paper has two modalities, and modulates convolutions alone. Here rho is a modality's mean probability of the right class over the
    mean of the others', for any number of them, and all parameters of an encoder are modulated, so that transformers are too. As in the
    paper, noise falls on every encoder, slowed or not. Its logits are the sum of the modalities'; those of `late` are their mean.

    Args:
        names: The modalities.
        dim: Width of the features.
        classes: K.
        alpha: How hard; 0: not at all.
        noise: Add to each gradient of an encoder Gaussian noise as wide as it was before it was slowed, the paper's generalisation
            enhancement.
        until: Steps from the first on in which any of this happens; None: all. The released code stops after half of them.
    """

    multi_phase = False
    steps: Tensor  # () int64, made so far

    def __init__(
        self,
        names: Sequence[str],
        dim: int,
        classes: int,
        *,
        alpha: Annotated[float, Field(ge=0)] = 0.5,
        noise: bool = True,
        until: Positive | None = None,
    ) -> None:
        super().__init__()
        self.names, self.alpha, self.noise, self.until = tuple(names), alpha, noise, until
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The batch as it is."""
        yield Phase("joint", batch)

    def coefficients(self, loss: Loss, targets: Tensor) -> dict[str, float]:
        """{modality: 0..1} for every modality that any row of the batch has."""
        out = loss.output
        assert out is not None, "the objective hands over the model's output"
        sure = {
            name: float(out.logits[name][there].softmax(-1).gather(1, targets[there, None]).mean())
            for name in self.names
            if bool((there := out.present[name]).any())
        }
        others = {name: sum(s for other, s in sure.items() if other != name) / max(len(sure) - 1, 1) for name in sure}
        ratio = {name: s / max(others[name], 1e-8) if len(sure) > 1 else 1.0 for name, s in sure.items()}
        return {name: 1 - math.tanh(self.alpha * rho) if rho > 1 + _ROUNDING else 1.0 for name, rho in ratio.items()}

    @torch.no_grad()
    def before_step(self, model: Any, phase: Phase, loss: Loss) -> None:
        """Scale the encoders' gradients, and make them noisy."""
        self.steps += 1
        if self.until is not None and int(self.steps) > self.until:
            return
        assert phase.batch.targets is not None, "rows of known class"
        for name, k in self.coefficients(loss, phase.batch.targets).items():
            for gradient in (p.grad for p in model.encoders[name].parameters() if p.grad is not None):
                noise = torch.randn_like(gradient) * gradient.std() if self.noise and gradient.numel() > 1 else torch.zeros_like(gradient)
                gradient.mul_(k).add_(noise)
