"""Checkpoints that are whole or not there, and that are resumed only by the run that wrote them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.distributed import spread_like
from zoo.errors import Failure, ZooError
from zoo.files import open_to_others, room, sync, write_json

FILES = ("step.safetensors", "training.pt")


@dataclass
class Position:
    """Where a run stands: the next batch is ``batch`` of ``epoch``."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


def name_of(position: Position) -> str:
    """What the folder of a checkpoint is called."""
    return f"step_{position.step:08d}"


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    position: Position,
    identity: Mapping[str, Any],
    random: Sequence[Mapping[str, Any]],
    *,
    keep: int,
) -> Path:
    """Write ``folder/step_<n>`` beside its final name and rename it, then remove all but the newest ``keep``.

    Args:
        folder: Of the run's checkpoints.
        state: Of model and objective in one module.
        optimizer: Its state.
        position: Of the run.
        identity: What a resuming run must agree with.
        random: `random_state` of each process.
        keep: At least 1.

    Raises:
        Failure: If it cannot be written, as on a full disk; what stood there before stands.
    """
    final = folder / name_of(position)
    beside = folder / f".{final.name}.tmp"
    try:
        for left in folder.glob(".step_*.tmp"):  # by a run that was killed
            shutil.rmtree(left)
        beside.mkdir(parents=True)
        save_file(unshared(state), beside / FILES[0])
        open_to_others(beside / FILES[0])
        torch.save({"optimizer": optimizer, "random": list(random)}, beside / FILES[1])
        for name in FILES:
            sync(beside / name)
        hashes = {name: _hash(beside / name) for name in FILES}
        write_json(beside / "manifest.json", {"position": vars(position), "identity": identity, "sha256": hashes})
        beside.rename(final)
        sync(folder)
    except (OSError, SafetensorError, RuntimeError) as e:  # each library has its own way of saying that the disk is full
        shutil.rmtree(beside, ignore_errors=True)
        raise Failure(f"checkpoint {final} could not be written ({e}); {_room(folder)}") from e
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.tmp"))  # renamed first: killed half-way, it leaves no half a checkpoint
    return final


def _room(folder: Path) -> str:
    """What stands in a run's folder of checkpoints, and what the disk has left."""
    found = checkpoints(folder)
    stands = f"{found[-1]} stands, so the same command goes on from there" if found else "there is no earlier one"
    return f"{stands}; {room(folder)}: make room, or write another out=..."


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under ``folder``, oldest first; what a killed run left unfinished has another name."""
    return sorted(folder.glob("step_*"))


def load_checkpoint(
    path: Path, step: nn.Module, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any], *, process: int = 0
) -> Position:
    """Put a run back to where ``path`` was written, random numbers included.

    Raises:
        Failure: If a file of it is missing or damaged.
        ZooError: If it belongs to another recipe, other data or other code.
    """
    manifest = _manifest(path)
    check_same_run(f"checkpoint {path}", manifest["identity"], identity)
    state = torch.load(path / FILES[1], weights_only=True, map_location="cpu")
    try:
        own, weights = step.state_dict(), load_file(path / FILES[0], device="cpu")
        step.load_state_dict({name: spread_like(value, own.get(name)) for name, value in weights.items()})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in state["optimizer"]["state"].items():
            moments.update({name: spread_like(value, parameters[i]) for name, value in moments.items()})
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, IndexError) as e:  # names or shapes that differ
        raise ZooError(f"checkpoint {path} was written by other code of this model: {e}\nstart over with --fresh") from e
    set_random_state(state["random"][process])
    return Position(**manifest["position"])


def _manifest(path: Path) -> dict[str, Any]:
    advice = f"remove {path} to go on from the checkpoint before it, or start over with --fresh"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        damaged = [name for name, digest in manifest["sha256"].items() if not (path / name).is_file() or _hash(path / name) != digest]
    except (OSError, ValueError, KeyError) as e:
        raise Failure(f"checkpoint {path} has no readable manifest ({e}): {advice}") from e
    if damaged:
        raise Failure(f"checkpoint {path} is damaged: {', '.join(damaged)} differs from what was written; {advice}")
    return manifest


def check_same_run(what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare what decides the weights of ``what``, found in the run folder, with what decides them now.

    Raises:
        ZooError: Naming every difference.
    """
    there, here = _flat(there), _flat(json.loads(json.dumps(here)))
    keys = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
    if keys:
        differ = [f"{k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in keys[:10]]
        way = f"start it with as many processes as there (accelerate launch --num_processes {there.get('processes')}), "
        advice = f"{way if keys == ['processes'] else ''}write another out=..., or start over with --fresh"
        raise ZooError("\n".join([f"{what} belongs to another run:", *(f"  {line}" for line in differ), advice]))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` as safetensors takes it: contiguous, on the CPU, tied tensors each with a copy of its own."""
    seen: set[int] = set()
    out = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return out


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def random_state() -> dict[str, Any]:
    """What this process will draw from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Draw from here on what was drawn from there on."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
