"""Tensors on disk that grow row by row, are whole or not there, and are read without being loaded."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.errors import Failure
from zoo.files import write_json

HEADER = 256  # bytes before the values: safetensors' length and JSON, padded, so that it can be written when the last row is known
_MANIFEST, _PROGRESS = "manifest.json", "progress.json"
_DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}  # as safetensors writes them
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Unwritten(OSError):
    """The system refuses to write: the disk is full, the folder is not ours."""


@contextmanager
def writing() -> Iterator[None]:
    """Inside, whatever the system refuses is `Unwritten`, and so told apart from what it refuses to read."""
    try:
        yield
    except OSError as e:
        raise Unwritten(*e.args) from e


class Column(NamedTuple):
    """What one file holds."""

    dtype: str
    shape: tuple[int, ...]  # of one row
    rows: int

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * _DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Of the file."""
        return HEADER + self.rows * self.row_bytes


class Writer:
    """Columns that are being written, each a safetensors file; what was flushed is there after a crash, the rest never was.

    Args:
        folder: Made if missing. One process at a time writes into it; what an earlier one flushed is gone on from.
    """

    @writing()
    def __init__(self, folder: Path) -> None:
        assert sys.byteorder == "little", "safetensors is"
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        progress = folder / _PROGRESS
        self.columns = _read(progress)["columns"] if progress.is_file() else {}
        self._files: dict[str, BinaryIO] = {}
        self._held = ExitStack()  # closes the others too where one cannot be closed, for what it holds back finds no room
        for name, column in self.columns.items():
            file = self._files[name] = self._held.enter_context((folder / f"{name}.safetensors").open("r+b"))
            file.truncate(column.bytes)
            file.seek(column.bytes)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def rows(self, name: str) -> int:
        """How many rows a column has; 0 before its first one."""
        return self.columns[name].rows if name in self.columns else 0

    @writing()
    def append(self, name: str, rows: Tensor) -> None:
        """Add rows (R, ...) of the same kind as those before.

        Raises:
            Failure: If they are of another kind.
            Unwritten: As every method here may, if the system refuses.
        """
        if name not in self.columns:
            self.columns[name] = Column(_NAMES[rows.dtype], tuple(rows.shape[1:]), 0)
            self._files[name] = self._held.enter_context((self.folder / f"{name}.safetensors").open("w+b"))
            self._files[name].write(bytes(HEADER))
        column = self.columns[name]
        if (column.dtype, column.shape) != (_NAMES[rows.dtype], tuple(rows.shape[1:])):
            raise Failure(
                f"{name} is {column.dtype} {list(column.shape)} for some rows, {_NAMES[rows.dtype]} {list(rows.shape[1:])} for others"
            )
        self._files[name].write(as_bytes(rows).data)
        self.columns[name] = column._replace(rows=column.rows + len(rows))

    @writing()
    def flush(self) -> None:
        """From here on a crash loses nothing of what was appended."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.folder / _PROGRESS, {"columns": {name: column._asdict() for name, column in self.columns.items()}})

    @writing()
    def finish(self, final: Path, about: Mapping[str, Any]) -> None:
        """Write the headers and the manifest, and rename the folder to ``final``, which must not be there."""
        for name, column in self.columns.items():
            self._files[name].seek(0)
            self._files[name].write(_header(name, column))
        self.flush()
        self._close()
        columns = {name: column._asdict() for name, column in self.columns.items()}
        write_json(self.folder / _MANIFEST, {"columns": columns, "about": about})
        (self.folder / _PROGRESS).unlink()
        self.folder.rename(final)

    @writing()
    def _close(self) -> None:
        self._held.close()


class Mapped:
    """A column that was finished: rows come from the disk, or from its cache, when they are asked for.

    Args:
        path: Of the file.
        column: What it holds; at least one row.
    """

    def __init__(self, path: Path, column: Column) -> None:
        self.dtype, self.shape = _DTYPES[column.dtype], column.shape
        self.bytes = np.memmap(path, np.uint8, "r", HEADER, (column.rows, column.row_bytes))

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """(R,) row numbers to a tensor (R, ...) of its own."""
        return torch.from_numpy(np.asarray(self.bytes[rows])).view(self.dtype).view(len(rows), *self.shape)

    def all(self) -> np.ndarray:
        """Every row, of a column that is small."""
        return self[np.arange(len(self.bytes))].numpy()


def read_columns(folder: Path) -> tuple[dict[str, Any], dict[str, Mapped]]:
    """What `Writer.finish` was told, and the columns that have rows.

    Raises:
        Failure: If a file is missing or has another size than was written.
    """
    manifest = _read(folder / _MANIFEST)
    columns: dict[str, Column] = manifest["columns"]
    files = {name: folder / f"{name}.safetensors" for name in columns}
    if damaged := [path.name for name, path in files.items() if not path.is_file() or path.stat().st_size != columns[name].bytes]:
        raise Failure(f"{folder} is damaged: {', '.join(damaged)} is not as long as what was written")
    return manifest["about"], {name: Mapped(files[name], column) for name, column in columns.items() if column.rows}


def as_bytes(rows: Tensor) -> np.ndarray:
    """(R, ...) on any device to the (R, bytes of a row) uint8 that a file holds."""
    return rows.detach().cpu().contiguous().view(len(rows), -1).view(torch.uint8).numpy()


def row_sums(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(R,) int64 checksums, each over one row of every part (R, bytes)."""
    sums = np.zeros(len(parts[0]) if parts else 0, np.int64)
    for part in parts:
        for i, row in enumerate(part):
            sums[i] = zlib.crc32(row.data, int(sums[i]))
    return sums


def discard(folder: Path) -> None:
    """Remove a folder of columns; killed half-way, it leaves none that looks whole."""
    if folder.is_dir():
        (folder / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        columns = {name: Column(c["dtype"], tuple(c["shape"]), c["rows"]) for name, c in found["columns"].items()}
        return {"about": found.get("about"), "columns": columns}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Failure(f"{path.parent} is damaged: {path.name} cannot be read ({e})") from e


def _header(name: str, column: Column) -> bytes:
    shape = [column.rows, *column.shape]
    values = {name: {"dtype": column.dtype, "shape": shape, "data_offsets": [0, column.bytes - HEADER]}}
    text = json.dumps(values).encode().ljust(HEADER - 8)
    assert len(text) == HEADER - 8, f"{len(text)} bytes of header for {values}"
    return (HEADER - 8).to_bytes(8, "little") + text
