"""What a run says while it trains: JSON lines in its folder, TensorBoard beside them, a bar or plain lines on the screen."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from zoo.checkpoint import Position
from zoo.files import write_text


class Log:
    """A context manager; `write` after every step.

    Args:
        folder: Of the run; gets ``log.jsonl`` and ``tensorboard/``. Lines after ``start``, of steps that are now done again, go.
        steps: Of the whole run.
        every: Steps between two lines.
        start: The step at which training goes on.
        enabled: False on all processes but one.
    """

    def __init__(self, folder: Path, *, steps: int, every: int, start: int, enabled: bool) -> None:
        self.folder, self.steps, self.every, self.enabled, self.start_step = folder, steps, every, enabled, start
        self.begin = time.perf_counter()
        console = Console(stderr=True)
        self.live = enabled and console.is_terminal
        self.console = console
        self.progress = Progress(
            TextColumn(folder.name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Log:
        if self.enabled:
            kept = _lines_until(self.folder / "log.jsonl", self.start_step)
            write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
            self.begin -= kept[-1]["seconds"] if kept else 0.0
            self.file = (self.folder / "log.jsonl").open("a", encoding="utf-8", buffering=1)
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start_step + 1)
        if self.live:
            self.progress.start()
            self.task = self.progress.add_task("", total=self.steps, completed=self.start_step)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.progress.stop()
        if self.enabled:
            self.file.close()
            self.board.close()

    def write(self, position: Position, values: dict[str, float]) -> None:
        """Log ``values`` if this step is due."""
        if not self.enabled:
            return
        step = position.step
        if self.live:
            self.progress.update(self.task, completed=step, description=f"loss {values['loss']:.4f}" if "loss" in values else "")
        if step % self.every and step != self.steps:
            return
        seconds = round(time.perf_counter() - self.begin, 2)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON knows no infinity
        self.file.write(json.dumps({"step": step, "epoch": position.epoch, "seconds": seconds, **finite}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if not self.live:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            self.console.print(f"{self.folder.name}: step {step}/{self.steps}  {shown}  {seconds:.0f} s", highlight=False, soft_wrap=True)


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole lines of an earlier part of this run; a killed run may have left half a line at the end."""
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    lines = [json.loads(line) for line in whole]
    return [line for line in lines if line["step"] <= step]
