"""From batches to one optimizer step: phases of the schedule, accumulation, clipping, and the checks that stop a broken run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zoo import gradcache
from zoo.checkpoint import Position
from zoo.config import split_spec
from zoo.distributed import mean_gradients
from zoo.errors import Diverged, Failure, ZooError
from zoo.joints import Correcting, Merging, Modulating, Phase, Schedule, Supplementing
from zoo.recipe import Recipe
from zoo.types import Batch, Loss, Stepping


class Step(nn.Module):
    """Model and objective in one module, so that what is wrapped, compiled and saved is one thing.

    Args:
        model: An ``nn.Module`` with ``outputs``, ``processor`` and ``schedule``.
        objective: An ``nn.Module`` that makes a Loss of the model and a batch.
    """

    model: Any  # nn.Module alone says nothing of what a model has
    objective: Any

    def __init__(self, model: Any, objective: Any) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Loss:
        return self.objective(self.model, batch)


class Updater:
    """Takes batches and moves the weights.

    Args:
        accelerator: Owns precision and processes.
        wrapped: ``step`` as Accelerate prepared it.
        step: Model and objective.
        optimizer: As Accelerate prepared it.
        recipe: Of the run.

    Raises:
        ZooError: If several processes train together, and the schedule looks at the rows of one alone.
    """

    def __init__(self, accelerator: Accelerator, wrapped: nn.Module, step: Step, optimizer: Any, recipe: Recipe) -> None:
        self.accelerator, self.wrapped, self.step, self.optimizer, self.recipe = accelerator, wrapped, step, optimizer, recipe
        self.schedule: Schedule = step.model.schedule
        if accelerator.num_processes > 1 and (
            self.schedule.multi_phase or isinstance(self.schedule, Merging | Modulating | Correcting | Supplementing)
        ):
            name = type(self.schedule).__name__
            many = accelerator.num_processes
            raise ZooError(f"the schedule {name} goes by the rows of one process, and {many} train together: start one")
        own = recipe.run.shard or recipe.run.gradcache or recipe.run.accumulate > 1  # else DistributedDataParallel averages as it goes
        self.moved = False  # whether this step has moved weights already
        self.averages = bool(own) and accelerator.num_processes > 1

    def __call__(self, batches: Iterator[Batch], position: Position) -> dict[str, float]:
        """One optimizer step from ``accumulate`` batches, or one for each phase of a schedule that has several.

        Returns:
            The parts of the loss, averaged over batches and processes, the gradient's norm before clipping, and with ``run.log_gradients``
            the squared norm of each module's part of it.

        Raises:
            Diverged: If loss or gradient are not finite; the weights stand as the last whole step left them.
            Failure: If they are not after an earlier phase has moved the weights.
        """
        self.moved = False
        accumulate = self.recipe.run.accumulate
        sums: dict[str, Tensor] = {}
        norms: dict[str, float] = {}
        for micro in range(accumulate):
            gradients: dict[str, dict[str, Tensor]] = {}
            phases = list(self.schedule.phases(next(batches)))
            for phase in phases:
                loss = self._backward(phase.batch, position)
                if self.averages and micro + 1 == accumulate:
                    mean_gradients(self.step.parameters(), self.accelerator.device)
                prefix = f"{phase.name}/" if len(phases) > 1 else ""
                for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
                    sums[prefix + name] = sums.get(prefix + name, 0) + value / accumulate
                if isinstance(self.schedule, Merging):
                    gradients[phase.name] = self._take_gradients()
                    if phase is not phases[-1]:
                        continue
                    self._put_gradients(self.schedule.merge(gradients))
                if micro + 1 == accumulate:
                    norms = _added(norms, self._apply(phase, loss, position))
        return norms | {k: float(self.accelerator.reduce(v, "mean")) for k, v in sums.items()}

    def _backward(self, batch: Batch, position: Position) -> Loss:
        """Add the gradient of a batch's loss to the parameters'."""

        def apply(loss: Loss) -> None:
            self._check_trains(loss)
            self._check_loss(loss, position)
            self.accelerator.backward(loss.total / self.recipe.run.accumulate)

        if rows := self.recipe.run.gradcache:
            with self.accelerator.autocast():
                return gradcache.backward(self.step.model, self.step.objective, batch, rows, apply)
        with self.accelerator.no_sync(self.wrapped) if self.averages else nullcontext():
            loss: Loss = self.wrapped(batch)
            apply(loss)
        return loss

    def _apply(self, phase: Phase, loss: Loss, position: Position) -> dict[str, float]:
        """Clip and step; tell schedule and objective, unless fp16 scaling skipped the step."""
        model, objective = self.step.model, self.step.objective
        self.accelerator.unscale_gradients()
        norm = _norm([p.grad for p in self.step.parameters() if p.grad is not None])
        if not bool(norm.isfinite()) and self.recipe.run.precision != "fp16":  # fp16 scaling skips such a step by itself
            bad = [n for n, p in self.step.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
            raise self._stopped("the gradient", float(norm), position, f"first in {', '.join(bad[:3])}")
        norms = {"grad_norm": float(norm)} | (squared_gradients(self.step) if self.recipe.run.log_gradients else {})
        if longest := self.recipe.optimizer.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.step.parameters(), longest, norm)
        if isinstance(self.schedule, Modulating):
            self.schedule.before_step(model, phase, loss)
        if isinstance(objective, Stepping):
            objective.before_step(model)
        corrects = self.schedule if isinstance(self.schedule, Correcting) else None
        previous = {name: p.detach().clone() for name, p in corrects.watched(model).items()} if corrects else {}
        self.optimizer.step()
        self.moved = True
        if not self.accelerator.optimizer_step_was_skipped:
            if corrects:
                corrects.after_step(model, phase, previous, loss)
            if isinstance(objective, Stepping):
                objective.after_step(model, loss.state)
        self.optimizer.zero_grad(set_to_none=True)
        return norms

    def _take_gradients(self) -> dict[str, Tensor]:
        taken = {name: p.grad for name, p in self.step.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def _put_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        for name, parameter in self.step.named_parameters():
            parameter.grad = gradients.get(name)

    def _check_trains(self, loss: Loss) -> None:
        """Whether anything that is trained had a part in the loss: a list of what alone is trained may name what no objective reads."""
        if loss.total.requires_grad:
            return
        trained = dict.fromkeys(n.removeprefix("model.").partition(".")[0] for n, p in self.step.named_parameters() if p.requires_grad)
        others = [name for name, m in self.step.model.named_children() if name not in trained and next(m.parameters(), None) is not None]
        raise ZooError(
            f"objective: what is trained is {', '.join(trained)}, and {split_spec(self.recipe.objective)[0]} reads none of it, so there is "
            f"nothing to learn: write another objective, or let train_only and freeze leave others to train, of {', '.join(others)}"
        )

    def _check_loss(self, loss: Loss, position: Position) -> None:
        total = self.accelerator.reduce(loss.total.detach(), "mean")  # else one process would stop, and the others wait for it
        if not bool(torch.isfinite(total)):
            parts = ", ".join(f"{k} {float(v):.4g}" for k, v in loss.parts.items())
            raise self._stopped("the loss", float(total), position, parts)

    def _stopped(self, what: str, value: float, position: Position, detail: str) -> Failure:
        return (Failure if self.moved else Diverged)(
            f"{what} is {value} in step {position.step + 1} (epoch {position.epoch}, batch {position.batch - 1}; {detail}); "
            "start over with a lower optimizer.lr, a longer warmup, or precision: bf16 in place of fp16"
        )


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """() length of all gradients together, of which some may be spread over the processes and others not."""
    spread, own = ([g for g in gradients if isinstance(g, DTensor) is kind] for kind in (True, False))
    norms = [nn.utils.get_total_norm(some) for some in (spread, own) if some]
    return torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()


def _added(norms: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """The norms of two updates as if their gradients were parts of one: lengths by Pythagoras, squares by their sum."""
    return {k: math.hypot(norms.get(k, 0.0), v) if k == "grad_norm" else norms.get(k, 0.0) + v for k, v in more.items()}


def squared_gradients(step: Step) -> dict[str, float]:
    """The squared gradient norm that reaches each module of the model, and the objective; ``{"squared_gradient/vision": 0.02}``.

    Modules of a ModuleDict count by themselves: ``squared_gradient/encoders.audio``.

    A module without parameters, or with frozen ones only, has no entry.
    """
    children = {
        f"{name}.{key}" if key else name: module
        for name, child in step.model.named_children()
        for key, module in (child.items() if isinstance(child, nn.ModuleDict) else [("", child)])
    }
    modules = {**children, "objective": step.objective}
    trained = {name: [p.grad for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
    found = {name: [g for g in gradients if g is not None] for name, gradients in trained.items() if gradients}
    return {f"squared_gradient/{name}": float(_norm(gradients)) ** 2 if gradients else 0.0 for name, gradients in found.items()}
