"""NoteLLM-2's objective: every note of a batch of pairs must find its partner among all the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.kernels.contrastive import Impl, Precision
from zoo.objectives._contrast import Contrast
from zoo.registry import register
from zoo.types import Batch, Loss, Model


@register("objective", "pair_infonce", paper="Zhang et al., NoteLLM-2, 2024, https://arxiv.org/abs/2405.16789")
class PairInfonce(nn.Module):
    """Contrast among the 2B rows of B pairs, for each output of the model, as a weighted mean.

    One softmax a row over all rows but itself, both directions at once; the logits are cosines times a learned
    ``exp(log_scale)`` that the outputs share. Unlike in the released code, rows of the same item are never negatives of each
    other, nor are rows that are known to belong together; and over several processes the gradients are those of one process
    with all rows, where there they flow through a process's own rows alone, and that of the scale is theirs times the number
    of processes. Rows that lack an output leave its loss; an output that no pair of the batch has leaves the weighted mean.

    Args:
        alpha: Weight of the model's main output, where every other has 1. Without effect when ``on`` is given.
        on: {output: weight, above 0}; None: all outputs of the model, weighted by ``alpha``.
        log_scale: Where the learned log-scale starts; exp(3) is a temperature of 0.05.
        impl: What computes the loss: "reference", "chunked" or "triton"; "auto": triton where it runs, else chunked.
        precision: How triton forms float32 logits: "ieee", "tf32" or "3xtf32"; "auto": as torch's own products are set.
        across_processes: Whether the rows of all processes that train together are negatives, or those of each process alone.

    Raises:
        ZooError: If a weight is not above 0.
    """

    def __init__(
        self,
        *,
        alpha: float = 9.0,
        on: dict[str, float] | None = None,
        log_scale: float = 3.0,
        impl: Impl = "auto",
        precision: Precision = "auto",
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        wrong = {name: weight for name, weight in {**(on or {}), "alpha": alpha}.items() if weight <= 0}
        if wrong or on == {}:
            raise ZooError(f"pair_infonce weighs outputs by numbers above 0, not {wrong}: leave out what shall not count")
        self.alpha, self.on = alpha, on
        self.contrast = Contrast("pair_infonce", impl, precision, across_processes)
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def bind(self, model: Model) -> None:
        """Check that the model gives every output that is weighed here.

        Raises:
            ZooError: Naming all that it does not give, and what it does.
        """
        if missing := [name for name in self.on or () if name not in model.outputs]:
            raise ZooError("\n".join(f"pair_infonce.on: {unknown('output of this model', name, model.outputs)}" for name in missing))

    def forward(self, model: Model, batch: Batch) -> Loss:
        """The weighted mean of the outputs' losses; parts: ``loss_<output>``, 0 where nothing of it is there, and ``scale``.

        Raises:
            ZooError: If the batch is not one of pairs, or if ``impl`` cannot run here.
        """
        if batch.positive is None:
            raise ZooError("pair_infonce trains on pairs, but this batch does not say which rows belong together (positive)")
        out = model(batch)
        scale = self.log_scale.exp()
        total, weights, parts = scale.new_zeros(()), scale.new_zeros(()), {}
        for name, weight in self.weights(model).items():
            present = out.present.get(name)
            loss = self.contrast(
                out.embeddings[name],
                scale=scale,
                positive=batch.positive,
                ids_x=batch.ids,
                known=batch.known,
                present=present,
                direction="rows",
            )
            here = weight * self.contrast.anywhere(_any_pair(batch.positive, present))
            total, weights = total + here * loss, weights + here
            parts[f"loss_{name}"] = loss.detach()
        total = total / torch.where(weights > 0, weights, 1)
        return Loss(total, {**parts, "scale": scale.detach()})

    def weights(self, model: Model) -> dict[str, float]:
        """{output: weight}, as given or by default."""
        main, *others = model.outputs
        return self.on if self.on is not None else {main: self.alpha, **dict.fromkeys(others, 1.0)}


def _any_pair(positive: Tensor, present: Tensor | None) -> Tensor:
    """() bool: whether any row and its positive are both there."""
    paired = positive >= 0
    if present is not None:
        paired = paired & present & present[positive.clamp(min=0)]
    return paired.any()
