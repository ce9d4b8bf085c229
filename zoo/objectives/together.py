"""Several objectives over one forward pass of a model, and the momentum twin that they learn from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import Fraction, ObjectiveSpec, split_spec
from zoo.errors import ZooError
from zoo.momentum import EMATwin, Enqueueing, refuse_sharded
from zoo.objectives._shared import Shared, Term
from zoo.registry import make, register
from zoo.shown import Choosy, Needs
from zoo.types import Batch, Loss, Stepping


@register("objective", "together", paper="Li et al., ALBEF, NeurIPS 2021, https://arxiv.org/abs/2107.07651")
class Together(nn.Module):
    """Weighted sum of objectives over one forward pass, in the order in which they stand.

    ``{name: together, of: [itc, itm, mlm], momentum: 0.995}`` is ALBEF's. The twin is a copy of the whole model as training starts. It
    belongs to the objective: it stands in checkpoints, not in the optimizer nor in the model that a run leaves. It follows the model
    after each step of the optimizer, so the next step's teacher knows the weights that this step starts with.

    Args:
        of: Objectives that can share a pass: itc, itm, mlm, lm, mdm.
        weights: Of each, above 0. None: 1.
        momentum: What the twin keeps of itself in an update: 0.995 in ALBEF and BLIP. None: there is no twin.

    Raises:
        ZooError: If an objective cannot share a pass, or needs a twin that there is not, or weights do not fit.
    """

    of: Any  # nn.ModuleList alone says nothing of what objectives have
    twin: EMATwin | None

    def __init__(self, *, of: list[ObjectiveSpec], weights: list[float] | None = None, momentum: Fraction | None = None) -> None:
        super().__init__()
        if not of:
            raise ZooError("together.of: no objective stands there: write [itc, itm]")
        self.names = _told_apart([split_spec(spec)[0] for spec in of])
        self.of = nn.ModuleList(make("objective", spec) for spec in of)
        self.weights = [1.0] * len(of) if weights is None else weights
        if len(self.weights) != len(of) or min(self.weights) <= 0:
            raise ZooError(
                f"together.weights: {self.weights} for {', '.join(self.names)}: write a number above 0 for each, and leave out what shall "
                "not count"
            )
        for name, objective in zip(self.names, self.of, strict=True):
            if not isinstance(objective, Term):
                raise ZooError(f"together.of: {name} cannot share a forward pass with others: write itc, itm, mlm, lm or mdm")
            if objective.needs_twin and momentum is None:
                raise ZooError(f"together.momentum: {name} learns from a momentum twin: write 0.995, or queue: 0 and alpha: 0 of {name}")
        if "itc" in self.names and "itm" in self.names[: self.names.index("itc")]:
            raise ZooError("together.of: itm draws its negatives by what itc finds alike: write itc before it")
        self.momentum = momentum
        self.register_module("twin", None)

    @property
    def learns_from(self) -> Needs:
        """As of each."""
        named = zip(self.names, self.of, strict=True)
        return {name: kinds for name, objective in named if isinstance(objective, Choosy) for kinds in objective.learns_from.values()}

    @property
    def enqueues(self) -> bool:
        """Whether no batch may go unseen."""
        return any(isinstance(objective, Enqueueing) and objective.enqueues for objective in self.of)

    def bind(self, model: Any) -> None:
        """Bind the objectives, and copy the model.

        Raises:
            ZooError: If an objective does not fit the model, or a twin cannot follow it.
        """
        for objective in self.of:
            objective.bind(model)
        self.twin = None if self.momentum is None else EMATwin(model, self.momentum)

    def forward(self, model: Any, batch: Batch) -> Loss:
        """The sum; parts: ``loss_<objective>``, and the objectives' own, ``<objective>_<part>``.

        Raises:
            ZooError: If it has a twin to make and was bound to no model, or an objective does not fit the batch.
        """
        shared = self._pass(model, batch)
        total: Tensor | float = 0.0
        parts: dict[str, Tensor] = {}
        states = []
        for name, weight, objective in zip(self.names, self.weights, self.of, strict=True):
            loss, own, state = objective.term(model, batch, shared)
            total = total + weight * loss
            parts |= {f"loss_{name}": loss.detach(), **{f"{name}_{part}": value for part, value in own.items()}}
            states.append(state)
        assert isinstance(total, Tensor)
        return Loss(total, parts, states)

    def before_step(self, model: Any) -> None:
        """The objectives'.

        Raises:
            ZooError: If the weights are spread over processes, and there is a twin.
        """
        if self.twin is not None:
            refuse_sharded(next(model.parameters()))
        for objective in self.of:
            if isinstance(objective, Stepping):
                objective.before_step(model)

    def after_step(self, model: Any, state: list[Any]) -> None:
        """Let the twin follow the model; then the objectives'."""
        if self.twin is not None:
            self.twin.update(model)
        for objective, own in zip(self.of, state, strict=True):
            if isinstance(objective, Stepping):
                objective.after_step(model, own)

    def _pass(self, model: Any, batch: Batch) -> Shared:
        """The one forward pass, and the twin's."""
        out = model(batch)
        if self.momentum is None:
            return Shared(out, None, None, {})
        if self.twin is None:
            raise ZooError("together.momentum: there is no twin yet: call bind(model) before the first batch")
        twin = self.twin.teacher()
        with torch.no_grad():
            return Shared(out, twin(batch), twin, {})


def _told_apart(names: list[str]) -> list[str]:
    """Each name once: a second itc is itc_2."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out
