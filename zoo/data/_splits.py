"""Which rows train, select and test: lists in a file, or drawn by seed from whole groups, so that no speaker is in two splits."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.errors import ZooError
from zoo.files import write_json, write_text

SPLITS = ("train", "val", "test")
Shares = Mapping[str, tuple[float, float, float]]  # of train, val and test, for each part of a data set


class Unit(NamedTuple):
    """What a list is drawn from: one row."""

    name: str
    label: str
    group: str = ""  # its speaker or session, which stays together; "": rows are drawn one by one, from each class
    part: str = ""  # where its publishers put it


def draw_lists(rows: Sequence[Unit], shares: Shares, seed: int) -> dict[str, str]:
    """The split of every row by its name; the order of ``rows`` does not matter.

    Args:
        rows: All with a group, or none.
        shares: For each part, adding up to 1. A share above 0 gives one group at least, and one row of each class while there are enough.
        seed: Of the draw, and of nothing else.

    Raises:
        ZooError: If there are fewer groups than splits.
    """
    draw = np.random.default_rng(seed)
    of: dict[str, str] = {}
    for part, wanted in shares.items():
        mine = [row for row in rows if row.part == part]
        grouped = any(row.group for row in mine)
        splits = sum(share > 0 for share in wanted)
        if grouped and len({row.group for row in mine}) < splits:
            groups = sorted({row.group for row in mine})
            raise ZooError(f"{len(groups)} speakers or sessions ({', '.join(groups)}) cannot be dealt to {splits} splits: write splits")
        strata: dict[str, list[str]] = {}
        for row in mine:
            strata.setdefault("" if grouped else row.label, []).append(row.group if grouped else row.name)
        dealt: dict[str, str] = {}
        for _, stratum in sorted(strata.items()):
            units = sorted(set(stratum))
            split = np.repeat(SPLITS, counts(len(units), wanted)).tolist()
            dealt |= {units[u]: s for u, s in zip(draw.permutation(len(units)).tolist(), split, strict=True)}
        of |= {row.name: dealt[row.group if grouped else row.name] for row in mine}
    return of


def counts(units: int, shares: Sequence[float]) -> list[int]:
    """How many of ``units`` each split gets: the nearest whole numbers, and where there are enough, none of a share above 0."""
    ends = np.floor(np.cumsum(shares) * units + 0.5 + 1e-9).astype(int)
    found: list[int] = np.diff([0, *ends]).tolist()
    for split in range(len(shares)):
        if shares[split] > 0 and not found[split] and max(found) > 1:
            found[found.index(max(found))] -= 1
            found[split] += 1
    return found


def digest(of: Mapping[str, str]) -> str:
    """sha256 of lists: of lines ``split<tab>name``, sorted; the same for both kinds of file and for lists that no file holds."""
    return hashlib.sha256("".join(sorted(f"{split}\t{name}\n" for name, split in of.items())).encode()).hexdigest()


def write_lists(path: Path, of: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """Write lists to a ``.json`` or ``.csv``.

    Args:
        path: Where.
        of: The split of every row by its name.
        about: What else the JSON says: the data set, the seed.

    Returns:
        Their `digest`, which the JSON holds too.

    Raises:
        ZooError: If ``path`` ends in neither.
    """
    _check_suffix(path)
    if path.suffix == ".csv":
        lines = StringIO()
        csv.writer(lines, lineterminator="\n").writerows([("id", "split"), *sorted(of.items())])
        write_text(path, lines.getvalue())
    else:
        names = {split: sorted(name for name, s in of.items() if s == split) for split in (*SPLITS, *sorted({*of.values()} - {*SPLITS}))}
        write_json(path, {**about, "sha256": digest(of), "splits": names})
    return digest(of)


def read_lists(path: Path) -> dict[str, str]:
    """The split of every row that a file lists: a JSON as `write_lists` makes it, or a CSV of the columns ``id`` and ``split``.

    Raises:
        ZooError: If it is not there, is no such file, names a row twice, or was changed after its hash was written.
    """
    _check_suffix(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ZooError(f"splits: {path} cannot be read ({e}); zoo data split SET --out {path} writes such a file") from e
    pairs, said = _of_csv(path, text) if path.suffix == ".csv" else _of_json(path, text)
    of = dict(pairs)
    if len(of) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ZooError(f"splits: {path}: {twice!r} stands there twice: a row is in one split")
    if "train" not in of.values():
        raise ZooError(f"splits: {path}: no row is in split 'train'")
    if said and said != digest(of):
        raise ZooError(
            f"splits: {path} was changed after it was written: its lists have the sha256 {digest(of)}, and it says {said}."
            " If that is meant, remove the key sha256"
        )
    return of


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".json", ".csv"):
        raise ZooError(f"splits: {path}: lists are in a .json or a .csv, not in {path.suffix or 'a file without a suffix'}")


def _of_csv(path: Path, text: str) -> tuple[list[tuple[str, str]], str]:
    rows = csv.DictReader(StringIO(text))
    if not {"id", "split"} <= {*(rows.fieldnames or ())}:
        raise ZooError(f"splits: {path}: its columns are {', '.join(rows.fieldnames or ()) or 'none'}: write id and split")
    pairs = [(row["id"], row["split"]) for row in rows]
    if empty := [i for i, pair in enumerate(pairs, 2) if not all(pair)]:
        raise ZooError(f"splits: {path}: line {empty[0]} has no id or no split")
    return pairs, ""


def _of_json(path: Path, text: str) -> tuple[list[tuple[str, str]], str]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise ZooError(f"splits: {path} is no JSON ({e})") from e
    lists = value.get("splits") if isinstance(value, dict) else None
    whole = isinstance(lists, dict) and all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists.values())
    if not isinstance(lists, dict) or not whole:
        raise ZooError(f'splits: {path}: write {{"splits": {{"train": ["name of a row", ...], "val": [...], "test": [...]}}}}')
    return [(name, split) for split, names in lists.items() for name in names], str(value.get("sha256", ""))
