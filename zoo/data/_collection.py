"""Notes and their pairs in memory: the one class behind every data set of notes, wherever its tables come from."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from zoo.data._folder import FIELDS, SAID, Loaded, find, read_table
from zoo.data._mining import Mine, mine, none_left
from zoo.errors import ZooError, unknown
from zoo.pictures import MOST_PIXELS, UNDECODABLE, check_size, in_colours
from zoo.types import Row

logger = logging.getLogger("zoo.data")

Input = Literal["text", "image"]
ORDER = ("train", "val", "test")
SHORT = 1 / 6  # the share of the training items that counts as short


class Rows(Sequence[Row]):
    """The notes as raw rows, made on access from tables that are cheap to send to a worker.

    Args:
        table: One row a note: note_id, image, and any of title, topic, content, category.
        inputs: What a row shows; the rest is absent.
        folder: Where paths of images begin.
    """

    def __init__(self, table: pa.Table, inputs: Sequence[Input], folder: Path | None) -> None:
        self.table, self.inputs, self.folder = table, tuple(inputs), folder

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        i = operator.index(index)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"note {index} of {len(self)}")
        row: dict[str, Any] = {"id": i, "note_id": self.table["note_id"][i].as_py()}
        if "text" in self.inputs:
            said = [field for field in SAID if field in self.table.column_names]
            row |= {field: text for field in said if (text := self.table[field][i].as_py()) is not None}
        if "image" in self.inputs and (image := self.table["image"][i].as_py()) is not None:
            row["image"] = decode(image, self.folder)
        return row

    def without(self, modality: str) -> Rows:
        """The same rows without ``modality``, which is not read either."""
        return Rows(self.table, [shown for shown in self.inputs if shown != modality], self.folder)


def read_notes(folder: Path, columns: Mapping[str, str | None] | None = None) -> tuple[Rows, list[Any]]:
    """The notes of a folder without their clicks, for encoding: rows, and the notes' own ids.

    Raises:
        ZooError: If the folder has no notes, or with everything that is wrong in them.
    """
    place, tables = find(None, str(folder.resolve()))
    with duckdb.connect() as con:
        notes = read_table(con, tables.notes, columns or {})
    shown, _, _ = _without_broken(notes, place)
    return Rows(shown.select(["note_id", *FIELDS, "image"]), ("text", "image"), place), notes["note_id"].to_pylist()


def decode(image: bytes | str, folder: Path | None) -> Image.Image:
    """An image file, as bytes or as a path below ``folder``, in RGB; what is transparent becomes white.

    Raises:
        OSError: Or another of `zoo.pictures.UNDECODABLE`, if it is no image, or too large a one.
    """
    with Image.open(BytesIO(image) if isinstance(image, bytes) else (folder or Path()) / image) as opened:
        check_size(opened)
        return in_colours(opened)


def decodes(image: bytes | str, folder: Path | None) -> bool:
    """Whether `decode` gives an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            decode(image, folder)
    except UNDECODABLE:
        return False
    return True


class Collection:
    """Notes, the pairs of each split, and what is known of both. It is a `PairData`.

    Args:
        loaded: The tables.
        folder: Where paths of images begin; None: all images are bytes.
        inputs: What rows show. Lengths, short texts and lexical baselines are the same whatever they show, so that arms compare.
        rule: How pairs are mined where ``loaded`` brings none.
        cold: The value of the notes' ``split`` that keeps them out of the other splits; where it occurs it is a split itself,
            whose queries are those notes and whose pairs come from the whole log. None: no note is kept out.
        settings: All that decides the data besides the tables, for the fingerprint.
        checked: The rows, and the numbers of those whose images are broken, where ``loaded`` does not hold the images themselves.

    Raises:
        ZooError: If no training pair is left.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        folder: Path | None,
        inputs: Sequence[Input],
        rule: Mine,
        cold: str | None,
        settings: dict[str, Any],
        checked: tuple[Sequence[Row], Sequence[int]] | None = None,
    ) -> None:
        everything = loaded.notes
        self.note_ids: Sequence[Any] = everything["note_id"].to_pylist()
        self.notes: Sequence[Row]
        broken: Sequence[int]
        if checked is None:
            shown, broken, content = _without_broken(everything, folder)
            self.notes = Rows(shown.select([c for c in ("note_id", *SAID, "image") if c in shown.column_names]), inputs, folder)
        else:
            (self.notes, broken), shown, content = checked, everything, ""
        self._texts = shown.select(FIELDS)
        self.broken: Sequence[Any] = [self.note_ids[i] for i in broken]
        is_cold = pc.fill_null(pc.equal(everything["split"], cold or ""), False).to_numpy() & (cold is not None)
        self._pairs, mining = _mined(loaded, rule, is_cold, cold) if loaded.pairs is None else (_given(loaded.pairs), {})
        self._clicks, self._cold = _clicked(loaded), is_cold
        self.statistics: Mapping[str, Any] = {
            **loaded.counts,
            "images": len(shown) - shown["image"].null_count,
            "images_broken": len(self.broken),
            "cold": int(is_cold.sum()),
            "pairs": {split: len(p) for split, p in self._pairs.items()},
            "mining": mining,
        }
        said = json.dumps({**settings, "inputs": list(inputs), "rule": asdict(rule), "cold": cold}, sort_keys=True, default=str)
        self.fingerprint: str = hashlib.sha256(f"{loaded.digest}{content}{said}".encode()).hexdigest()
        if not len(self.pairs("train")):
            raise ZooError(f"no training pair is left: {none_left(rule, mining['train']) if 'train' in mining else 'the file has none'}")

    def pairs(self, split: str) -> np.ndarray:
        """(P, 2) int64 query and target indices, in the order of the file, or by query and rank.

        Raises:
            ZooError: If there is no such split.
        """
        if split not in self._pairs:
            raise ZooError(unknown("split", split, self._pairs))
        return self._pairs[split]

    def pool(self, split: str) -> np.ndarray:
        """(C,) int64 indices of the candidates: every note.

        Raises:
            ZooError: If there is no such split.
        """
        self.pairs(split)
        return np.arange(len(self.notes))

    def lengths(self) -> np.ndarray:
        """(N,) int64 characters of title and content."""
        table = self._texts
        return sum(pc.utf8_length(pc.fill_null(table[f], "")).to_numpy().astype(np.int64) for f in ("title", "content"))

    def short(self) -> np.ndarray:
        """(N,) bool, no more characters than the shortest sixth of the items that training sees, in clicks or in pairs."""
        seen = (self._clicks > 0) & ~self._cold
        seen[self.pairs("train").ravel()] = True
        lengths = self.lengths()
        return lengths <= np.quantile(lengths[seen], SHORT, method="lower")

    def texts(self) -> list[str]:
        """(N,) title, topic and content of each item in one string."""
        table = self._texts
        return [" ".join(filter(None, texts)) for texts in zip(*(table[f].to_pylist() for f in FIELDS), strict=True)]

    def clicks(self) -> np.ndarray:
        """(N,) float64 clicks in the training window; zeros without a log."""
        return self._clicks.copy()


def _without_broken(notes: pa.Table, folder: Path | None) -> tuple[pa.Table, list[int], str]:
    """Notes whose undecodable images are absent, the numbers of those, and a digest of the images that are files of their own."""
    broken: list[int] = []
    gone: dict[int, Path] = {}
    content, last = hashlib.sha256(), time.monotonic()
    column = notes["image"]
    for i, value in enumerate(column):
        if (image := value.as_py()) is None:
            continue
        file = (folder or Path()) / image if isinstance(image, str) else None
        if file is not None and not os.path.isfile(file):
            gone[i] = file
        elif not decodes(image, folder):
            broken.append(i)
        elif file is not None:
            content.update(file.read_bytes())
        if time.monotonic() - last > 10:
            last = time.monotonic()
            logger.info("checking images: %d of %d", i + 1, len(notes))
    if gone:
        _tell_gone([notes["note_id"][i].as_py() for i in gone], next(iter(gone.values())))
    if broken:
        tell_broken([notes["note_id"][i].as_py() for i in broken])
    if broken := sorted([*broken, *gone]):
        if len(broken) == len(notes) - column.null_count:
            _tell_none_left(len(broken), folder if gone else None)
        bad = np.zeros(len(notes), bool)
        bad[broken] = True
        notes = notes.set_column(
            notes.column_names.index("image"), "image", pc.if_else(pa.array(bad), pa.scalar(None, column.type), column)
        )
    return notes, broken, content.hexdigest()


def tell_broken(ids: Sequence[Any]) -> None:
    """Name the notes whose images are broken, once."""
    logger.warning(
        "%d images cannot be decoded, or have more than %d pixels, and count as absent, those of notes %s",
        len(ids),
        MOST_PIXELS,
        _some(ids),
    )


def _tell_gone(ids: Sequence[Any], file: Path) -> None:
    logger.warning("%d images are not found, such as %s, and count as absent, those of notes %s", len(ids), file, _some(ids))


def _tell_none_left(images: int, folder: Path | None) -> None:
    remedy = f"their paths begin in {folder}: is that where they lie?" if folder is not None else "does column 'image' hold image files?"
    logger.error("NOT ONE of the %d images can be used, and models learn from text alone: %s", images, remedy)


def _some(ids: Sequence[Any]) -> str:
    return ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


def _ordered(splits: set[str]) -> list[str]:
    return [s for s in ORDER if s in splits] + sorted(splits - {*ORDER})


def _given(pairs: pa.Table) -> dict[str, np.ndarray]:
    """The pairs of a file, by split."""
    both = np.stack([pairs["a"].to_numpy(), pairs["b"].to_numpy()], 1)
    of_split = np.array(pairs["split"].to_pylist(), dtype=object)
    return {s: both[of_split == s] for s in _ordered({s for s in pairs["split"].unique().to_pylist() if s is not None})}


def _mined(loaded: Loaded, rule: Mine, is_cold: np.ndarray, cold: str | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The pairs of every split of the log, and what mining said of each."""
    assert loaded.clicks is not None
    clicks = loaded.clicks.rename_columns(["note_id" if c == "note" else c for c in loaded.clicks.column_names])
    cold_notes = pa.array(np.flatnonzero(is_cold))
    later = replace(rule, min_groups=rule.min_groups_held_out or rule.min_groups)
    splits = _ordered({s for s in clicks["split"].unique().to_pylist() if s is not None})
    found = {s: mine(clicks, rule if s == "train" else later, split=s, leave_out=cold_notes) for s in splits}
    if cold is not None and len(cold_notes):
        found[cold] = mine(clicks, rule, queries=cold_notes)
    pairs = {s: np.stack([m.pairs["note_a"].to_numpy(), m.pairs["note_b"].to_numpy()], 1) for s, m in found.items()}
    return pairs, {s: m.statistics for s, m in found.items()}


def _clicked(loaded: Loaded) -> np.ndarray:
    if loaded.clicks is None:
        return np.zeros(len(loaded.notes))
    train = loaded.clicks.filter(pc.fill_null(pc.equal(loaded.clicks["split"], "train"), False))
    return np.bincount(train["note"].to_numpy(), minlength=len(loaded.notes)).astype(np.float64)
