"""Save and load whole models: weights, how the model was built, and how its inputs are prepared, in one folder, here or on a hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.abilities import Converted
from zoo.card import LIBRARY, card
from zoo.checkpoint import unshared
from zoo.config import split_spec
from zoo.errors import Failure, ZooError
from zoo.files import open_to_others, room, sync, write_json
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

    Raises:
        Failure: If it cannot be written, as on a full disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = dict(model.spec)
    for key, part in model.parts().items():
        if isinstance(part, Mapping):
            given = spec.get(key, _default(model, key))
            spec[key] = {own: _portable(given[own], made) for own, made in part.items()}
        elif part.portable():
            spec[key] = _portable(spec.get(key, _default(model, key)), part)
    for left in folder.glob(f"{WEIGHTS}.*.tmp"):  # by a save that was killed
        left.unlink()
    beside = folder / f"{WEIGHTS}.{os.getpid()}.tmp"
    state = unshared(_plain(model) if state is None else state)
    try:
        save_file(state, beside)
        open_to_others(beside)
        sync(beside)
        (folder / ABOUT).unlink(missing_ok=True)  # until the new one is there, the folder is no model
        beside.replace(folder / WEIGHTS)
        drawn = {"drawn": list(model.drawn)} if isinstance(model, Converted) and model.drawn else {}
        write_json(folder / ABOUT, {"spec": spec, "trained": model.trained, "preprocessing": model.processor.config(), **drawn})
    except (OSError, SafetensorError) as e:  # each library has its own way of saying that the disk is full
        raise Failure(f"model {folder} could not be written ({e}); {room(folder)}: make room, and do the same again") from e
    finally:
        beside.unlink(missing_ok=True)
    return folder


def load(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """The model that `save`, or a training run, left in ``folder``, in eval mode.

    Raises:
        Failure: If one of its files is damaged.
        ZooError: If the folder holds no whole model, its weights do not fit, or its inputs would be prepared in another way.
    """
    folder = _whole(Path(folder))
    about, state = _read(folder)
    name, keywords = split_spec(about["spec"])
    model = build(name, **keywords)
    try:
        model.load_state_dict(state, assign=True)  # assign: a large model was built without memory
    except RuntimeError as e:  # names or shapes that differ
        raise ZooError(f"{folder / WEIGHTS} does not fit the model that {ABOUT} describes: {e}") from e
    _same_preprocessing(folder, about["preprocessing"], json.loads(json.dumps(model.processor.config())))
    model.trained = about["trained"]
    if isinstance(model, Converted):
        model.drawn = about.get("drawn", [])
    return model.to(device).eval()


def model_hash(folder: str | Path) -> str:
    """The hash of a saved model: of how it was built, and of its weights. What is made from it says so by this.

    Raises:
        ZooError: If the folder holds no whole model.
    """
    folder = _whole(Path(folder))
    total = hashlib.sha256()
    for name in (ABOUT, WEIGHTS):
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """The model of a folder, or of a repository of the Hugging Face hub, in eval mode.

    Args:
        name: A folder that `save` wrote, a run folder, or ``org/name``; a folder wins over a repository.
        revision: Of the repository: a branch, a tag or a commit.
        local_files_only: Take what the cache has, and ask no network.
        force_download: Fetch again what the cache has.
        cache_dir: Where the hub's cache lies; None: where huggingface_hub has it.
        token: Of a private repository; None: the one of ``hf auth login``.
        device: Where the model is put.

    Raises:
        Failure: If a file is damaged.
        ZooError: If the repository cannot be had, or what `load` says.
    """
    if Path(name).is_dir():
        return load(name, device)
    try:
        folder = snapshot_download(
            str(name),
            revision=revision,
            local_files_only=local_files_only,
            force_download=force_download,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=[ABOUT, WEIGHTS],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as e:  # refused, no name of a repository, not in the cache
        reason = str(e).strip().partition("\n")[0]
        raise ZooError(
            f"no model {str(name)!r}: it is no folder, and from the hub it could not be had ({reason}): check the name, "
            "fetch it once with a network, or name a folder"
        ) from e
    return load(folder, device)


class Hosted(ModelHubMixin, library_name=LIBRARY):
    """What huggingface_hub's mixin gives a model: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

    What they write and read is what `save` writes and `load` reads, with a page ``README.md`` beside it.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's own looks for a config.json first, and offline fails without one
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """`zoo.hub.from_pretrained`, for a model of this class.

        Raises:
            ZooError: If what lies there is a model of another class, or what the function says.
        """
        model = from_pretrained(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        if not isinstance(model, cls):
            raise ZooError(
                f"{pretrained_model_name_or_path} holds a {type(model).__name__}, not a {cls.__name__}: write zoo.from_pretrained"
            )
        return model

    def generate_model_card(self, run: str | Path | None = None, *, repo: str | None = None, licence: str | None = None) -> ModelCard:
        """The page `zoo.card.card` writes; these are the ``model_card_kwargs`` of ``save_pretrained`` and ``push_to_hub``."""
        return ModelCard(card(self, run, repo=repo, licence=licence))

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, save_directory)

    @classmethod
    def _is_jsonable(cls, value: Any) -> bool:
        """Never: model.json says how the model was built, and the mixin is to keep no second account in a config.json."""
        return False


def _portable(spec: Any, part: Any) -> Any:
    """The setting that named a part, with what rebuilds it without a network."""
    own = part.portable()
    if not own:
        return spec
    name, given = split_spec(spec)
    return {"name": name, **given, **own}


def _plain(model: Any) -> dict[str, Tensor]:
    """The weights of a model, with those of its low-rank adapters merged into them."""
    state = model.state_dict()
    if not any(".lora_A." in name for name in state):
        return state
    from zoo.lora import merged_state  # peft takes seconds to import, and few models need it

    return merged_state(model, state)


def _whole(folder: Path) -> Path:
    """``folder``, if a model is in it."""
    if not (folder / ABOUT).is_file() or not (folder / WEIGHTS).is_file():
        there = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else None
        seen = f"which holds {', '.join(there) or 'nothing'}" if there is not None else "which does not exist"
        seen = "which is a file" if folder.is_file() else seen
        raise ZooError(f"no model in {folder}, {seen}: a run folder has {ABOUT} and {WEIGHTS} once its training is finished")
    return folder


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
