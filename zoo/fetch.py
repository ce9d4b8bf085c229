"""What a recipe reads from a hub, where it lies on this machine, and how it gets there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from zoo.bundle import pack
from zoo.config import hints_of, part_kind, parts_in, settings, split_spec
from zoo.errors import Failure
from zoo.recipe import Recipe, arm, dump
from zoo.registry import entry, lookup
from zoo.types import Remote

SMALL = ("*.json", "*.txt", "*.model")  # configuration and vocabulary: fetched and bundled along with whatever is wanted of a repository


class Found(NamedTuple):
    """One thing that a recipe reads."""

    remote: Remote
    folder: Path | None  # where it lies; None: it is not here
    reason: str = ""  # why it could not be fetched


def remotes_of(recipe: Recipe) -> list[Remote]:
    """All that the model of a recipe, its objective and its trained baselines read from a hub; each once, in that order.

    A part that is written and that the fusion leaves unused is among them.
    """
    arms = [arm(recipe, name) for name, says in recipe.baselines.items() if not isinstance(says, str)]
    specs = [(kind, spec) for r in (recipe, *arms) for kind, spec in (("model", r.model), ("objective", r.objective))]
    return list(dict.fromkeys(remote for kind, spec in specs for remote in remotes_in(kind, spec)))


def remotes_in(kind: str, spec: Any) -> Iterator[Remote]:
    """What one part reads, and the parts inside it."""
    name, given = split_spec(spec)
    known, (maker, carried) = entry(kind, name.partition(":")[0]), lookup(kind, name)
    chosen = {key: p.default for key, p in settings(maker).items()} | given | carried
    if known.remote is not None:
        yield from known.remote(chosen)
    hints = hints_of(maker)
    for key, value in chosen.items():
        inner = part_kind(hints.get(key))
        if inner is not None:
            for each in parts_in(hints.get(key), value).values():
                yield from remotes_in(inner, each)


def hub_cache() -> Path:
    """The folder in which the hub's library keeps what it fetched, as ``HF_HUB_CACHE`` or ``HF_HOME`` say."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def located(remote: Remote, cache: Path) -> Path | None:
    """The folder that holds all files of ``remote``: its own, or the snapshot of its repository in ``cache``; None if it is not here."""
    folder = Path(remote.repo) if Path(remote.repo).is_dir() else _snapshot(remote.repo, cache)
    return folder if folder is not None and _matching(folder, remote) else None


def fetch(recipe: Recipe, cache: Path) -> list[Found]:
    """Download what is not in ``cache`` yet.

    Args:
        recipe: Its model, objective and trained baselines are looked at.
        cache: The hub's cache folder.

    Returns:
        All that it reads, with its place.

    Raises:
        Failure: Naming everything that is neither here nor can be fetched, and why.
    """
    found = []
    for remote in remotes_of(recipe):
        folder, reason = located(remote, cache), ""
        if folder is None:
            reason = _download(remote, cache)
            folder = located(remote, cache)
        found.append(Found(remote, folder, reason))
    if missing := [f"  {f.remote.role} of {f.remote.repo}: {f.reason}" for f in found if f.folder is None]:
        raise Failure(
            f"{len(missing)} of {len(found)} things that this recipe reads are not here and could not be fetched\n"
            + "\n".join(missing)
            + "\nfetch them on a machine with a network: zoo fetch RECIPE --bundle bundle.tar, and here: zoo fetch --unpack bundle.tar"
        )
    return found


def bundle(recipe: Recipe, name: str, found: Sequence[Found], cache: Path, out: Path) -> Path:
    """Write what `fetch` found, and the recipe with every default written out, as one tar.

    Args:
        recipe: The recipe.
        name: The stem of its file in the bundle.
        found: Of `fetch`; what lies in folders of the user's own is left out, since a recipe names those by their path.
        cache: The hub's cache folder.
        out: The tar.
    """
    files = {}
    for each in found:
        assert each.folder is not None, each
        if each.folder.is_relative_to(cache):
            files[(each.folder.parent.parent / "refs/main").relative_to(cache).as_posix()] = each.folder.parent.parent / "refs/main"
            small = [p for p in each.folder.iterdir() if any(fnmatchcase(p.name, pattern) for pattern in SMALL)]
            files |= {p.relative_to(cache).as_posix(): p for p in [*_matching(each.folder, each.remote), *small]}
    return pack(out, (f"{name}.yaml", dump(recipe)), files)


def _snapshot(repository: str, cache: Path) -> Path | None:
    """The files of the main branch, as they were when they were fetched last."""
    home = cache / f"models--{repository.replace('/', '--')}"
    main = home / "refs/main"
    folder = home / "snapshots" / main.read_text().strip() if main.is_file() else None
    return folder if folder is not None and folder.is_dir() else None


def _matching(folder: Path, remote: Remote) -> list[Path]:
    """The files of ``remote`` by its first pattern that has any; [] if there are none, or not all parts of a weight file in parts."""
    for pattern in remote.files:
        files = sorted(p for p in folder.iterdir() if fnmatchcase(p.name, pattern) and p.is_file())  # a link into nothing is no file
        parts = {part for p in folder.glob(f"{pattern}.index.json") for part in json.loads(p.read_text())["weight_map"].values()}
        if files:
            return files if parts <= {p.name for p in files} else []
    return []


def _download(remote: Remote, cache: Path) -> str:
    """Fetch one thing; the reason if it cannot be had."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_OFFLINE:
        return "the hub's library is told to stay offline (HF_HUB_OFFLINE)"
    if "://" in remote.repo:
        return "it lies at an address of its own, not in the hub: download it and write pretrained: FILE"
    for pattern in remote.files:
        try:
            snapshot_download(remote.repo, cache_dir=cache, allow_patterns=[pattern, *SMALL], ignore_patterns=["*/*"])
        except (OSError, HFValidationError) as e:  # no network, no such repository, or one that needs a token
            return str(e).strip().partition("\n")[0]
        if located(remote, cache) is not None:
            return ""
    return f"its repository has no {' or '.join(remote.files)}"
