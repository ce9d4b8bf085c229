"""CLIP's objective: the symmetric contrast of two modalities, or of queries and targets."""

from __future__ import annotations

import math

import torch
from torch import nn

from zoo.kernels.contrastive import Impl, Precision
from zoo.objectives._contrast import Contrast
from zoo.objectives._two_sides import check_sides, two_sides
from zoo.registry import register
from zoo.shown import pairs_alone
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
        impl: What computes the loss: "reference", "chunked" or "triton"; "auto": triton where it runs, else chunked.
        precision: How triton forms float32 logits: "ieee", "tf32" or "3xtf32"; "auto": as torch's own products are set.
        across_processes: Whether the rows of all processes that train together are negatives, or those of each process alone.
    """

    learns_from = pairs_alone("infonce")

    def __init__(
        self,
        *,
        on: list[str] | None = None,
        log_scale: float = math.log(1 / 0.07),
        impl: Impl = "auto",
        precision: Precision = "auto",
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        self.on = on
        self.contrast = Contrast("infonce", impl, precision, across_processes)
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def bind(self, model: Model) -> None:
        """Check ``on`` against the model's outputs.

        Raises:
            ZooError: If they do not fit.
        """
        check_sides("infonce", self.on, model)

    def forward(self, model: Model, batch: Batch) -> Loss:
        """The loss; parts: ``scale``.

        Raises:
            ZooError: If one output is contrasted and the batch is not one of pairs, or if ``impl`` cannot run here.
        """
        scale = self.log_scale.exp()
        sides = two_sides("infonce", self.on, model, batch)
        loss = self.contrast(**sides._asdict(), scale=scale)
        return Loss(loss, {"scale": scale.detach()})
