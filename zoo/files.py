"""Files that are whole or not there: a run that is killed while it writes leaves no half of a report or of its numbers."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from zoo.errors import ZooError

logger = logging.getLogger("zoo.files")


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
    sync(path.parent)
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


def sync(path: Path) -> None:
    """Wait until a file that a library wrote, or the entries of a folder, are on the disk: a rename is such an entry."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    elif os.name != "nt":  # Windows cannot open a folder, and orders its journal by itself
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_to_others(path: Path) -> None:
    """Give a file that a library wrote for its owner alone, as safetensors does, the rights of any other new file here."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.touch()
    path.chmod(new.stat().st_mode & 0o777)
    new.unlink()


def check_target(path: Path, says: str) -> None:
    """Whether a file can be written there, asked before the work that fills it.

    Args:
        path: The file; its folder is made if it is missing.
        says: The option that named it.

    Raises:
        ZooError: If it is a folder, or nothing can be written beside it.
    """
    if path.is_dir():
        raise ZooError(f"{says} {path} is a folder: write the name of a file in it")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
    except OSError as e:
        raise ZooError(f"{says} {path} cannot be written ({e.strerror}): write a place that can") from e


def room(folder: Path) -> str:
    """What the disk has left where ``folder`` is, or is to be made, in words."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return f"the disk has {shutil.disk_usage(there).free / 2**30:.1f} GiB left"


@contextmanager
def alone(path: Path, waiting: str) -> Iterator[None]:
    """Inside, no other process is inside with the same ``path``; the system lets others in when this one dies.

    Args:
        path: Of a lock file; its folder is made if it is missing.
        waiting: What is said when another process is inside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
