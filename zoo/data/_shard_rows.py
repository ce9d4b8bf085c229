"""The rows of many shards as one sequence: an index beside the shards says where each note lies, so no shard is held in memory."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from zoo.data._collection import Input, decode
from zoo.data._folder import FIELDS
from zoo.data._shards import Columns, Unreadable, format_of
from zoo.errors import Absent, Failure, ZooError
from zoo.files import write_bytes
from zoo.pictures import UNDECODABLE
from zoo.types import Row

logger = logging.getLogger("zoo.data")
INDEX = ".zoo_index"
_FORMAT = "2"


class Shard(NamedTuple):
    """A shard, its index, and the hash of its content."""

    path: Path
    place: Path  # of its index
    sha256: str


class ShardRows(Sequence[Row]):
    """Notes of shards as raw rows, each read from its place on access. Travels to a worker as a list of files.

    Args:
        shards: In order; the notes are numbered through.
        columns: As of `index_shard`.
        inputs: What a row shows.
    """

    def __init__(self, shards: Sequence[Shard], columns: Columns, inputs: Sequence[Input]) -> None:
        self.shards, self.columns, self.inputs = tuple(shards), dict(columns), tuple(inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardRows, (self.shards, self.columns, self.inputs)

    @cached_property
    def table(self) -> pa.Table:
        """Texts and places of all notes, mapped from the files of the index."""
        return pa.concat_tables([_mapped(shard.place) for shard in self.shards])

    @cached_property
    def starts(self) -> np.ndarray:
        """(S + 1,) int64 number of each shard's first note, and of all notes."""
        return np.cumsum([0, *(len(_mapped(shard.place)) for shard in self.shards)])

    @cached_property
    def _format(self) -> Any:
        return format_of([shard.path for shard in self.shards], self.columns)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        i = operator.index(index)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"note {index} of {len(self)}")
        row: dict[str, Any] = {"id": i, "note_id": self.table["note_id"][i].as_py()}
        if "text" in self.inputs:
            row |= {field: text for field in FIELDS if (text := self.table[field][i].as_py()) is not None}
        if "image" in self.inputs and (place := self.table["image"][i].as_py()) is not None:
            path = self.shards[int(np.searchsorted(self.starts, i, side="right")) - 1].path
            content = self._format.image(path, **place)
            try:
                row["image"] = decode(content, None)
            except UNDECODABLE as e:
                raise Unreadable(
                    f"{path}: note {row['note_id']!r} at {place}: its image was whole when the shard was indexed, and is not now ({e}):"
                    " copy the shard again"
                ) from e
        return row

    def without(self, modality: str) -> ShardRows:
        """The same rows without ``modality``, which is not read either."""
        return ShardRows(self.shards, self.columns, [shown for shown in self.inputs if shown != modality])


def find_shards(folder: Path, items: str | Sequence[str]) -> list[Path]:
    """The shards that ``items`` names below ``folder``, in order.

    Args:
        folder: Of the data set.
        items: ``notes-*.tar``, or ``notes-{000..127}.tar``, which also says which ones must be there; or several of them.

    Raises:
        Absent: If there is none.
        ZooError: If a name leads out of the folder: the index, and vectors, lie below theirs where a shard lies below its own.
    """
    found: list[Path] = []
    for pattern in [items] if isinstance(items, str) else items:
        parts = Path(pattern).parts  # links are not followed: a hub's cache is made of links to files elsewhere
        if Path(pattern).is_absolute() or ".." in parts or not parts:
            raise ZooError(f"shards {pattern!r}: names are below their folder, here {folder}: name another folder, and items-*.tar in it")
        for name in _ranges(pattern):
            found += sorted(folder.glob(name)) if any(sign in name for sign in "*?[") else [folder / name]
    if not found:
        there = ", ".join(sorted(p.name for p in folder.iterdir() if p.name != INDEX)[:10]) if folder.is_dir() else "no such folder"
        raise Absent(f"no shards {items} in {folder} (there: {there or 'nothing'})")
    return list(dict.fromkeys(found))


def index_shards(folder: Path, paths: Sequence[Path], columns: Columns, *, index: Path | None, skip: bool) -> tuple[list[Shard], list[str]]:
    """Index every shard that is not yet; processes that do so at once share the work.

    Args:
        folder: Of the data set.
        paths: Below it.
        columns: Names of the zoo to names in the files.
        index: Where the index lies; None: in the folder of the data set.
        skip: Leave out shards that are missing, cut or damaged.

    Returns:
        The shards, and what is wrong with those that were left out.

    Raises:
        Unreadable: With every shard that is missing, cut or damaged, unless ``skip``.
        ZooError: If what a shard holds are no notes, or no shard is left.
    """
    format_of(paths, columns)
    found: dict[Path, Shard] = {}
    wrong: dict[Path, str] = {}
    for wait in (False, True):  # first those that no other process is at
        for number, path in enumerate(paths, 1):
            if path in found or path in wrong:
                continue
            place = (index or folder / INDEX) / path.relative_to(folder).parent
            try:
                found[path] = index_shard(path, columns, place, f" ({number} of {len(paths)})", wait=wait)
            except Unreadable as e:
                wrong[path] = str(e)
            except Timeout:
                continue
    shards, faults = [found[path] for path in paths if path in found], [wrong[path] for path in paths if path in wrong]
    if faults and not skip:
        more = "" if len(faults) == 1 else f"{len(faults)} shards cannot be read\n"
        raise Unreadable(f"{more}{chr(10).join(faults)}\nunreadable: skip leaves such shards out")
    for fault in faults:
        logger.warning("left out: %s", fault)
    if not shards:
        raise Failure("no shard is left that can be read")
    return shards, faults


def index_shard(path: Path, columns: Columns, folder: Path, number: str = "", *, wait: bool = True) -> Shard:
    """Find or make the index of a shard: its texts, and where its images lie. Every image is decoded once.

    Args:
        path: Of the shard.
        columns: Names of the zoo to names in the file.
        folder: Of the index.
        number: Of the shard among all, for the log.
        wait: For another process that is at the same shard.

    Raises:
        Failure: If the index cannot be written.
        Timeout: If another process is at it, unless ``wait``.
        Unreadable: If the shard is missing, cut or damaged.
        ZooError: If what it holds are no notes.
    """
    if not path.is_file():
        raise Unreadable(f"no file {path}")
    said = hashlib.sha256(json.dumps([_FORMAT, dict(columns)], sort_keys=True).encode()).hexdigest()[:8]
    place = folder / f"{path.name}.{said}.arrow"
    if (sha256 := _known(path, place)) is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock", timeout=-1 if wait else 0):
                if (sha256 := _known(path, place)) is None:
                    sha256 = _write_index(path, columns, place, number)
        except Timeout:
            raise
        except OSError as e:
            raise Failure(f"{place}: the index of {path.name} cannot be written ({e}): name a folder for it with index:") from e
    return Shard(path, place, sha256)


def _write_index(path: Path, columns: Columns, place: Path, number: str) -> str:
    """Index a shard; where its content is the one that was indexed, as in a copy of both, the old index gets its new stamp."""
    stamp = _stamp(path)
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise Unreadable(f"{path}: cannot be read ({e})") from e
    if place.is_file() and (known := _mapped(place)).schema.metadata[b"sha256"].decode() == sha256:
        notes = known
    else:
        logger.info("indexing %s%s", path.name, number)
        notes = format_of([path], columns).notes(path)
    notes = notes.combine_chunks().replace_schema_metadata({"stamp": stamp, "sha256": sha256})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, notes.schema) as writer:
        writer.write_table(notes)
    write_bytes(place, sink.getvalue().to_pybytes())
    return sha256


def _stamp(path: Path) -> str:
    """What differs when a shard was written since, even if its size is the same and its modification time was set back."""
    about = path.stat()
    return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}"


def _known(path: Path, place: Path) -> str | None:
    """The hash of the shard, if its index is there and as old as it."""
    if not place.is_file():
        return None
    about = _mapped(place).schema.metadata
    return about[b"sha256"].decode() if about[b"stamp"].decode() == _stamp(path) else None


def _mapped(place: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(place))).read_all()


def _ranges(pattern: str) -> Iterator[str]:
    """``a-{08..10}.tar`` as ``a-08.tar``, ``a-09.tar``, ``a-10.tar``."""
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    spans = [[str(n).zfill(len(a)) for n in range(int(a), int(b) + 1)] for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
    for numbers in product(*spans):
        yield "".join(piece + number for piece, number in zip(pieces[::3], [*numbers, ""], strict=True))
