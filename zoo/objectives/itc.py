"""Contrast of pictures and texts: CLIP's, and with a momentum twin, queues and soft targets ALBEF's, BLIP's and CoCa's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.config import Fraction
from zoo.distributed import processes
from zoo.errors import ZooError, unknown
from zoo.kernels.contrastive import Impl, Precision
from zoo.momentum import FeatureQueue, SoftTarget
from zoo.objectives._contrast import Contrast
from zoo.objectives._shared import Likeness, Shared, alone, unit, wide
from zoo.objectives._temperature import Kind, Temperature
from zoo.objectives._two_sides import Sides, sides_of
from zoo.registry import register
from zoo.shown import pairs_alone
from zoo.types import Batch, Loss


class Keys(NamedTuple):
    """What a batch leaves for the queues."""

    x: Tensor  # (B, E) the twin's
    y: Tensor  # (B, E)
    present: tuple[Tensor, Tensor]  # (B,) bool each
    ids: Tensor | None  # (B,)


@register("objective", "itc", paper="Li et al., ALBEF, NeurIPS 2021, https://arxiv.org/abs/2107.07651")
class Itc(nn.Module):
    """Mean of two cross entropies: each picture finds its text among others, and each text its picture.

    Without a momentum twin this is CLIP's loss (Radford et al., ICML 2021, https://arxiv.org/abs/2103.00020). Beside a twin, in
    `together` with ``momentum``, it is ALBEF's: what is searched are the twin's vectors of the batch and of its queue, both without a
    gradient, and ``alpha`` of the target is the twin's own softmax over them, at the temperature of the student. The twin has followed
    the model before it is asked; its vectors enter the queues after the step, so that no row meets its own key twice.

    Unlike in the papers' pre-training, rows of one subject (``batch.ids``) are never negatives of each other, those in a queue included,
    nor are known positives, and a pair of which one side is absent does not count. ALBEF searches the batch of its own process:
    ``across_processes: false``; the queues take in those of all processes either way.

    Args:
        on: Two outputs of the model. None: the first two that it gives, of models of pictures and texts ``image`` and ``text``.
        temperature: What is learned. "log_scale": the logarithm of its inverse (CLIP). "raw": itself (ALBEF). "fixed": nothing.
        start: The temperature at first, above 0.
        clamp: Whether the temperature stays in 0.01..1 (log_scale, CLIP's) or in 0.001..0.5 (raw, ALBEF's).
        queue: Vectors that each of the two queues holds, a multiple of the batch; 65536 in ALBEF, 57600 in BLIP. 0: none.
        alpha: Share of the target that is the twin's, 0.4 in ALBEF and BLIP.
        same: What rows of one subject are to each other. "apart": nothing. "positive": all equally right, as where ALBEF and BLIP are
            fine-tuned for retrieval.
        ramp: Optimizer steps over which this share rises from 0: those of the first epoch in ALBEF, of the first two in BLIP.
        impl: What computes the loss: "reference", "chunked" or "triton"; "auto": triton where it runs, else chunked.
        precision: How triton forms float32 logits: "ieee", "tf32" or "3xtf32"; "auto": as torch's own products are set.
        across_processes: Whether the rows of all processes that train together are negatives, or those of each process alone.

    Raises:
        ZooError: If the temperature, ``queue`` or ``ramp`` are out of range.
    """

    learns_from = pairs_alone("itc")
    queues: Any  # nn.ModuleList alone says nothing of what a queue has

    def __init__(
        self,
        *,
        on: list[str] | None = None,
        temperature: Kind = "log_scale",
        start: float = 0.07,
        clamp: bool = True,
        queue: int = 0,
        alpha: Fraction = 0.0,
        ramp: int = 0,
        same: Literal["apart", "positive"] = "apart",
        impl: Impl = "auto",
        precision: Precision = "auto",
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        if queue < 0 or ramp < 0:
            raise ZooError(f"itc: queue and ramp are counts, not {queue} and {ramp}: write 0 for none")
        self.on, self.queue, self.same = on, queue, same
        self.temperature = Temperature(temperature, start, clamp)
        self.soft = SoftTarget(alpha, ramp)
        self.contrast = Contrast("itc", impl, precision, across_processes)
        self.queues = nn.ModuleList()

    @property
    def needs_twin(self) -> bool:
        """Queues hold, and soft targets come from, what a twin gives."""
        return self.queue > 0 or self.soft.alpha > 0

    @property
    def enqueues(self) -> bool:
        """Whether no batch may go unseen."""
        return self.queue > 0

    def bind(self, model: Any) -> None:
        """Check the outputs, and fill the queues with random vectors of the model's width.

        Raises:
            ZooError: If not two outputs that the model gives are contrasted.
        """
        names = self._names(model)
        faults = [unknown("output of this model", name, model.outputs) for name in names if name not in model.outputs]
        if faults:
            faults[-1] += "; a model's settings and fusion decide what it gives: write others, or leave this itc out"
        if len(set(names)) != 2 or len(names) != 2:
            faults.append(f"write two different outputs of {', '.join(model.outputs)}, not {list(names)}")
        if faults:
            raise ZooError("\n".join(f"itc.on: {fault}" for fault in faults))
        self.queues = nn.ModuleList(FeatureQueue(model.dim, self.queue) for _ in names if self.queue)

    def forward(self, model: Any, batch: Batch) -> Loss:
        """The loss; parts: ``scale``, and with a twin ``alpha``.

        Raises:
            ZooError: If it needs a twin, or if ``impl`` cannot run here.
        """
        return alone(self, model, batch)

    def term(self, model: Any, batch: Batch, shared: Shared) -> tuple[Tensor, dict[str, Tensor], Any]:
        """As `zoo.objectives._shared.Term`; leaves in ``shared`` what is alike for who draws negatives.

        Raises:
            ZooError: If it needs a twin and there is none, or the batch does not divide the queue.
        """
        names, scale = self._names(model), self.temperature.scale
        sides = sides_of("itc", names, shared.out, batch)
        if shared.teacher is None:
            if self.needs_twin:
                raise ZooError(
                    "itc: queue and alpha need a momentum twin: write objective: {name: together, of: [...], momentum: 0.995} around it, "
                    "or queue: 0 and alpha: 0"
                )
            keys = sides
            loss = self.contrast(**self._related(sides, None), x=sides.x, y=sides.y, scale=scale)
            parts, state = {}, None
        else:
            keys = sides_of("itc", names, shared.teacher, batch)
            loss = (self._searched(sides, keys, 0, scale) + self._searched(sides, keys, 1, scale)) / 2
            parts = {"alpha": loss.new_tensor(self.soft.share)}
            state = Keys(keys.x.detach(), keys.y.detach(), keys.present, batch.ids) if self.queue else None
        self._leave(shared, names, sides, keys, scale)
        return loss, {"scale": scale.detach(), **parts}, state

    def before_step(self, model: Any) -> None:
        """Nothing: the state moves behind the optimizer."""

    def after_step(self, model: Any, state: Keys | None) -> None:
        """Enqueue the batch's keys, raise alpha, and bound the temperature."""
        if state is not None:
            for queue, keys, there in zip(self.queues, (state.x, state.y), state.present, strict=True):
                queue.enqueue(keys, state.ids, there)
        self.soft.step()
        self.temperature.bound()

    def _searched(self, sides: Sides, keys: Sides, side: int, scale: Tensor) -> Tensor:
        """() the loss of one side's vectors, 0 or 1, that search for the twin's of the other."""
        own, key = unit(_both(keys)[side]).detach(), unit(_both(keys)[1 - side]).detach()
        sides = sides._replace(present=(sides.present[side], keys.present[1 - side]))
        queue = self.queues[1 - side] if self.queue else None
        apart: dict[str, Any] = {}
        candidates, soft = key, tuple[Tensor, ...]((own, key))
        if queue is not None:
            queue.check(len(key) * processes())
            held = queue.features.T.to(key.dtype)
            if self.same == "positive":  # among those that nobody's positive may be, the kernel's negatives, they would have no place
                candidates = torch.cat([key, held])
                soft = (own, candidates)
            else:
                apart = {"negatives": held, "ids_negatives": None if sides.ids_x is None else queue.ids}
                soft = (own, key, held)
        return self.contrast(
            wide(_both(sides)[side]),
            candidates,
            scale=scale,
            soft=soft if self.soft.alpha else None,
            soft_weight=self.soft.share,
            direction="rows",
            **self._related(sides, queue),
            **apart,
        )

    def _related(self, sides: Sides, queue: FeatureQueue | None) -> dict[str, Any]:
        """Who is there, and who is what to whom, as the loss takes it.

        Raises:
            ZooError: If rows of one subject are each other's positives and the batch names none, or queues would count twice.
        """
        there_x, there_y = sides.present
        if self.same == "apart":
            return {"ids_x": sides.ids_x, "ids_y": sides.ids_y, "known": sides.known, "present": sides.present}
        if sides.ids_x is None:
            raise ZooError("itc.same: this batch does not say which rows are of one subject (ids): write same: apart")
        if queue is None:
            return {"groups": (sides.ids_x, sides.ids_x), "known": sides.known, "present": sides.present}
        if self.contrast.across_processes and processes() > 1:
            raise ZooError("itc.same: positive: the queue of each process would count: write across_processes: false")
        ids, there = torch.cat([sides.ids_x, queue.ids]), torch.cat([there_y, torch.ones_like(queue.ids, dtype=torch.bool)])
        return {"groups": (sides.ids_x, ids), "known": sides.known, "present": (there_x, there)}

    def _leave(self, shared: Shared, names: Sequence[str], sides: Sides, keys: Sides, scale: Tensor) -> None:
        with torch.no_grad():
            for side, name in enumerate(names):
                shared.likeness[name] = Likeness(unit(_both(sides)[side]), unit(_both(keys)[1 - side]), scale.detach())

    def _names(self, model: Any) -> Sequence[str]:
        return model.outputs[:2] if self.on is None else self.on


def _both(sides: Sides) -> tuple[Tensor, Tensor]:
    return sides.x, sides.y
