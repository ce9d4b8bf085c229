"""SigLIP's objective: each pair of vectors is judged on its own, partners or not."""

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


@register("objective", "siglip", paper="Zhai et al., SigLIP, ICCV 2023, https://arxiv.org/abs/2303.15343")
class Siglip(nn.Module):
    """Sum of the binary losses of all pairs of vectors, divided by the number of partners.

    The logits are cosines times a learned ``exp(log_scale)`` plus a learned ``bias``, which starts low because nearly
    all pairs are negatives. Unlike in the paper, the same item and known positives are never negatives, and a pair of
    which one side is absent does not count.

    Args:
        on: Two outputs of the model, contrasted row by row; or one, whose queries (first half of a batch of pairs) are
            contrasted with its targets. None: all that the model gives.
        log_scale: Where the learned log-scale starts; ln 10 in the paper.
        bias: Where the learned bias starts; -10 in the paper.
        impl: What computes the loss: "reference", "chunked" or "triton"; "auto": triton where it runs, else chunked.
        precision: How triton forms float32 logits: "ieee", "tf32" or "3xtf32"; "auto": as torch's own products are set.
        across_processes: Whether the rows of all processes that train together are negatives, or those of each process alone.
    """

    learns_from = pairs_alone("siglip")

    def __init__(
        self,
        *,
        on: list[str] | None = None,
        log_scale: float = math.log(10),
        bias: float = -10.0,
        impl: Impl = "auto",
        precision: Precision = "auto",
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        self.on = on
        self.contrast = Contrast("siglip", impl, precision, across_processes)
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.bias = nn.Parameter(torch.tensor(bias))

    def bind(self, model: Model) -> None:
        """Check ``on`` against the model's outputs.

        Raises:
            ZooError: If they do not fit.
        """
        check_sides("siglip", self.on, model)

    def forward(self, model: Model, batch: Batch) -> Loss:
        """The loss; parts: ``scale`` and ``bias``.

        Raises:
            ZooError: If one output is contrasted and the batch is not one of pairs, or if ``impl`` cannot run here.
        """
        scale = self.log_scale.exp()
        sides = two_sides("siglip", self.on, model, batch)
        loss = self.contrast(**sides._asdict(), scale=scale, bias=self.bias, form="sigmoid")
        return Loss(loss, {"scale": scale.detach(), "bias": self.bias.detach()})
