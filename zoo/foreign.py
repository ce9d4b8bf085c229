"""Weights that other programs wrote: read without running what is in them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zoo.errors import Failure, ZooError

FOLDER_FILES = (  # of a folder, the first that is there
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
ENDS = (".safetensors", ".pt", ".pth", ".bin")
CONFIGS = ("config.json", "open_clip_config.json")


class Foreign(NamedTuple):
    """A file or folder of weights."""

    state: dict[str, Tensor]  # by the names of the file; of real numbers float32
    config: Mapping[str, Any]  # what lay beside them; {} for nothing
    path: Path


def read_foreign(path: str | Path) -> Foreign:
    """The weights in a file or folder of another program.

    Args:
        path: A ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file; or a folder with one of `FOLDER_FILES`, or with a single such file,
            and perhaps with its ``config.json``.

    Raises:
        Failure: If a file is damaged.
        ZooError: If there is none, or it holds more than tensors and plain values.
    """
    path = Path(path)
    config: Mapping[str, Any] = {}
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        found = found or [file for file in sorted(path.iterdir()) if file.suffix in ENDS and file.is_file()]
        if not found:
            there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
            raise ZooError(f"no weights in {path}, which holds {there}: there should be {' or '.join(FOLDER_FILES[:3])}")
        if len(found) > 1 and found[0].name not in FOLDER_FILES:
            raise ZooError(f"{path} holds {', '.join(file.name for file in found[:10])}: name the file of weights, such as {found[0]}")
        config, path = _config(path), found[0]
    elif not path.is_file():
        raise ZooError(f"no file or folder {path}: name one with weights, a .safetensors, .pt or .pth, or a folder with a config.json")
    state = _unwrapped(_loaded(path), path)
    return Foreign({name: x.float() if x.is_floating_point() else x for name, x in state.items()}, config, path)


def _config(folder: Path) -> Mapping[str, Any]:
    for name in CONFIGS:
        if (folder / name).is_file():
            try:
                config = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as e:
                raise Failure(f"{folder / name} is damaged ({e}): copy it again from where it comes from") from e
            if not isinstance(config, dict):
                raise Failure(f"{folder / name} is damaged (it holds a {type(config).__name__}): copy it again from where it comes from")
            return config
    return {}


def _loaded(path: Path) -> Any:
    """What is in a file, and nothing of it was run."""
    advice = "copy it again from where it comes from"
    if path.name.endswith(".index.json"):
        return _shards(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as e:
            raise Failure(f"{path} is damaged ({e}): {advice}") from e
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())
        if scripted:
            raise ZooError(
                f"{path} is a TorchScript archive, a program with weights in it, which is not run here: where you trust it, write\n"
                f"  torch.save(torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), 'weights.pt')\n"
                "in Python once, and name that file"
            )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as e:
        raise ZooError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not run here ({_sentence(e)}): "
            "where you trust it, write\n"
            f"  torch.save(torch.load({str(path)!r}, map_location='cpu', weights_only=False)['model'], 'weights.pt')\n"
            "in Python once, and name that file"
        ) from e
    except (RuntimeError, EOFError, ValueError, KeyError) as e:  # of a file that ends too soon; of one that is no file of torch's
        raise Failure(f"{path} is damaged, or no file of weights ({_sentence(e)}): {advice}") from e


def _sentence(e: Exception) -> str:
    """The first of what torch says, of which the rest is advice that does not fit here."""
    said = str(e).strip().partition("\n")[0].partition(". ")[0]
    return said if " " in said else "it ends too soon" if isinstance(e, EOFError) else "of no known form"


def _shards(index: Path) -> dict[str, Tensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Failure(f"{index} is damaged ({e}): copy it again from where it comes from") from e
    if lost := [name for name in files if not (index.parent / name).is_file()]:
        raise ZooError(f"{index} names {', '.join(lost)}, which {'is' if len(lost) == 1 else 'are'} not there: copy the whole folder")
    state: dict[str, Tensor] = {}
    for name in files:
        state |= _loaded(index.parent / name)
    if absent := sorted(set(places) - set(state)):
        raise Failure(f"{index} promises {absent[0]}, and {places[absent[0]]} has no such tensor: copy the whole folder again")
    return state


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name, out of what training programs put around them."""
    for key in ("state_dict", "model", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ZooError(f"{path} holds a {type(loaded).__name__}, not tensors by name: save a state_dict()")
    odd = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if odd or not loaded:
        raise ZooError(f"{path} holds {'nothing' if not loaded else f'{odd[0]!r}, which is no tensor'}: save a state_dict() alone")
    prefix = "module." if all(name.startswith("module.") for name in loaded) else ""  # of training on several devices
    return {str(name).removeprefix(prefix): tensor for name, tensor in loaded.items()}


def layers(names: Iterable[str], prefix: str) -> int:
    """How many layers ``<prefix><number>.`` there are."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def entry(state: Mapping[str, Tensor], name: str, where: Path, axes: int | None = None) -> Tensor:
    """What is under a name, a tensor of that many axes; None: of any number.

    Raises:
        ZooError: If nothing is, or a tensor of more or fewer.
    """
    if name not in state:
        raise ZooError(f"{where} has no {name}, and others of its model: the file is not whole")
    if axes is not None and state[name].ndim != axes:
        raise ZooError(f"{where}: {name} is of shape {tuple(state[name].shape)}, and should have {axes} axes: the file is damaged")
    return state[name]


def side(places: int, name: str, where: Path) -> int:
    """Of a square of that many patches, of which the tensor of that name has the positions.

    Raises:
        ZooError: If it is none.
    """
    found = round(max(places, 0) ** 0.5)
    if found < 1 or found * found != places:
        raise ZooError(f"{where}: {name}: {max(places, 0)} positions of patches make no square")
    return found
