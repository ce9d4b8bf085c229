"""Files that are whole or not there: a run that is killed while it writes leaves no half of a report or of its numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_text(path: Path, text: str) -> Path:
    """Write ``text`` as UTF-8 so that ``path`` holds, at any moment, the old content or the new one, never a part.

    Args:
        path: The file; its folder is made if it is missing.
        text: All of its content; line ends are written as they stand.

    Returns:
        ``path``.
    """
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> Path:
    """`write_text` for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the same folder: a rename across file systems is a copy, hence not atomic
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the rename may reach the disk before the content, and a power cut leaves an empty file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return path


def write_json(path: Path, value: Any) -> Path:
    """`write_text` of ``value`` as JSON; NumPy scalars and arrays and paths are written as plain values.

    Raises:
        ValueError: If it holds NaN or infinity, which are no JSON and which browsers and other languages refuse to read.
        TypeError: If it holds something that is no plain value.
    """
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is no JSON value")


def _sync_folder(folder: Path) -> None:
    """The rename itself is an entry of the folder; Windows cannot open a folder, and orders its journal by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
