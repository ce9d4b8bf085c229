"""Stages of training: a run before this one, found in a cache or trained now, gives parts of its model to this one's."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.config import split_spec
from zoo.errors import ZooError, unknown
from zoo.files import alone, write_json
from zoo.hub import ABOUT, WEIGHTS, model_hash
from zoo.positions import PLACES, resampled
from zoo.recipe import Recipe, load_recipe, values
from zoo.registry import build, make
from zoo.relative_positions import RelativePositions
from zoo.stages import Stage
from zoo.types import Data

logger = logging.getLogger("zoo.train")
CODE = 1  # raise it when training comes to give other weights from the same recipe and data: all caches are stale then
SEAL = "stage.json"  # written last

Train = Callable[..., Any]  # `zoo.train.train`, which stands above this file
Identify = Callable[[Recipe], dict[str, Any]]  # `zoo.train.identity_of`, likewise


class _Missing(NamedTuple):
    """A stage that is to be trained."""

    stage: Stage
    asks: Recipe  # whose stage it is
    own: Recipe
    data: Data
    key: str
    folder: Path


def prepare(recipe: Recipe, data: Data, data_root: Path | None, *, train: Train, identify: Identify) -> list[Path]:
    """The run folder of each stage of a recipe; those that are not in the cache are trained now, into a folder that is renamed when whole.

    One process trains a stage, others that need it wait; what was interrupted goes on from its last checkpoint.

    Args:
        recipe: Whose ``init_from`` is asked.
        data: Its data set; a stage on the same settings uses it too.
        data_root: For a stage on other data.
        train: Trains a recipe.
        identify: What of a recipe decides the weights.

    Raises:
        ZooError: If stages ask for each other in a circle, one of the two models lacks a part, or several processes would train a stage.
    """
    folders, missing = _found(recipe, data, data_root, identify, ())
    if missing and PartialState().num_processes > 1:
        says = "is not there yet, and a stage is trained by one process: run this recipe once without a launcher"
        raise ZooError(f"init_from: {missing[0].folder} {says}")
    for each in missing:  # all of them before one is trained, which may take days
        check_parts(each.stage, _built(each.asks.model), _built(each.own.model))
    for each in missing:
        _make(replace(each.own, out=each.folder), each.data, data_root, each.key, train)
    return folders


def _found(
    recipe: Recipe, data: Data, data_root: Path | None, identify: Identify, before: Sequence[str]
) -> tuple[list[Path], list[_Missing]]:
    """The folders of a recipe's stages, and which of them, and of theirs, are not there: each behind those that it needs.

    Args:
        recipe: As of `prepare`.
        data: Likewise.
        data_root: Likewise.
        identify: Likewise.
        before: Stages that ask for this recipe, outermost first.
    """
    folders: list[Path] = []
    missing: list[_Missing] = []
    for stage in recipe.init_from:
        if stage.recipe is None:
            folders.append(_given(stage))
            continue
        if stage.recipe in before:
            raise ZooError(f"init_from: stages in a circle: {' <- '.join([*before, stage.recipe])}: let one of them start from nothing")
        own = stage_recipe(stage, recipe)
        seen = data if own.data == recipe.data else make("data", own.data, data_root)
        inner, below = _found(own, seen, data_root, identify, [*before, stage.recipe])
        missing += below
        key = _key(own, seen, inner, identify)
        folder = stage.cache / f"{Path(stage.recipe).stem}-{key[:16]}"
        if not _is_whole(folder, key):
            missing.append(_Missing(stage, recipe, own, seen, key, folder))
        folders.append(folder)
    return folders, missing


def _built(spec: Any) -> nn.Module:
    name, settings = split_spec(spec)
    model: nn.Module = build(name, **settings)
    return model


def check_parts(stage: Stage, model: nn.Module, theirs: nn.Module) -> None:
    """Look whether ``model`` and that of the stage, which may both be without weights, have the parts that it shall give.

    Raises:
        ZooError: If one of them has not.
    """
    for whose, of in (("this model", model), ("its model", theirs)):
        for part in stage.parts:
            _part(stage, part, whose, dict(of.named_modules()))


def _part(stage: Stage, part: str, whose: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    if part not in modules:
        choices = [name for name in modules if name and "." not in name]
        raise ZooError(f"init_from: {stage.source}: {unknown(f'part of {whose}', part, choices)}")
    return modules[part]


def take_parts(model: Any, stages: Sequence[Stage], folders: Sequence[Path]) -> None:
    """Copy the weights of each stage's parts into ``model``; a later stage has the last word.

    Where this model looks at larger pictures, positions of patches are resampled, and tables of relative ones resized.

    Raises:
        ZooError: If a part is in one of the two models only, or has other shapes there, or relative positions of other texts.
    """
    modules = dict(model.named_modules())
    for stage, folder in zip(stages, folders, strict=True):
        state = load_file(folder / WEIGHTS)
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8")) if (folder / ABOUT).is_file() else {}
        for part in stage.parts:
            module = _part(stage, part, "this model", modules)
            given = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
            for name, own in module.state_dict().items():
                place = f"{part}.{name}"
                if name in given and place in PLACES and given[name].shape != own.shape:
                    given[name] = resampled(given[name], own.shape[-2], antialias=PLACES[place])
            if isinstance(module, RelativePositions):
                given |= _relative(stage, part, module, given, folder)
            if wrong := _misfit(part, module.state_dict(), given):
                other = "" if stage.recipe is not None else _other(split_spec(about["spec"])[0], model.spec["name"])
                raise ZooError(f"init_from: {stage.source}: its {part!r} does not fit this model's ({wrong}): {other}{_remedy(stage)}")
            module.load_state_dict(given)
            if bare := [name for name in about.get("drawn", ()) if name.startswith(f"{part}.")]:
                logger.warning(
                    "init_from: %s: %d weights of its %r, such as %s, were drawn at random: what it was converted from had none",
                    *(stage.source, len(bare), part, bare[0]),
                )


def _relative(stage: Stage, part: str, module: RelativePositions, given: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The stage's table, read as the pictures of its own model say, as one of this model's pictures; {} where there is none."""
    spec = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["spec"]
    with torch.device("meta"):
        before = dict(_built(spec).named_modules()).get(part)
    if not isinstance(before, RelativePositions):
        return {}
    try:
        return {key: module.of(table, before.window) for key, table in given.items()}
    except ZooError as e:
        raise ZooError(f"init_from: {stage.source}: its {part!r} does not fit this model's: {e}") from e


def _misfit(part: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first weight of a part that is not in both models in one shape, and how many more; "" where all are."""
    wrong = [f"{part}.{name} is not there" for name in own if name not in given]
    wrong += [f"{part}.{name} is only there" for name in given if name not in own]
    for name in own:
        if name in given and own[name].shape != given[name].shape:
            wrong.append(f"{part}.{name} is {tuple(given[name].shape)}, and here {tuple(own[name].shape)}")
    return "" if not wrong else wrong[0] if len(wrong) == 1 else f"{wrong[0]}; {len(wrong) - 1} more differ"


def _other(theirs: str, own: str) -> str:
    """What to say before the remedy where the model of a folder is another than this recipe's."""
    if theirs == own:
        return ""
    return f"it holds a {theirs}, and this recipe's model is a {own}: name another folder; where both are to have that part, "


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


def stage_recipe(stage: Stage, recipe: Recipe) -> Recipe:
    """The recipe of a stage that names one, following ``recipe``, whose stage it is, in what they share.

    Raises:
        ZooError: If there is no such recipe, or ``recipe`` has not all that is shared.
    """
    assert stage.recipe is not None
    tree = values(recipe)
    try:
        shared = {key: reduce(lambda at, name: at[name], key.split("."), tree) for key in stage.share}
    except (KeyError, TypeError) as e:
        raise ZooError(f"init_from: {stage.source}: share names {stage.share}, and this recipe does not have all of it: missing {e}") from e
    return load_recipe(stage.recipe, *(f"{key}={json.dumps(value)}" for key, value in shared.items()))


def _key(recipe: Recipe, data: Data, inner: Sequence[Path], identify: Identify) -> str:
    """Of everything that decides a stage's weights: settings, data, the stages before it, and code."""
    tree = {k: v for k, v in identify(recipe).items() if k != "init_from"}
    stages = [
        {"parts": stage.parts, "from": folder.name if stage.recipe is not None else model_hash(folder)}
        for stage, folder in zip(recipe.init_from, inner, strict=True)
    ]
    code = {"stages": CODE, "zoo": version("multimodal-zoo"), "torch": torch.__version__}
    decides = {"recipe": tree, "data": data.fingerprint, "stages": stages, "code": code}
    if tokenizers := {folder: model_hash(folder) for folder in _tokenizers(tree["objective"])}:
        decides["tokenizers"] = tokenizers
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _tokenizers(settings: Any) -> Iterator[str]:
    """The folders of visual tokenizers that an objective, or one inside it, names; of one that is not there it says so itself."""
    if isinstance(settings, Mapping):
        folder = settings.get("tokenizer")
        if isinstance(folder, str) and (Path(folder) / ABOUT).is_file():
            yield folder
    for inner in settings.values() if isinstance(settings, Mapping) else settings if isinstance(settings, list | tuple) else ():
        yield from _tokenizers(inner)


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
