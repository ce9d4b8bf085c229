"""Looks at every file of a data set once, before training: what it holds, whether it can be decoded, and its hash."""

from __future__ import annotations

import hashlib
import logging
import time
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from zoo.pictures import UNDECODABLE, check_size, why

logger = logging.getLogger("zoo.data")


class Look(NamedTuple):
    """What was seen in a file."""

    fault: str = ""  # what is wrong with it, "": nothing
    sha256: bytes = b""
    samples: int = 0  # of a recording
    rate: int = 0  # its, in Hz


def look_at(paths: Sequence[Path]) -> dict[Path, Look]:
    """Every file, decoded; ``.wav`` as recordings and all others as pictures. Progress is told every ten seconds."""
    found, last = {}, time.monotonic()
    with ThreadPoolExecutor() as threads:  # hashing and decoding leave the interpreter to other threads
        for path, look in zip(paths, threads.map(_look, paths), strict=True):
            found[path] = look
            if time.monotonic() - last > 10:
                last = time.monotonic()
                logger.info("checking files: %d of %d", len(found), len(paths))
    return found


def _look(path: Path) -> Look:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Look("there is no such file")
    except OSError as e:
        return Look(f"cannot be read ({e.strerror})")
    seen = _recording(content) if path.suffix.lower() == ".wav" else look_into(content)
    return seen._replace(sha256=hashlib.sha256(content).digest())


def _recording(content: bytes) -> Look:
    try:
        with wave.open(BytesIO(content), "rb") as file:
            samples, rate, wide = file.getnframes(), file.getframerate(), file.getsampwidth() * file.getnchannels()
            there = len(file.readframes(samples)) // wide
    except (wave.Error, EOFError) as e:
        return Look(f"is no WAV file of uncompressed samples ({str(e) or 'it ends too early'})")
    if not there or there < samples:
        return Look(f"holds {there} of the {samples} samples that it says")
    return Look(samples=samples, rate=rate)


def look_into(content: bytes) -> Look:
    """The bytes of a picture, decoded; the hash is left out."""
    try:
        with Image.open(BytesIO(content)) as opened:
            check_size(opened)
            opened.draft("L", (1, 1))  # a JPEG is read to its end all the same, in two thirds of the time
            opened.load()
    except UNDECODABLE as e:
        return Look(f"is no picture that can be decoded ({why(e)})")
    return Look()
