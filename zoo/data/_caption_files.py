"""Pictures in files and what is said of each: from what a loader found to a `CaptionedData`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data._captioned import Captioned, Pictures, each_once
from zoo.data._looked import look_at
from zoo.errors import ZooError

logger = logging.getLogger("zoo.data")


class Described(NamedTuple):
    """A picture as its file lies there, and what is said of it; nothing was opened."""

    name: str
    path: Path
    texts: Sequence[str]
    split: str


class Album(NamedTuple):
    """A data set as it lies in its folder."""

    name: str
    place: Path
    layout: str
    pictures: Sequence[Described]
    settings: Mapping[str, Any]  # all that decides the data besides the files
    counted: Mapping[str, Any] = {}  # what else its statistics say


def opened(album: Album) -> Captioned:
    """Every picture looked at once, and those that can be shown, with their texts.

    Raises:
        ZooError: If a name stands there twice, or not one picture can be used.
    """
    _check_names(album)
    texts = [[said for text in p.texts if (said := text.strip())] for p in album.pictures]
    spoken = [p for p, said in zip(album.pictures, texts, strict=True) if said]
    looks = look_at([p.path for p in spoken])
    faults = {p.name: f"{p.path} {fault}" for p in spoken if (fault := looks[p.path].fault)}
    shown = [(p, said) for p, said in zip(album.pictures, texts, strict=True) if said and p.name not in faults]
    if not shown:
        why = next(iter(faults.values()), "no picture has a text")
        raise ZooError(f"{album.place}: not one of {len(album.pictures)} pictures can be used, such as: {why}\n{album.layout}")
    if faults:
        logger.warning("%d pictures of %s cannot be used, such as %s", len(faults), album.name, next(iter(faults.values())))
    captions, number = each_once([text for _, said in shown for text in said])
    of = np.repeat(np.arange(len(shown)), [len(said) for _, said in shown])
    splits = np.array([p.split for p, _ in shown], dtype=object)[of]
    together = np.stack([of, number], 1)
    return Captioned(
        Pictures([str(p.path) for p, _ in shown]),
        [p.name for p, _ in shown],
        captions,
        {name: together[splits == name] for name in sorted({*splits.tolist()})},
        kinds=None,
        broken=list(faults),
        statistics={
            **album.counted,
            "texts_without_words": sum(len(p.texts) for p in album.pictures) - sum(map(len, texts)),
            "pictures_without_a_text": len(album.pictures) - len(spoken),
            "faults": list(faults.values())[:10],
        },
        fingerprint=_fingerprint(album, shown, {p.path: looks[p.path].sha256 for p, _ in shown}),
    )


def _check_names(album: Album) -> None:
    if not album.pictures:
        raise ZooError(f"{album.place}: no picture was found\n{album.layout}")
    if twice := [name for name, n in Counter(p.name for p in album.pictures).items() if n > 1]:
        raise ZooError(f"{album.place}: {len(twice)} pictures stand there more than once, such as {', '.join(twice[:5])}")


def _fingerprint(album: Album, shown: Sequence[tuple[Described, Sequence[str]]], hashes: Mapping[Path, bytes]) -> str:
    total = hashlib.sha256(json.dumps([album.name, dict(album.settings)], sort_keys=True).encode())
    for p, said in shown:
        total.update(json.dumps([p.name, p.split, *said]).encode() + hashes[p.path])
    return total.hexdigest()
