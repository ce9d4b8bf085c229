"""Measured tiles for the Triton kernels of the contrastive loss: optional, for a device on which the stored table is not the best.

    tune(lambda: contrastive_loss(x, y, scale=50.0, normalize=True).backward())
    save("tiles.json")  # and in later processes: load("tiles.json")

Other tiles sum in another order, so losses differ in their last digits from those of the table's; with the same tiles they are the
same bit for bit. A process that never calls `tune` or `load` runs with the table alone.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from . import _configurations as configurations
from ._configurations import INTERPRETER, Configuration, Key, Tiles

_FORMAT = 1  # of the file
_SHAPES = ((64, 64), (128, 64), (64, 128), (128, 128), (256, 128), (128, 256))


class Trial(NamedTuple):
    """One tile that was tried."""

    key: Key
    kernel: Literal["forward", "gradient"]
    tile: Configuration
    seconds: float | None  # of the whole step, the median; None: it did not run
    fault: str | None  # why it did not run


def candidates(key: Key, kernel: Literal["forward", "gradient"]) -> list[Configuration]:
    """The tiles that `tune` tries: 64 to 256 rows and columns by 4 and 8 warps; the gradient's also in halves."""
    if key.capability == INTERPRETER:
        return [Configuration(16, 16, 16, 4, 1), Configuration(32, 16, 16, 4, 1)]
    depth = {"half": 64, "ieee": 16}.get(key.products, 32)
    stages, tma = 1 if key.products == "ieee" else 3, key.capability >= 90 and key.products != "ieee"
    splits = (1, 2) if kernel == "gradient" else (1,)
    return [
        Configuration(rows, columns, depth, warps, stages, split=split, tma=tma)
        for rows, columns in _SHAPES
        for warps in (4, 8)
        for split in splits
    ]


def tune(
    step: Callable[[], object],
    *,
    tiles: Sequence[Configuration] | None = None,
    rounds: int = 5,
    say: Callable[[str], object] = lambda line: None,
) -> list[Trial]:
    """Time other tiles in a step of yours, and use the fastest of them from now on, in this process.

    A tile is compiled when it is tried, which takes seconds: some minutes in all. First the forward's tiles are tried, then with the
    best of them the gradient's; what the table has stays unless another is faster.

    Args:
        step: Something that calls `contrastive_loss`, and if training matters its backward, on the device and at the size that matter.
        tiles: What to try for both kernels. None: `candidates`.
        rounds: Timings of each tile, of which the median counts; at least 1.
        say: Is told a line for each tile.

    Returns:
        All that was tried, in its order.

    Raises:
        ValueError: If ``rounds`` is below 1, or ``step`` never runs a Triton kernel of the loss.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    with configurations.watched() as asked:
        step()
    if not asked:
        raise ValueError("the step ran no Triton kernel of contrastive_loss: call it with impl='triton', on tensors of a CUDA device")
    trials: list[Trial] = []
    for key in dict.fromkeys(asked):
        for kernel in ("forward", "gradient"):
            before = configurations.find(key)
            own = getattr(before, kernel)
            tried = []
            for tile in dict.fromkeys((own, *(candidates(key, kernel) if tiles is None else tiles))):
                configurations.measured[key] = before._replace(**{kernel: tile})
                try:
                    tried.append(Trial(key, kernel, tile, *_timed(step, rounds, key)))
                finally:
                    configurations.measured[key] = before
                say(_line(tried[-1]))
            ran = [trial for trial in tried if trial.seconds is not None]
            if ran:
                best = min(ran, key=lambda trial: trial.seconds or 0.0)
                configurations.measured[key] = before._replace(**{kernel: best.tile})
            trials += tried
    return trials


def save(path: str | os.PathLike[str]) -> None:
    """Write what was measured in this process, and what was loaded, as JSON; the file is replaced as a whole.

    Raises:
        ValueError: If nothing was measured.
    """
    if not configurations.measured:
        raise ValueError("nothing was measured in this process: call tune first")
    entries = [
        {"key": key._asdict(), **{name: t._asdict() for name, t in at._asdict().items()}} for key, at in configurations.measured.items()
    ]
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps({"format": _FORMAT, "device": _device(), "tiles": entries}, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> None:
    """Use the tiles of a file that `save` wrote. Those for another release of Triton are read, and never asked for.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no such file, or was measured on another device.
    """
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        device, form = known["device"], known["format"]
        found = {_key(entry["key"]): Tiles(_tile(entry["forward"]), _tile(entry["gradient"])) for entry in known["tiles"]}
    except (KeyError, TypeError, ValueError) as error:  # JSON that is none, and text that is none, are ValueErrors
        raise ValueError(f"{path} is no file of tiles ({type(error).__name__}: {error}): write one with tune and save") from error
    if form != _FORMAT:
        raise ValueError(f"{path} has format {form}, this version reads {_FORMAT}: write it again with tune and save")
    if device != _device():
        raise ValueError(f"{path} was measured on {device}, this is {_device()}: call tune and save here")
    configurations.measured.update(found)


def reset() -> None:
    """Forget what was measured or loaded: back to the table."""
    configurations.measured.clear()


def _timed(step: Callable[[], object], rounds: int, key: Key) -> tuple[float | None, str | None]:
    """The median of the seconds that the step takes, and why it cannot run."""
    from triton.runtime.errors import OutOfResources, PTXASError  # there only where triton is installed

    try:
        step()  # compiles
    except (OutOfResources, PTXASError) as error:
        return None, str(error).strip().partition("\n")[0]
    clock = _host_clock if key.capability == INTERPRETER else _device_clock
    return statistics.median(clock(step) for _ in range(rounds)), None


def _host_clock(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _device_clock(step: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _line(trial: Trial) -> str:
    tile = trial.tile
    about = f"{trial.key.products} {trial.key.weight} {trial.kernel}: {tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps"
    about += ", in halves" if tile.split == 2 else ""
    return f"{about}: {trial.fault}" if trial.seconds is None else f"{about}: {trial.seconds * 1e3:.3f} ms"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def _key(plain: dict[str, Any]) -> Key:
    major, minor = plain["triton"]
    return Key(plain["capability"], (major, minor), plain["products"], plain["weight"])


def _tile(plain: dict[str, Any]) -> Configuration:
    tile = Configuration(**plain)
    if wrong := {name: value for name, value in plain.items() if value is not None and not isinstance(value, int)}:
        raise TypeError(f"tiles are made of integers, not of {wrong}")
    return tile
