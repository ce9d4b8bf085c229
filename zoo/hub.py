"""Save and load whole models: weights, how the model was built, and how its inputs are prepared, in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.checkpoint import unshared
from zoo.config import split_spec
from zoo.errors import Failure, ZooError
from zoo.files import write_json
from zoo.registry import build, entry

WEIGHTS, ABOUT = "model.safetensors", "model.json"
_ENTRIES = ("spec", "trained", "preprocessing")  # of the latter


def save(model: Any, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write a model that was built by `zoo.build`, so that `load` gives it back without a network.

    Args:
        model: An ``nn.Module`` with ``spec``, ``trained``, ``processor`` and ``parts``, as `zoo.types.Model` says.
        folder: Made if missing; ``model.json`` is written last, so a folder that has it is whole.
        state: The weights, where those in the model are spread over processes; None: the model's own.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = dict(model.spec)
    for key, part in model.parts().items():
        if own := part.portable():
            name, given = split_spec(spec.get(key, _default(model, key)))
            spec[key] = {"name": name, **given, **own}
    for left in folder.glob(f"{WEIGHTS}.*.tmp"):  # by a save that was killed
        left.unlink()
    beside = folder / f"{WEIGHTS}.{os.getpid()}.tmp"
    save_file(unshared(_plain(model) if state is None else state), beside)
    (folder / ABOUT).unlink(missing_ok=True)  # until the new one is there, the folder is no model
    beside.replace(folder / WEIGHTS)
    write_json(folder / ABOUT, {"spec": spec, "trained": model.trained, "preprocessing": model.processor.config()})
    return folder


def load(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """The model that `save`, or a training run, left in ``folder``, in eval mode.

    Raises:
        Failure: If one of its files is damaged.
        ZooError: If the folder holds no whole model, its weights do not fit, or its inputs would be prepared in another way.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file() or not (folder / WEIGHTS).is_file():
        there = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else None
        seen = "which does not exist" if there is None else f"which holds {', '.join(there) or 'nothing'}"
        raise ZooError(f"no model in {folder}, {seen}: a run folder has {ABOUT} and {WEIGHTS} once its training is finished")
    about, state = _read(folder)
    name, keywords = split_spec(about["spec"])
    model = build(name, **keywords)
    try:
        model.load_state_dict(state, assign=True)  # assign: a large model was built without memory
    except RuntimeError as e:  # names or shapes that differ
        raise ZooError(f"{folder / WEIGHTS} does not fit the model that {ABOUT} describes: {e}") from e
    _same_preprocessing(folder, about["preprocessing"], json.loads(json.dumps(model.processor.config())))
    model.trained = about["trained"]
    return model.to(device).eval()


def _plain(model: Any) -> dict[str, Tensor]:
    """The weights of a model, with those of its low-rank adapters merged into them."""
    state = model.state_dict()
    if not any(".lora_A." in name for name in state):
        return state
    from zoo.lora import merged_state  # peft takes seconds to import, and few models need it

    return merged_state(model, state)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How the model was built, and its weights."""
    advice = "copy the folder again from where it was trained"
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        lacks = [key for key in _ENTRIES if key not in about]
    except (ValueError, TypeError) as e:
        raise Failure(f"{folder / ABOUT} is damaged ({e}): {advice}") from e
    if lacks:
        raise Failure(f"{folder / ABOUT} lacks {', '.join(lacks)}: {advice}")
    try:
        return about, load_file(folder / WEIGHTS)
    except SafetensorError as e:
        raise Failure(f"{folder / WEIGHTS} is damaged ({e}): {advice}") from e


def _same_preprocessing(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differ = [f"{k}: {there.get(k)!r} then, {here.get(k)!r} now" for k in {*there, *here} if there.get(k) != here.get(k)]
    if differ:
        raise ZooError(f"{folder}: this version of the zoo would prepare inputs in another way than training did: {'; '.join(differ)}")


def _default(model: Any, key: str) -> Any:
    return signature(entry("model", model.spec["name"]).maker).parameters[key].default
