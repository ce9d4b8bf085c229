"""Shards of captions read row by row and written again: parquet or JSON lines, of which a batch at a time is in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zoo.errors import ZooError, unknown
from zoo.files import sync

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")  # languages that are written without spaces: a character is a word


class Reader:
    """The rows of all files, one batch after the other.

    Args:
        files: Parquet, or JSON lines.
        texts: Columns.
        batch_size: Rows at a time.
    """

    def __init__(self, files: Sequence[Path], texts: tuple[str, ...], batch_size: int) -> None:
        self.files, self.texts, self.batch_size = files, texts, batch_size

    def batches(self, path: Path, *, whole: bool) -> Iterator[pa.RecordBatch | list[str]]:
        """Batches of a parquet, or lists of lines of JSON.

        Args:
            path: One of the files.
            whole: All columns; else those that matching needs.

        Raises:
            ZooError: If a file cannot be read or lacks a column of texts.
        """
        if path.suffix == ".jsonl":
            yield from self._lines(path)
            return
        try:
            with pq.ParquetFile(path) as file:
                there = file.schema_arrow.names
                if lost := [text for text in self.texts if text not in there]:
                    raise ZooError("\n".join(f"{path}: {unknown('column', text, there)}" for text in lost))
                wanted = None if whole else [c for c in dict.fromkeys((*self.texts, "split")) if c in there]
                yield from file.iter_batches(self.batch_size, columns=wanted)
        except (pa.ArrowInvalid, OSError) as e:
            raise ZooError(f"{path} cannot be read as parquet ({e})") from e

    def _lines(self, path: Path) -> Iterator[list[str]]:
        try:
            with path.open(encoding="utf-8") as file:
                batch: list[str] = []
                for line in file:
                    if line.strip():
                        batch.append(line)
                    if len(batch) == self.batch_size:
                        yield batch
                        batch = []
                if batch:
                    yield batch
        except UnicodeDecodeError as e:
            raise ZooError(f"{path} is not UTF-8 ({e})") from e

    def rows(self, path: Path, batch: pa.RecordBatch | list[str]) -> list[list[str] | None]:
        """The words of each row, None where it is of another split than train.

        Raises:
            ZooError: If a line is no JSON object, or has no column of texts.
        """
        if isinstance(batch, list):
            values = [_object(path, line) for line in batch]
            columns = {key: [value.get(key) for value in values] for key in (*self.texts, "split")}
            if lost := [text for text in self.texts if all(text not in value for value in values)]:
                raise ZooError("\n".join(f"{path}: {unknown('key', text, values[0])}" for text in lost))
        else:
            columns = {name: batch.column(name).to_pylist() for name in (*self.texts, "split") if name in batch.schema.names}
        split = columns.get("split", [None] * len(batch))
        said = zip(*(columns[text] for text in self.texts), strict=True)
        return [_said(row) if of in (None, "train") else None for row, of in zip(said, split, strict=True)]


def _object(path: Path, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as e:
        raise ZooError(f"{path}: a line is no JSON ({e}): {line[:80]!r}") from e
    if not isinstance(value, dict):
        raise ZooError(f"{path}: a line is no JSON object: {line[:80]!r}")
    return value


def _said(said: Sequence[Any]) -> list[str]:
    """Of all texts of a row; between two of them stands a word that no query has."""
    texts = [text for cell in said for text in (cell if isinstance(cell, list) else [cell]) if text]
    found: list[str] = []
    for text in texts:
        found += [*words_of(str(text)), ""]
    return found[:-1]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; a Chinese or Japanese character is one."""
    return WORD.findall(text.lower())


class Writer:
    """One file, of the kind of the one it comes from, with relative paths of pictures from another folder."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path, self.prefix = path, prefix
        self.parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.parquet is not None:
            self.parquet.close()
        if self.path.exists():
            sync(self.path)

    def write(self, batch: pa.RecordBatch | list[str], mask: np.ndarray) -> None:
        """Those rows of a batch."""
        if isinstance(batch, list):
            lines = [line for line, stays in zip(batch, mask.tolist(), strict=True) if stays]
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(self._moved(json.loads(line)), ensure_ascii=False) + "\n" for line in lines)
            return
        some = batch.filter(pa.array(mask))
        paths = (pa.types.is_string, pa.types.is_large_string)
        places = [i for i, column in enumerate(some.schema) if column.name == "image" and any(are(column.type) for are in paths)]
        for i in places:
            moved = [None if image is None else self._moved({"image": image})["image"] for image in some.column(i).to_pylist()]
            some = some.set_column(i, some.schema.field(i), pa.array(moved, some.schema.field(i).type))
        self.parquet = self.parquet or pq.ParquetWriter(self.path, some.schema)
        self.parquet.write_batch(some)

    def _moved(self, row: dict[str, Any]) -> dict[str, Any]:
        image = row.get("image")
        return {**row, "image": os.path.join(self.prefix, image)} if isinstance(image, str) else row  # an absolute one stays
