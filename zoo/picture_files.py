"""Pictures and lines of text in files, as commands take them, and tables of what was found."""

from __future__ import annotations

import csv
import io
import json
import logging
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zoo.data._collection import decode, decodes
from zoo.errors import ZooError
from zoo.files import write_bytes, write_text
from zoo.pictures import UNDECODABLE, why
from zoo.types import Row

logger = logging.getLogger("zoo.pictures")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".csv", ".parquet", ".json")


class PictureFiles(Sequence[Row]):
    """Picture files as raw rows, decoded on access.

    Args:
        files: Their paths.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        file = self.files[operator.index(index)]
        try:
            return {"image": decode(str(file), None)}
        except UNDECODABLE as e:
            raise ZooError(f"{file} is no picture that can be decoded ({why(e)}): take it away, or write --skip-broken") from e


def find_pictures(paths: Iterable[Path], *, skip_broken: bool = False) -> list[Path]:
    """The picture files of folders, theirs inside included, sorted by name; and files that are named themselves.

    Args:
        paths: Of files and folders.
        skip_broken: Leave out, with a warning, what cannot be decoded; each file is decoded once more for that.

    Raises:
        ZooError: If one of them is not there, or a folder has no picture, or none is left.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith("."))
            if not inside:
                raise ZooError(f"no pictures in {path}: files that end in {', '.join(SUFFIXES)} are looked for, in folders inside it, too")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ZooError(f"no file or folder {path}: name pictures, or a folder of them")
    found = list(dict.fromkeys(found))
    if skip_broken and (broken := [p for p in found if not decodes(str(p), None)]):
        logger.warning("%d of %d pictures cannot be decoded and are left out, such as %s", len(broken), len(found), broken[0])
        found = [p for p in found if p not in set(broken)]
        if not found:
            raise ZooError(f"none of {len(broken)} pictures can be decoded, such as {broken[0]}")
    return found


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty, without white space around them.

    Args:
        path: UTF-8.
        what: Stands there, for messages.

    Raises:
        ZooError: If it is not there, not UTF-8, or has no such line, or one of them twice.
    """
    if not path.is_file():
        raise ZooError(f"no file {path}: name a text file with one of the {what} in a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        raise ZooError(f"{path} is not UTF-8 ({e.reason} at byte {e.start}): save it again as UTF-8") from e
    kept = [line for line in lines if line]
    if not kept:
        raise ZooError(f"{path} is empty: write one of the {what} in each line")
    if twice := [line for line in dict.fromkeys(kept) if kept.count(line) > 1]:
        raise ZooError(f"{path}: {twice[0]!r} stands there {kept.count(twice[0])} times: keep one")
    return kept


def check_table(out: Path) -> None:
    """Whether records can be written as a file of that name.

    Raises:
        ZooError: If its suffix says no form that is known.
    """
    if out.suffix not in TABLES:
        raise ZooError(
            f"--out {out}: what form is {out.suffix or 'a file without a suffix'}? write a name that ends in {', '.join(TABLES)}"
        )


def write_table(records: Sequence[dict[str, Any]], out: Path) -> Path:
    """Records of equal keys as CSV, parquet or JSON, by the suffix; the file is whole or not there."""
    check_table(out)
    if out.suffix == ".json":
        return write_text(out, json.dumps(list(records), indent=1, ensure_ascii=False) + "\n")
    if out.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return write_text(out, text.getvalue())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(records)), sink)
    return write_bytes(out, sink.getvalue().to_pybytes())
