"""NoteLLM-1's objective: notes find their partners, and the word each was compressed into tells its category or its topics."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from zoo.config import ObjectiveSpec
from zoo.errors import ZooError
from zoo.registry import make, register
from zoo.types import Asked, Batch, Binding, Loss, ModelOutput, Stepping


@register("objective", "answering", paper="Zhang et al., NoteLLM, 2024, https://arxiv.org/abs/2403.01744")
class Answering(nn.Module):
    """(L + weight * G) / (1 + weight): L another objective, G the cross-entropy of the answers, averaged over their words.

    One forward pass serves both. G is averaged over the words of one process; of a batch without answers it is 0.

    Args:
        contrast: The other objective.
        weight: Of the answers, above 0.

    Raises:
        ZooError: If the weight is not above 0.
    """

    def __init__(self, *, contrast: ObjectiveSpec = "pair_infonce", weight: float = 0.01) -> None:
        super().__init__()
        if weight <= 0:
            raise ZooError(f"answering.weight: {weight} leaves the answers out: write one above 0, or the objective {contrast!r} itself")
        self.contrast, self.weight = make("objective", contrast), weight

    def bind(self, model: Any) -> None:
        """Check that the model is asked something, and bind the other objective.

        Raises:
            ZooError: If it is not, or the other objective does not fit.
        """
        if not isinstance(model, Asked) or model.asks is None:
            raise ZooError("answering learns what the model is asked, and this one is asked nothing: write model.ask: category, or topics")
        if isinstance(self.contrast, Binding):
            self.contrast.bind(model)

    def forward(self, model: Any, batch: Batch) -> Loss:
        """The weighted mean; parts: those of the other objective, and ``loss_answer``."""
        out: ModelOutput = model(batch)
        loss: Loss = self.contrast(_Ran(model.outputs, batch, out), batch)
        answer = loss.total.new_zeros(())
        if "answer" in out.logits and len(out.labels["answer"]):
            answer = nn.functional.cross_entropy(out.logits["answer"].float(), out.labels["answer"])
        total = (loss.total + self.weight * answer) / (1 + self.weight)
        return Loss(total, {**loss.parts, "loss_answer": answer.detach()}, loss.state)

    def before_step(self, model: Any) -> None:
        """The other objective's."""
        if isinstance(self.contrast, Stepping):
            self.contrast.before_step(model)

    def after_step(self, model: Any, state: Any) -> None:
        """The other objective's."""
        if isinstance(self.contrast, Stepping):
            self.contrast.after_step(model, state)


class _Ran(NamedTuple):
    """The model as the other objective meets it: it has run already, on this batch."""

    outputs: tuple[str, ...]
    batch: Batch
    output: ModelOutput

    def __call__(self, batch: Batch) -> ModelOutput:
        if batch is not self.batch:
            raise ZooError("answering.contrast: this objective runs the model on further inputs: write one that uses the batch alone")
        return self.output
