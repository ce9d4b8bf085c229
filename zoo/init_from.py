"""Stages of training: a run before this one, found in a cache or trained now, gives parts of its model to this one's."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.errors import ZooError, unknown
from zoo.files import alone, write_json
from zoo.hub import ABOUT, WEIGHTS, model_hash
from zoo.positions import PLACES, resampled
from zoo.recipe import Recipe, load_recipe, values
from zoo.registry import make
from zoo.relative_positions import RelativePositions, offsets, resized
from zoo.stages import Stage
from zoo.types import Data

logger = logging.getLogger("zoo.train")
CODE = 1  # raise it when training comes to give other weights from the same recipe and data: all caches are stale then
SEAL = "stage.json"  # written last

Train = Callable[..., Any]  # `zoo.train.train`, which stands above this file
Identify = Callable[[Recipe], dict[str, Any]]  # `zoo.train.identity_of`, likewise


def prepare(
    recipe: Recipe, data: Data, data_root: Path | None, *, train: Train, identify: Identify, before: Sequence[str] = ()
) -> list[Path]:
    """The run folder of each stage of a recipe; those that are not in the cache are trained now, into a folder that is renamed when whole.

    One process trains a stage, others that need it wait; what was interrupted goes on from its last checkpoint.

    Args:
        recipe: Whose ``init_from`` is asked.
        data: Its data set; a stage on the same settings uses it too.
        data_root: For a stage on other data.
        train: Trains a recipe.
        identify: What of a recipe decides the weights.
        before: Stages that ask for this recipe, outermost first.

    Raises:
        ZooError: If stages ask for each other in a circle, a stage lacks a part, or several processes would train one.
    """
    folders = []
    for stage in recipe.init_from:
        if stage.recipe is None:
            folders.append(_given(stage))
            continue
        if stage.recipe in before:
            raise ZooError(f"init_from: stages in a circle: {' <- '.join([*before, stage.recipe])}: let one of them start from nothing")
        own = _recipe_of(stage, recipe)
        seen = data if own.data == recipe.data else make("data", own.data, data_root)
        inner = prepare(own, seen, data_root, train=train, identify=identify, before=[*before, stage.recipe])
        key = _key(own, seen, inner, identify)
        folder = stage.cache / f"{Path(stage.recipe).stem}-{key[:16]}"
        if not _is_whole(folder, key):
            _make(replace(own, out=folder), seen, data_root, key, train)
        folders.append(folder)
    return folders


def take_parts(model: nn.Module, stages: Sequence[Stage], folders: Sequence[Path]) -> None:
    """Copy the weights of each stage's parts into ``model``; a later stage has the last word.

    Where this model looks at larger pictures, positions of patches are resampled, and tables of relative ones resized.

    Raises:
        ZooError: If a part is in one of the two models only, or has other shapes there.
    """
    modules = dict(model.named_modules())
    for stage, folder in zip(stages, folders, strict=True):
        state = load_file(folder / WEIGHTS)
        drawn = json.loads((folder / ABOUT).read_text(encoding="utf-8")).get("drawn", ()) if (folder / ABOUT).is_file() else ()
        for part in stage.parts:
            if part not in modules:
                choices = [name for name in modules if name and "." not in name]
                raise ZooError(f"init_from: {stage.source}: {unknown('part of this model', part, choices)}")
            given = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
            for name, own in modules[part].state_dict().items():
                if name in given and given[name].shape != own.shape:
                    given[name] = _of_other_pictures(modules[part], f"{part}.{name}", own, given[name])
            try:
                modules[part].load_state_dict(given)
            except RuntimeError as e:  # names or shapes that differ
                raise ZooError(f"init_from: {stage.source}: its {part!r} does not fit this model's ({_short(e)}): {_remedy(stage)}") from e
            if bare := [name for name in drawn if name.startswith(f"{part}.")]:
                logger.warning(
                    "init_from: %s: %d weights of its %r, such as %s, were drawn at random: what it was converted from had none",
                    *(stage.source, len(bare), part, bare[0]),
                )


def _of_other_pictures(module: nn.Module, name: str, own: Tensor, given: Tensor) -> Tensor:
    """Positions of the patches of smaller or larger pictures, as of this model's; all else as it was given."""
    if name in PLACES:
        return resampled(given, own.shape[-2])
    if isinstance(module, RelativePositions):
        others = len(own) - offsets(module.window)  # rows of class tokens and texts
        side = (math.isqrt(max(len(given) - others, 0)) + 1) // 2
        if len(given) - others == offsets((side, side)):
            return resized(given, (side, side), module.window)
    return given


def _short(error: RuntimeError) -> str:
    said = str(error).strip().splitlines()[-1].strip()
    return said if len(said) < 200 else f"{said[:200]} ..."


def _remedy(stage: Stage) -> str:
    if stage.recipe is None:
        return (
            f"write the settings of its model.json into this recipe's model, or leave {'it' if len(stage.parts) == 1 else 'that part'} out"
        )
    return f"write the same settings in both recipes, or name them in share (now {', '.join(stage.share) or 'nothing'})"


def _given(stage: Stage) -> Path:
    """The folder of a stage that names one, which is there and whole."""
    folder = Path(stage.source)
    try:
        model_hash(folder)
    except ZooError as e:
        raise ZooError(f"init_from: {e}") from e
    return folder


def _recipe_of(stage: Stage, recipe: Recipe) -> Recipe:
    """The stage's own recipe, following ``recipe`` in what they share."""
    tree = values(recipe)
    try:
        shared = {key: reduce(lambda at, name: at[name], key.split("."), tree) for key in stage.share}
    except (KeyError, TypeError) as e:
        raise ZooError(f"init_from: {stage.source}: share names {stage.share}, and this recipe does not have all of it: missing {e}") from e
    return load_recipe(stage.source, *(f"{key}={json.dumps(value)}" for key, value in shared.items()))


def _key(recipe: Recipe, data: Data, inner: Sequence[Path], identify: Identify) -> str:
    """Of everything that decides a stage's weights: settings, data, the stages before it, and code."""
    tree = {k: v for k, v in identify(recipe).items() if k != "init_from"}
    stages = [
        {"parts": stage.parts, "from": folder.name if stage.recipe is not None else model_hash(folder)}
        for stage, folder in zip(recipe.init_from, inner, strict=True)
    ]
    code = {"stages": CODE, "zoo": version("multimodal-zoo"), "torch": torch.__version__}
    decides = {"recipe": tree, "data": data.fingerprint, "stages": stages, "code": code}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _is_whole(folder: Path, key: str) -> bool:
    """Whether the cache holds this stage as it was written; what is damaged is taken out of it."""
    if not folder.is_dir():
        return False
    try:
        seal: Mapping[str, Any] = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if seal["key"] == key and all(_hash(folder / name) == digest for name, digest in seal["sha256"].items()):
            return True
    except (OSError, ValueError, KeyError, TypeError) as e:
        logger.warning("the stage in %s has no readable %s (%s)", folder, SEAL, e)
    logger.warning("the stage in %s is damaged: it is thrown away and trained again", folder)
    shutil.rmtree(folder)
    return False


def _make(recipe: Recipe, data: Data, data_root: Path | None, key: str, train: Train) -> None:
    folder = recipe.out
    if PartialState().num_processes > 1:
        raise ZooError(
            f"init_from: {folder} is not there yet, and a stage is trained by one process: run this recipe once without a launcher"
        )
    with alone(folder.with_name(f".{folder.name}.lock"), f"waiting for another process, which trains the stage {folder}"):
        if _is_whole(folder, key):
            return
        logger.info("training the stage %s", folder)
        beside = folder.with_name(f".{folder.name}.part")  # of the same key in every process: what was interrupted goes on
        train(replace(recipe, out=beside), loaded=data, data_root=data_root)
        write_json(beside / SEAL, {"key": key, "sha256": {name: _hash(beside / name) for name in (WEIGHTS, ABOUT)}})
        beside.rename(folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # without a step there are none


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
