"""CapFilt: a captioner writes a text of each noisy picture, a filter throws away the texts that do not match, and a data set is left."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zoo.abilities import Captioning, Matching
from zoo.captions import caption, check_able
from zoo.config import split_spec
from zoo.data._captioned import SPLITS, Captioned
from zoo.data.capfilt import ABOUT, NEEDS, TEXTS, Arm, kept
from zoo.errors import Failure, ZooError, unknown
from zoo.files import write_bytes, write_json
from zoo.generation import check_room
from zoo.hub import load, model_hash
from zoo.models._encode import progress
from zoo.recipe import Recipe, load_recipe
from zoo.reranking import Library, match_chances
from zoo.run import load_data
from zoo.sections import Decoding
from zoo.types import Row

logger = logging.getLogger("zoo.capfilt")
NUCLEUS = Decoding(method="nucleus", nucleus=0.9, shortest=1, longest=20)
TRUSTED = "trusted"  # the split of this name, where a data set has one
_PART, _STEP = ".parts", 512  # where it is kept how far the work is; pictures of one file there


class Texts(NamedTuple):
    """The training texts of a noisy data set."""

    web: np.ndarray  # (n, 2) int64 picture and caption
    human: np.ndarray  # (h, 2) likewise, those that nobody doubts
    wrong: np.ndarray  # (n,) bool, which of the web are known to be wrong, where mistakes were planted
    pictures: np.ndarray  # (p,) int64, each picture of the web once


class Candidates(NamedTuple):
    """All texts that could be trained on, and what the filter says of them."""

    pairs: np.ndarray  # (m, 2) int64 picture of the web, counted among them, and text
    texts: list[str]
    origin: list[str]  # (m) web or synthetic
    scores: np.ndarray  # (m,) chance of a match; NaN where nothing was asked


def capfilt(
    recipe: Any,
    out: str | Path,
    *overrides: str,
    captioner: str | Path | None = None,
    filter: str | Path | None = None,
    data_root: str | Path | None = None,
    trusted: str | None = None,
    how: Decoding = NUCLEUS,
    prompt: str = "",
    threshold: float = 0.5,
    batch_size: int = 64,
    seed: int = 0,
    fresh: bool = False,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Write the folder that the data set ``capfilt`` reads; the same call again goes on where it was stopped.

    Li et al., BLIP: Bootstrapping language-image pre-training, 2022, https://arxiv.org/abs/2201.12086. Texts of the web are the training
    pairs that are not in the split ``trusted``. Synthetic texts, one for each of their pictures, and those of the web are judged by the
    filter; trusted texts are not. What the filter says is kept with each text, so that both arms alone can be had from one folder.

    Args:
        recipe: Whose ``data`` is bootstrapped: a file, the name of a shipped recipe, a mapping or a `Recipe`.
        out: The folder.
        *overrides: ``"data.learn=all"``.
        captioner: A run folder of a model that writes captions; None: nothing is written.
        filter: A run folder of a model that tells whether picture and text match; None: nothing is thrown away.
        data_root: The folder that holds the folders of data sets.
        trusted: The split of pairs to train on that nobody doubts, among the training pairs or beside them. None: the one of this name,
            ``trusted``, if the data set has it.
        how: The captioner's way of writing.
        prompt: Words that each synthetic text begins with.
        threshold: Texts with a smaller chance of a match are thrown away. It counts in the statistics; the data set has its own.
        batch_size: Pictures, or texts, at a time.
        seed: Of the draws.
        fresh: Throw away what the folder holds from other models or settings.
        show_progress: None: a bar when there is much to do and somebody watches.

    Returns:
        The statistics that stand in ``capfilt.json``.

    Raises:
        Failure: If a file of an earlier call is damaged.
        ZooError: If there is nothing to do, the data set has no noisy pairs, the trusted ones are there to measure on, a model lacks what
            it is asked for, or the folder holds texts of other models or settings.
    """
    if captioner is None and filter is None:
        raise ZooError("capfilt needs a captioner, a filter, or both: name their run folders with --captioner and --filter")
    if batch_size < 1:
        raise ZooError(f"batch_size = {batch_size}: write 1 or more")
    of = load_recipe(recipe, *overrides)
    data = load_data(of, data_root)
    if not isinstance(data, Captioned):
        raise ZooError(f"capfilt needs pictures with texts, and {split_spec(of.data)[0]} is none: name a recipe of a data set that is")
    trusted = TRUSTED if trusted is None and TRUSTED in data.splits else trusted
    noisy, out = _noisy(data, trusted, of.retrieve.splits), Path(out)
    names = {"captioner": captioner, "filter": filter}
    key = _key(of, data, names, trusted, how, prompt, seed)
    if not fresh and _said(out / ABOUT, key):
        return _statistics(pq.read_table(out / TEXTS), len(noisy.pictures), threshold, names)
    run = {role: load(path) if path is not None else None for role, path in names.items()}
    for role, ability in (("captioner", Captioning), ("filter", Matching)):
        if run[role] is not None:
            check_able(run[role], ability, f"the {role}")
    if run["captioner"] is not None:
        check_room(run["captioner"], how, run["captioner"].vocabulary.encode(prompt))
    parts = _prepared(out, key, fresh)
    made = _candidates(data, noisy, _Parts(parts, show_progress), run, how, prompt, seed, batch_size)
    table = _table(data, noisy, made)
    statistics = _statistics(table, len(noisy.pictures), threshold, names)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(out / TEXTS, sink.getvalue().to_pybytes())
    write_json(out / ABOUT, {**key, "statistics": statistics})
    shutil.rmtree(parts)
    return statistics


def _key(
    of: Recipe, data: Captioned, names: Mapping[str, Any], trusted: str | None, how: Decoding, prompt: str, seed: int
) -> dict[str, Any]:
    """All that decides the texts and what is said of them, as JSON gives it back."""
    key = {
        "source": of.data,
        "fingerprint": data.fingerprint,
        "trusted": trusted,
        **{role: None if run is None else model_hash(run) for role, run in names.items()},
        "how": vars(how) if names["captioner"] is not None else None,
        "prompt": prompt,
        "seed": seed,
    }
    return dict(json.loads(json.dumps(key)))


def _said(file: Path, key: Mapping[str, Any]) -> bool:
    """Whether a file says that the folder holds this very work.

    Raises:
        Failure: If it is damaged.
        ZooError: If the folder holds other work.
    """
    if not file.is_file():
        return False
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        differ = [name for name, value in key.items() if said.get(name) != value]
    except (ValueError, AttributeError) as e:
        raise Failure(f"{file} is damaged ({e}): write --fresh to start over") from e
    if differ:
        place = file.parent.parent if file.parent.name == _PART else file.parent
        raise ZooError(f"{place} holds texts that differ in {', '.join(differ)}: name another folder, or write --fresh to start over")
    return True


def _noisy(data: Captioned, trusted: str | None, measured: Sequence[str]) -> Texts:
    """What is to be bootstrapped.

    Raises:
        ZooError: If there is no such split, it is one to measure on, or all training pairs are in it.
    """
    if trusted is not None and trusted not in data.splits:
        raise ZooError(f"trusted: {unknown('split', trusted, data.splits)}")
    if trusted in {*measured, *SPLITS[1:]} - {"train"}:
        raise ZooError(f"trusted: split {trusted!r} is there to measure on, and what is trusted is trained on: name another one, or none")
    train, wrong = data.pairs("train"), data.planted("train")
    human = data.pairs(trusted) if trusted is not None else train[:0]
    known = {tuple(pair) for pair in human.tolist()}
    web = np.array([tuple(pair) not in known for pair in train.tolist()], dtype=bool)
    if not web.any():
        advice = "write data.learn=all" if trusted == TRUSTED else "name another split"
        raise ZooError(f"all {len(train)} training pairs are in the split {trusted!r}, so none is noisy: {advice}")
    return Texts(train[web], human, wrong[web], np.unique(train[web][:, 0]))


def _prepared(out: Path, key: Mapping[str, Any], fresh: bool) -> Path:
    """The folder in which the work is kept, for this very work.

    Raises:
        ZooError: If ``out`` holds other work, or is no folder for it.
    """
    if out.exists() and not out.is_dir():
        raise ZooError(f"--out {out} is a file: name a folder")
    parts = out / _PART
    if fresh:
        shutil.rmtree(parts, ignore_errors=True)
        for name in (ABOUT, TEXTS):
            (out / name).unlink(missing_ok=True)
    elif not _said(parts / "key.json", key) and out.is_dir() and any(out.iterdir()):
        raise ZooError(f"--out {out} holds {min(p.name for p in out.iterdir())}, and no texts of capfilt: name another folder")
    write_json(parts / "key.json", dict(key))
    return parts


class _Parts:
    """Work in pieces, each of which is kept as a file when it is done.

    Args:
        folder: Of the files.
        show_progress: As of `capfilt`.
    """

    def __init__(self, folder: Path, show_progress: bool | None) -> None:
        self.folder, self.show_progress = folder, show_progress

    def all(self, name: str, count: int, make: Callable[[int, int], list[Any]]) -> list[Any]:
        """What ``make(first, after)`` gives for pieces of 0..count, one after the other.

        Raises:
            Failure: If a file is damaged.
        """
        found: list[Any] = []
        for first in progress(range(0, count, _STEP), name, self.show_progress):
            file = self.folder / f"{name}-{first:09d}.json"
            if not file.is_file():
                write_json(file, make(first, min(first + _STEP, count)))
            try:
                found += json.loads(file.read_text(encoding="utf-8"))
            except ValueError as e:
                raise Failure(f"{file} is damaged ({e}): remove it, and run the same command again") from e
        return found


def _candidates(
    data: Captioned,
    noisy: Texts,
    parts: _Parts,
    run: Mapping[str, Any],
    how: Decoding,
    prompt: str,
    seed: int,
    batch_size: int,
) -> Candidates:
    """The texts of the web and of the captioner, and the filter's scores."""
    pictures = noisy.pictures

    def shown(first: int, after: int) -> Sequence[Row]:
        return _Some(data.pictures, pictures[first:after])

    def written(first: int, after: int) -> list[str]:
        given = shown(first, after)
        return caption(run["captioner"], given, how, prompt=prompt, seed=seed, first=first, batch_size=batch_size, show_progress=False)

    synthetic = parts.all("captions", len(pictures), written) if run["captioner"] is not None else []
    of = [np.searchsorted(pictures, noisy.web[:, 0]), np.flatnonzero([bool(text) for text in synthetic])]
    texts = [data.captions[int(i)] for i in noisy.web[:, 1]] + [text for text in synthetic if text]
    pairs = np.stack([np.concatenate(of), np.arange(len(texts))], 1).astype(np.int64)

    def judged(first: int, after: int) -> list[list[float]]:
        here = np.flatnonzero((pairs[:, 0] >= first) & (pairs[:, 0] < after))
        library = Library(run["filter"], [texts[i] for i in here], batch_size=batch_size, show_progress=False)
        both = np.stack([pairs[here, 0] - first, np.arange(len(here))], 1)
        chances = match_chances(run["filter"], shown(first, after), library, both, batch_size=batch_size, show_progress=False)
        return [[int(i), float(chance)] for i, chance in zip(here, chances, strict=True)]

    scores = np.full(len(texts), np.nan)
    if run["filter"] is not None:
        for i, chance in parts.all("scores", len(pictures), judged):
            scores[i] = chance
    return Candidates(pairs, texts, ["web"] * len(noisy.web) + ["synthetic"] * len(of[1]), scores)


class _Some(Sequence[Row]):
    """Some of the pictures, decoded on access."""

    def __init__(self, pictures: Sequence[Row], which: np.ndarray) -> None:
        self.pictures, self.which = pictures, which

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: Any) -> Any:
        return self.pictures[int(self.which[index])]


def _table(data: Captioned, noisy: Texts, made: Candidates) -> pa.Table:
    """All texts with what is known of them, as they are written."""
    pictures = [*noisy.pictures[made.pairs[:, 0]].tolist(), *noisy.human[:, 0].tolist()]
    scores = [None if np.isnan(x) else float(x) for x in made.scores] + [None] * len(noisy.human)
    return pa.table(
        {
            "picture_id": pa.array([data.picture_ids[i] for i in pictures]),
            "text": pa.array([*made.texts, *(data.captions[int(i)] for i in noisy.human[:, 1])], pa.string()),
            "origin": pa.array([*made.origin, *["human"] * len(noisy.human)], pa.string()),
            "score": pa.array(scores, pa.float64()),
            "planted": pa.array([*noisy.wrong.tolist(), *[False] * (len(pictures) - len(noisy.wrong))], pa.bool_()),
        }
    )


def _statistics(table: pa.Table, pictures: int, threshold: float, names: Mapping[str, Any]) -> dict[str, Any]:
    """How many texts there are and stay, and where mistakes were planted, how many of them the filter found."""
    done = [role for role, run in names.items() if run is not None]
    arm: Arm = "both" if len(done) == 2 else "captioner" if done == ["captioner"] else "filter"
    stays, origin, wrong = kept(table, arm, threshold), np.array(table["origin"].to_pylist()), np.array(table["planted"].to_pylist(), bool)
    counts = {
        name: {"all": int((origin == name).sum()), "kept": int((stays & (origin == name)).sum())} for name in ("web", "synthetic", "human")
    }
    said: dict[str, Any] = {"pictures": pictures, "threshold": threshold, "arm": arm, "asked": NEEDS[arm], "texts": counts}
    web = origin == "web"
    if wrong.any() and "filter" in done:
        dropped, found = web & ~stays, web & ~stays & wrong
        said["filter"] = {
            "planted": int(wrong.sum()),
            "precision": float(found.sum() / dropped.sum()) if dropped.any() else None,
            "recall": float(found.sum() / wrong.sum()),
            "wrong_before": float(wrong[web].mean()),
            "wrong_after": float(wrong[web & stays].mean()) if (web & stays).any() else None,
        }
    return said
