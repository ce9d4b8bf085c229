"""CLIP's objective: the symmetric contrast of two modalities, or of queries and targets."""

from __future__ import annotations

import math

import torch
from torch import nn

from zoo.kernels.contrastive import contrastive_loss
from zoo.objectives._two_sides import check_sides, two_sides
from zoo.registry import register
from zoo.types import Batch, Loss, Model


@register("objective", "infonce", paper="Radford et al., CLIP, ICML 2021, https://arxiv.org/abs/2103.00020")
class Infonce(nn.Module):
    """Mean of two cross entropies: each vector of one side finds its partner on the other, and the reverse.

    The logits are cosines times a learned ``exp(log_scale)``, which the paper clips at 100 and we do not. Unlike there,
    the same item and known positives are never negatives, and a pair of which one side is absent does not count.

    Args:
        on: Two outputs of the model, contrasted row by row; or one, whose queries (first half of a batch of pairs) are
            contrasted with its targets. None: all that the model gives.
        log_scale: Where the learned log-scale starts; the default is a temperature of 0.07.
    """

    def __init__(self, *, on: list[str] | None = None, log_scale: float = math.log(1 / 0.07)) -> None:
        super().__init__()
        self.on = on
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def bind(self, model: Model) -> None:
        """Check ``on`` against the model's outputs.

        Raises:
            ZooError: If they do not fit.
        """
        check_sides("infonce", self.on, model)

    def forward(self, model: Model, batch: Batch) -> Loss:
        """The loss; parts: ``scale``."""
        scale = self.log_scale.exp()
        sides = two_sides("infonce", self.on, model, batch)
        loss = contrastive_loss(**sides._asdict(), scale=scale, normalize=True, validate=False)
        return Loss(loss, {"scale": scale.detach()})
