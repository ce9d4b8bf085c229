"""Captions as lines ``picture#number text``, as Flickr8k's first release and the Chinese versions of COCO and Flickr have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zoo.data._caption_files import Album, Described, opened
from zoo.data._captioned import SPLITS, Captioned
from zoo.errors import ZooError

LINE = re.compile(r"(?P<picture>[^\s#]+)#(?:\w+#)?\d+(?:[ \t]+(?P<text>.*))?")  # COCO_val2014_000000000042#0, 667626.jpg#zhc#0


def read(
    name: str,
    place: Path,
    layout: str,
    lists: Mapping[str, Path],
    said: Mapping[str, list[str]],
    find: Callable[[str], Path],
    settings: Mapping[str, Any],
) -> Captioned:
    """A data set of lists of pictures and of lines.

    Args:
        name: Of the data set.
        place: Its folder.
        layout: How it looks, in words.
        lists: The file that names the pictures of each split.
        said: Texts by picture, as of `lines`.
        find: Name of a picture to its file.
        settings: All that decides the data besides the files.

    Raises:
        ZooError: If a picture is in two splits, or none can be used.
    """
    split: dict[str, str] = {}
    for of, path in lists.items():
        for picture in names(path):
            if split.setdefault(picture, of) != of:
                raise ZooError(f"{place}: {picture} is in the lists of {split[picture]} and of {of}")
    pictures = [Described(picture, find(picture), said.get(picture, []), of) for picture, of in split.items()]
    counted = {"texts_of_pictures_in_no_list": sum(len(texts) for picture, texts in said.items() if picture not in split)}
    return opened(Album(name, place, layout, pictures, settings, counted))


def lists_of(place: Path, pattern: str) -> dict[str, Path]:
    """The file of each split, ``{}`` in the pattern being its name."""
    return {split: place / pattern.format(split) for split in SPLITS}


def lines(path: Path, tidy: Callable[[str], str] = str) -> dict[str, list[str]]:
    """The texts of each picture, whose name loses ``.jpg``.

    Args:
        path: The file.
        tidy: What is done with each text.

    Raises:
        ZooError: If it cannot be read, or with the first line that is no such line.
    """
    said: dict[str, list[str]] = {}
    for number, line in enumerate(_read(path), 1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise ZooError(f"{path}: line {number} is not picture#number and a text, as 667626.jpg#0<tab>a dog: {line[:60]!r}")
        said.setdefault(found["picture"].removesuffix(".jpg"), []).append(tidy(found["text"] or ""))
    return said


def names(path: Path) -> list[str]:
    """The pictures of a list, one a line, each once; ``.jpg`` is left off.

    Raises:
        ZooError: If it cannot be read.
    """
    return list(dict.fromkeys(name.removesuffix(".jpg") for line in _read(path) if (name := line.strip())))


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ZooError(f"{path} cannot be read as lines in UTF-8 ({e})") from e
