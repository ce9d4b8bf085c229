"""When a run saves where it stands: every so many steps or minutes, at its end, and when it is asked to stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from zoo.checkpoint import Position, name_of, random_state, save_checkpoint
from zoo.distributed import whole
from zoo.interrupt import AGAIN, Interruption, stop
from zoo.sections import Run


class Moment(NamedTuple):
    """What a step changes before it moves the weights."""

    position: Position
    random: Mapping[str, Any]
    buffers: Mapping[str, Tensor]  # a batch norm counts in the forward pass


class Saver:
    """Called after every step, by all processes.

    Args:
        folder: Of the checkpoints.
        step: Model and objective.
        optimizer: Its state goes along.
        identity: What a resuming run must agree with.
        run: How often, and how many checkpoints stay.
        accelerator: Knows the processes.
    """

    def __init__(
        self,
        folder: Path,
        step: nn.Module,
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, Any],
        run: Run,
        accelerator: Accelerator,
    ) -> None:
        self.folder, self.step, self.optimizer = folder, step, optimizer
        self.identity, self.run, self.accelerator = identity, run, accelerator
        self.saved = time.monotonic()

    def __call__(self, position: Position, interruption: Interruption, *, last: bool) -> int:
        """Save if it is time to.

        Returns:
            The signal that came in the last step to any of the processes, to be heeded when the model is written; 0: none.

        Raises:
            KeyboardInterrupt: After saving, if Ctrl-C was pressed in any of the processes, before the last step.
            Terminated: After saving, if SIGTERM came.
        """
        late = bool(self.run.save_minutes) and time.monotonic() - self.saved >= 60 * self.run.save_minutes
        number, late = self._agreed(interruption.signal, late)
        due = bool(self.run.save_every) and position.step % self.run.save_every == 0
        if number or late or due or last:
            self._save(position, random_state(), {})
        if number and not last:
            stop(number, f"stopped and saved after step {position.step}; {AGAIN}")
        return number

    def moment(self, position: Position) -> Moment:
        """To be taken before a step, in case that it cannot be made."""
        return Moment(replace(position), random_state(), {name: buffer.clone() for name, buffer in self.step.named_buffers()})

    def save_before(self, moment: Moment) -> str:
        """Save where a step began that moved no weight, by all processes; says where it lies."""
        position = moment.position
        if position.step == 0:
            return "no step before it, so nothing is saved"
        self._save(*moment)
        return f"step {position.step}, the last whole one, is saved in {self.folder}"

    def _agreed(self, number: int, late: bool) -> tuple[int, bool]:
        """What holds in any process holds in all: they save and stop at the same step."""
        if self.accelerator.num_processes == 1:
            return number, late
        found = torch.tensor([number, late], device=self.accelerator.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        number, late = found.tolist()
        return number, bool(late)

    def _save(self, position: Position, random: Mapping[str, Any], buffers: Mapping[str, Tensor]) -> None:
        state, optimizer, all_random = whole(self.step.state_dict()), whole(self.optimizer.state_dict()), gather_object([random])
        state |= {name: buffer for name, buffer in buffers.items() if name in state}
        if self.accelerator.is_main_process and not (self.folder / name_of(position)).exists():
            save_checkpoint(self.folder, state, optimizer, position, self.identity, all_random, keep=self.run.keep)
        self.saved = time.monotonic()
