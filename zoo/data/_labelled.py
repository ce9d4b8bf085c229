"""Rows of known class in folders of files: what the data sets of the MLA paper share, from the found files to a `LabelledData`."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data._collection import decode
from zoo.data._looked import Look, look_at
from zoo.data._splits import SPLITS, Shares, Unit, digest, draw_lists, read_lists, write_lists
from zoo.errors import Absent, Failure, ZooError, unknown
from zoo.pictures import UNDECODABLE, middles
from zoo.presence import draw_presence
from zoo.registry import make
from zoo.types import Row

logger = logging.getLogger("zoo.data")

SETS = ("crema_d", "food101", "iemocap", "kinetics_sounds", "mvsa_single")
_IMAGES = ("image", "image_2")
WHERE = "\nThe folder that holds it is named by --data DIR or ZOO_DATA on the command line, and by data_root= in Python."


class Item(NamedTuple):
    """One row as its files lie there; nothing in it was opened, except texts."""

    unit: Unit
    things: Mapping[str, str | Path | tuple[Path, ...]]  # {modality: text, a file, or frames in their order}; those that are not there too


class Found(NamedTuple):
    """A data set as it lies in its folder."""

    name: str
    place: Path
    layout: str
    items: Sequence[Item]
    classes: tuple[str, ...]
    shares: Shares
    groups: str = ""  # what a group of rows is, in the plural: actors
    left_out: Mapping[str, int] = {}  # why how many rows were not taken
    counted: Mapping[str, int] = {}  # what else its statistics say


class Settings(NamedTuple):
    """What all these data sets can be asked for, besides their folder."""

    splits: Path | None
    seed: int
    modalities: tuple[str, ...]
    missing_train: Any
    missing_test: Any
    frames: int = 1


def find(root: Path | None, folder: str, layout: str, *needed: str) -> Path:
    """The folder of a data set.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        layout: How it looks, in words.
        needed: What it holds.

    Raises:
        Absent: If it is not there.
        ZooError: If something needed is not in it.
    """
    place = Path(folder) if root is None else root / folder
    if root is None and not place.is_absolute():
        raise Absent(f"the data set {folder!r} is looked for in a folder of data folders, and none is given\n{layout}{WHERE}")
    if not place.is_dir():
        raise Absent(f"no folder {place}\n{layout}{WHERE}")
    if lost := [name for name in needed if not (place / name).exists()]:
        there = sorted(p.name for p in place.iterdir())
        has = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
        raise ZooError(f"{place}: there is no {' and no '.join(lost)}; there is: {has or 'nothing'}\n{layout}")
    return place


def check_modalities(name: str, modalities: Sequence[str]) -> None:
    """Whether rows can show these.

    Raises:
        ZooError: If there is none, or one twice.
    """
    if not modalities or len(set(modalities)) < len(modalities):
        raise ZooError(f"{name}: modalities {', '.join(modalities) or 'none'}: write one or more, each once")


class Rows(Sequence[Row]):
    """The rows; pictures are decoded on access, and recordings are paths of WAV files, since encoders check the rate of a file.

    Args:
        columns: {modality: a thing for every row, None where it is absent}.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        i = operator.index(index)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {"id": i} | {m: _read(m, column[i]) for m, column in self.columns.items() if column[i] is not None}


def _read(modality: str, thing: Any) -> Any:
    if modality not in _IMAGES:
        return str(thing)
    try:
        return [decode(str(frame), None) for frame in thing] if isinstance(thing, list) else decode(str(thing), None)
    except UNDECODABLE as e:
        raise Failure(f"{thing}: was decoded when the data set was loaded, and cannot be any more ({e})") from e


class LabelledFolder:
    """Rows in folders, their classes and splits, and what is known of them. It is a `LabelledData`.

    Args:
        found: The files.
        settings: What was asked for.

    Raises:
        ZooError: If a modality is nowhere, a split is empty, or a class has no training row.
    """

    def __init__(self, found: Found, settings: Settings) -> None:
        check_modalities(found.name, settings.modalities)
        _check_names(found)
        self.modalities: tuple[str, ...] = settings.modalities
        self.classes: tuple[str, ...] = found.classes
        self.lists = _lists(found, settings)
        items = [item for item in found.items if item.unit.name in self.lists]
        columns, looks, faults = _usable(items, settings, found)
        kept = [i for i in range(len(items)) if any(columns[m][i] is not None for m in self.modalities)]
        self.broken: Sequence[Any] = [items[i].unit.name for i in faults]
        units = [items[i].unit for i in kept]
        self.row_ids: Sequence[Any] = [unit.name for unit in units]
        self.labels = np.array([found.classes.index(unit.label) for unit in units], dtype=np.int64)
        self._split = np.array([self.lists[unit.name] for unit in units])
        _check_rows(self, found)
        there = np.array([[columns[m][i] is not None for m in self.modalities] for i in kept])
        present = _present(there, self._split, settings)
        self.rows: Sequence[Row] = Rows(
            {m: [columns[m][i] if has else None for i, has in zip(kept, present[:, k], strict=True)] for k, m in enumerate(self.modalities)}
        )
        self._lengths = np.array([_length([columns[m][i] for m in self.modalities], looks) for i in kept], dtype=np.int64)
        self.statistics: Mapping[str, Any] = {
            "rows": {s: int((self._split == s).sum()) for s in self._names()},
            "missing": {
                s: dict(zip(self.modalities, (~present[self._split == s]).mean(0).round(4).tolist(), strict=True)) for s in self._names()
            },
            **_shared(found, units, self._split),
            **found.counted,
            "splits": str(settings.splits) if settings.splits else f"drawn by seed {settings.seed}",
            "splits_sha256": digest(self.lists),
            "left_out": {
                **found.left_out,
                "not_in_splits": len(found.items) - len(items),
                "nothing_usable": len(items) - len(kept),
                "listed_and_not_found": len(self.lists) - len(items),
            },
            "files": len(looks),
            "rows_with_faults": len(faults),
            "faults": [fault for said in faults.values() for fault in said][:10],
        }
        if faults:
            logger.warning(
                "%d rows of %s lack something that they should have, such as %s", len(faults), found.name, self.statistics["faults"][0]
            )
        self.fingerprint = _fingerprint(found, settings, items, columns, looks, digest(self.lists))

    def _names(self) -> list[str]:
        return [*SPLITS, *sorted({*self._split.tolist()} - {*SPLITS})]

    def split(self, name: str) -> np.ndarray:
        """(n,) int64 rows.

        Raises:
            ZooError: If there is no such split.
        """
        if name not in self._names():
            raise ZooError(unknown("split", name, self._names()))
        return np.flatnonzero(self._split == name)

    def lengths(self) -> np.ndarray:
        """(N,) int64 characters of the text where rows have one, else samples of the recording; 1 without either."""
        return self._lengths.copy()


def split(name: str, root: Path | None, out: Path, *, seed: int = 0, folder: str | None = None) -> LabelledFolder:
    """Draw the splits of a data set, by its own rule, and write them as lists that its setting ``splits`` reads.

    Args:
        name: Of the data set.
        root: The folder of data folders.
        out: A ``.json`` or ``.csv``.
        seed: Of the draw.
        folder: Of the data set; None: the usual one.

    Returns:
        The data set with these splits.

    Raises:
        ZooError: If no such set is known, or its folder is not as it should be.
    """
    if name not in SETS:
        raise ZooError(unknown("data set whose splits are lists", name, SETS))
    made = make("data", {"name": name, "seed": seed} | ({"folder": folder} if folder else {}), root)
    assert isinstance(made, LabelledFolder), "SETS names no others"
    write_lists(out, made.lists, {"data": name, "seed": seed})
    return made


def _check_names(found: Found) -> None:
    if not found.items:
        why = "".join(f"; {n} rows were left out: {reason.replace('_', ' ')}" for reason, n in found.left_out.items() if n)
        raise ZooError(f"{found.place}: no row was found{why}\n{found.layout}")
    twice = [name for name, n in Counter(item.unit.name for item in found.items).items() if n > 1]
    if twice:
        raise ZooError(f"{found.place}: {len(twice)} names of rows stand there more than once, such as {', '.join(twice[:5])}")


def _lists(found: Found, settings: Settings) -> dict[str, str]:
    """The split of each row by its name."""
    if settings.splits is None:
        return draw_lists([item.unit for item in found.items], found.shares, settings.seed)
    names = {item.unit.name for item in found.items}
    lists = read_lists(settings.splits)
    if not names & lists.keys():
        some = ", ".join(sorted(names)[:3])
        raise ZooError(f"splits: {settings.splits} names none of the rows of {found.place}, whose names are such as {some}")
    return lists


def _usable(items: Sequence[Item], settings: Settings, found: Found) -> tuple[dict[str, list[Any]], dict[Path, Look], dict[int, list[str]]]:
    """{modality: what each row can show, None for nothing}, what was seen in every file, and for rows with faults what those are."""
    chosen = [{m: _chosen(item.things.get(m), settings.frames) for m in settings.modalities} for item in items]
    looks = look_at(list(dict.fromkeys(p for things in chosen for thing in things.values() for p in thing if isinstance(p, Path))))
    rates = Counter(look.rate for look in looks.values() if look.rate)
    rate = rates.most_common(1)[0][0] if rates else 0
    columns: dict[str, list[Any]] = {m: [None] * len(items) for m in settings.modalities}
    faults: dict[int, list[str]] = {}
    for i, things in enumerate(chosen):
        for m, thing in things.items():
            wrong = {p: _fault(looks[p], rate) for p in thing if isinstance(p, Path)}
            good = [p for p in thing if not isinstance(p, Path) or not wrong[p]]
            said = [f"{_short(p, found.place)} {fault}" for p, fault in wrong.items() if fault]
            if not thing:
                said = [f"{items[i].unit.name} has no {m}"]
            if said:
                faults.setdefault(i, []).extend(said)
            if good:
                columns[m][i] = good if m == "image" and settings.frames > 1 else good[0]
    for m, column in columns.items():
        if all(thing is None for thing in column):
            first = next(said for said in faults.values())[0]
            raise ZooError(f"{found.place}: not one of {len(items)} rows has {m} that can be used, such as: {first}\n{found.layout}")
    return columns, looks, faults


def _chosen(thing: str | Path | tuple[Path, ...] | None, frames: int) -> tuple[str | Path, ...]:
    """What is looked at and shown of a thing; nothing, if it is empty."""
    if isinstance(thing, tuple):
        return tuple(thing[i] for i in middles(len(thing), frames))
    return (thing,) if thing else ()


def _short(path: Path, place: Path) -> Path:
    """As it stands below the folder of the data; whole, where pictures lie elsewhere."""
    return path.relative_to(place) if path.is_relative_to(place) else path


def _fault(look: Look, rate: int) -> str:
    if not look.fault and look.rate and look.rate != rate:
        return f"has {look.rate} Hz, and most others have {rate}: convert it"
    return look.fault


def _check_rows(data: LabelledFolder, found: Found) -> None:
    lost = [s for s in SPLITS if not len(data.split(s))]
    train = {*data.labels[data.split("train")].tolist()}
    faults = [f"split {s!r} has no row" for s in lost]
    faults += [
        f"split 'train' has no row of class {name!r}" for k, name in enumerate(data.classes) if k not in train and "train" not in lost
    ]
    if faults:
        raise ZooError(f"{found.name}: " + "\n".join(faults))


def _present(there: np.ndarray, split: np.ndarray, settings: Settings) -> np.ndarray:
    """(N, M) bool, what rows show of what they have: drawn by rate, and at least one."""
    present = there.copy()
    for number, (name, rates) in enumerate((("train", settings.missing_train), ("test", settings.missing_test))):
        mine = np.flatnonzero(split == name)
        present[mine] &= draw_presence(rates, len(mine), settings.modalities, [settings.seed, number])
    bare = ~present.any(1)  # the draw left what is not there
    present[bare] = there[bare]
    return present


def _length(things: Sequence[Any], looks: Mapping[Path, Look]) -> int:
    text = next((len(thing) for thing in things if isinstance(thing, str)), 0)
    return text or max((looks[thing].samples for thing in things if isinstance(thing, Path)), default=0) or 1


def _shared(found: Found, units: Sequence[Unit], split: np.ndarray) -> dict[str, Any]:
    """How many speakers or sessions each split has, and who is in more than one: only lists from a file can do that."""
    if not found.groups:
        return {}
    of: dict[str, set[str]] = {}
    for unit, s in zip(units, split.tolist(), strict=True):
        of.setdefault(unit.group, set()).add(s)
    shared = sorted(group for group, splits in of.items() if len(splits) > 1)
    if shared:
        logger.warning("%s: %d of %d %s are in more than one split", found.name, len(shared), len(of), found.groups)
    return {found.groups: {s: sum(s in splits for splits in of.values()) for s in SPLITS}, f"{found.groups}_in_two_splits": len(shared)}


def _fingerprint(
    found: Found, settings: Settings, items: Sequence[Item], columns: Mapping[str, Any], looks: Mapping[Path, Look], lists: str
) -> str:
    total = hashlib.sha256(json.dumps([found.name, found.classes, lists, settings._replace(splits=None)], sort_keys=True).encode())
    for i, item in enumerate(items):
        total.update("\t".join(item.unit).encode() + b"\n")
        for m, column in columns.items():
            total.update(m.encode())
            for thing in column[i] if isinstance(column[i], list) else [column[i]]:
                total.update(looks[thing].sha256 if isinstance(thing, Path) else str(thing).encode())
    return total.hexdigest()
