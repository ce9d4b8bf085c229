"""Shards of notes, tar or parquet: what is in one, read once, and how a single image is read from it later."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zoo.data._collection import decodes
from zoo.data._folder import FIELDS, check_ids, read_table, tidied
from zoo.errors import Failure, ZooError

IMAGES = ("jpg", "jpeg", "png", "webp")
LARGEST = 16 << 20  # bytes of a row group: all of it is read for one of its images
PLACE = pa.struct([("at", pa.int64()), ("size", pa.int64())])  # of an image: byte and length in a tar, row group and row in parquet
NOTES = pa.schema(
    [("note_id", pa.string()), *((f, pa.string()) for f in FIELDS), ("split", pa.string()), ("image", PLACE), ("broken", pa.bool_())]
)
Columns = Mapping[str, str | None]


class Unreadable(Failure):
    """A shard is missing, cut or damaged."""


class Format(Protocol):
    """How notes lie in a shard."""

    def notes(self, path: Path) -> pa.Table:
        """All notes, as `NOTES` says; every image was decoded once, and is null where that failed.

        Raises:
            Unreadable: If the shard is cut or damaged. It says where.
            ZooError: If what it holds are no notes.
        """

    def image(self, path: Path, at: int, size: int) -> bytes:
        """The file of one image.

        Raises:
            Unreadable: If it is not there.
        """


class Tar:
    """WebDataset's layout: files ``<key>.json``, ``<key>.txt`` and ``<key>.jpg`` or ``.png`` that follow one another."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def notes(self, path: Path) -> pa.Table:
        columns = self.columns
        records: dict[str, dict[str, Any]] = {}
        for name, at, content in _members(path):
            folder, _, file = name.rpartition("/")
            stem, _, kind = file.partition(".")
            key, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
            record = records.setdefault(key, {"note_id": key})
            where = f"{path}: {name} at byte {at}"
            if kind == "json":
                record |= _object(content, where, columns)
            elif kind == "txt":
                record.setdefault("txt", _utf8(content, where))
            elif kind in IMAGES:
                record["image" if decodes(content, None) else "broken"] = {"at": at, "size": len(content)}
        rows = [_row(record, columns) for record in records.values()]
        notes = pa.Table.from_pylist(rows, schema=NOTES)
        check_ids(notes, str(path))
        return tidied(notes)

    def image(self, path: Path, at: int, size: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(at)
                content = file.read(size)
        except OSError as e:
            raise Unreadable(f"{path}: byte {at} cannot be read ({e})") from e
        if len(content) < size:
            raise Unreadable(f"{path}: ends before byte {at + size}: it was cut since it was indexed; copy it again")
        return content


class Parquet:
    """Columns ``note_id``, and any of ``title``, ``topic``, ``content``, ``split``, and ``image`` with the bytes of image files.

    One image costs the reading of its row group, of which the last few are kept.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._kept: dict[tuple[Path, int], pa.ChunkedArray] = {}

    def notes(self, path: Path) -> pa.Table:
        columns = self.columns
        wanted = {columns.get(c, c) for c in ("note_id", *FIELDS, "split", "image")}
        parts = [NOTES.empty_table()]
        with _opened(path) as file, duckdb.connect() as con:
            chosen = [c for c in file.schema_arrow.names if c in wanted]
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                if not about.num_rows:
                    continue
                try:
                    table = file.read_row_group(group, chosen, use_threads=False)
                except (pa.ArrowException, OSError) as e:
                    at = about.column(0).dictionary_page_offset or about.column(0).data_page_offset
                    raise Unreadable(f"{path}: row group {group}, from byte {at} on, cannot be read ({e})") from e
                parts.append(_placed(read_table(con, table, columns), group, str(path)))
        notes = pa.concat_tables(parts)
        check_ids(notes, str(path))
        return notes

    def image(self, path: Path, at: int, size: int) -> bytes:
        if (path, at) not in self._kept:
            with _opened(path) as file:
                try:
                    read = file.read_row_group(at, [self.columns.get("image") or "image"], use_threads=False)
                except (pa.ArrowException, OSError) as e:
                    raise Unreadable(f"{path}: row group {at} cannot be read ({e})") from e
            while len(self._kept) >= 8:
                del self._kept[next(iter(self._kept))]
            self._kept[path, at] = read.column(0)
        content = self._kept[path, at][size].as_py()
        assert isinstance(content, bytes), f"{path}: row {size} of row group {at} was indexed with an image, and has none"
        return content


def format_of(paths: Sequence[Path], columns: Columns) -> Format:
    """How the notes lie in ``paths``.

    Args:
        paths: Of shards.
        columns: Names of the zoo to names in the files.

    Raises:
        ZooError: If they are not all ``.tar``, or all ``.parquet``.
    """
    kinds = sorted({"".join(p.suffixes[-2:]) if p.suffix in (".gz", ".zst", ".xz", ".bz2") else p.suffix for p in paths})
    if kinds == [".tar"]:
        return Tar(columns)
    if kinds == [".parquet"]:
        return Parquet(columns)
    packed = any(kind.startswith(".tar.") or kind == ".tgz" for kind in kinds)
    advice = "unpack them, because no single image can be read from a compressed tar" if packed else "write .tar or .parquet, all alike"
    raise ZooError(f"shards are {', '.join(k or 'without a suffix' for k in kinds)}: {advice}")


def _members(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Name, place and content of each file in a tar."""
    at = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                at = member.offset_data
                if member.isfile() and not member.issparse():
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name, at, file.read()
            at = tar.offset
    except (tarfile.TarError, OSError) as e:
        raise Unreadable(f"{path}: cannot be read from byte {at} on ({e}): copy it again") from e
    with path.open("rb") as whole:  # tarfile takes a damaged header, or none, for the end
        whole.seek(at)
        if whole.read(512) != bytes(512):
            raise Unreadable(f"{path}: neither a file nor the end of the archive at byte {at}: it was cut or damaged; copy it again")


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise ZooError(f"{where}: it is not UTF-8") from e


def _object(content: bytes, where: str, columns: Columns) -> dict[str, Any]:
    """What a note takes from its JSON file."""
    try:
        value = json.loads(_utf8(content, where))
    except json.JSONDecodeError as e:
        raise ZooError(f"{where}: it is no JSON ({e})") from e
    if not isinstance(value, dict):
        raise ZooError(f"{where}: it is a {type(value).__name__}, write an object with any of {', '.join(FIELDS)}")
    keys = [columns.get(c, c) for c in ("note_id", *FIELDS, "split")]
    return {key: _text(value[key]) for key in keys if key is not None and value.get(key) is not None}


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(record: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """A note by the names of the zoo; a ``.txt`` is its content where the JSON has none."""
    row = {c: record.get(columns.get(c, c) or "") for c in (*FIELDS, "split")}
    if row["content"] is None and "content" not in columns and "txt" not in columns.values():
        row["content"] = record.get("txt")
    shown = columns.get("image", "image") is not None
    note_id = record.get(columns.get("note_id") or "note_id", record["note_id"])
    return row | {"note_id": note_id, "image": record.get("image") if shown else None, "broken": shown and "broken" in record}


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False)  # it would read in threads, which a forked worker does not have
    except (pa.ArrowException, OSError) as e:
        raise Unreadable(f"{path}: cannot be read as parquet ({e}): copy it again") from e


def _placed(notes: pa.Table, group: int, name: str) -> pa.Table:
    """The notes of a row group, with the places of their images instead of the images."""
    images = notes["image"]
    if images.type not in (pa.binary(), pa.large_binary(), pa.null()):
        raise ZooError(f"{name}: column 'image' is {images.type}: in shards, write the bytes of image files")
    if images.nbytes > LARGEST:
        raise ZooError(
            f"{name}: row group {group} has {images.nbytes >> 20} MB of images, all of which are read for one of them:"
            f" write at most {LARGEST >> 20} MB (row_group_size= of pyarrow.parquet.write_table), or tar files"
        )
    there = np.array(images.is_valid())
    broken = np.array([valid and not decodes(image.as_py(), None) for valid, image in zip(there, images, strict=True)], dtype=bool)
    rows = np.arange(len(notes))
    place = pa.StructArray.from_arrays([np.full(len(notes), group), rows], fields=list(PLACE), mask=pa.array(~there | broken))
    plain = {c: notes[c].cast(pa.string()) for c in ("note_id", *FIELDS, "split")}
    return pa.table({**plain, "image": place, "broken": broken}, schema=NOTES)
