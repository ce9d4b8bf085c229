"""The JSON in which Karpathy published captions and splits of COCO, Flickr30k and Flickr8k."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.data._caption_files import Album, Described, opened
from zoo.data._captioned import Captioned
from zoo.data._labelled import find
from zoo.errors import ZooError


def read(name: str, root: Path | None, settings: Mapping[str, Any], layout: str) -> Captioned:
    """A data set whose captions and splits are in such a file.

    Args:
        name: Of the data set; the file is ``dataset_<name>.json`` without what follows an underscore in the name.
        root: The folder of data folders.
        settings: ``folder`` and ``images`` as of the data sets, ``captions``, and where there is one, ``restval``.
        layout: How its folder looks, in words.

    Raises:
        ZooError: If the folder, the file or every picture is missing, or the file is no such JSON.
    """
    file = f"dataset_{name.partition('_')[0]}.json"
    place = find(root, settings["folder"], layout, file)
    entries = _entries(place / file, layout)
    rest, most = settings.get("restval", True), settings["captions"]
    pictures = [
        Described(
            entry["filename"],
            place / settings["images"] / entry.get("filepath", "") / entry["filename"],
            [sentence["raw"] for sentence in entry["sentences"][:most]],
            "train" if entry["split"] == "restval" and rest else entry["split"],
        )
        for entry in entries
    ]
    decides = {key: value for key, value in settings.items() if key not in ("folder", "images")}
    return opened(Album(name, place, layout, pictures, decides))


def _entries(path: Path, layout: str) -> list[dict[str, Any]]:
    """What the file says of each picture."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ZooError(f"{path} cannot be read as JSON ({e})\n{layout}") from e
    entries = value.get("images") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise ZooError(f"{path}: there is no list 'images'\n{layout}")
    if wrong := [i for i, entry in enumerate(entries) if not _whole(entry)]:
        some = f"{len(wrong)} of {len(entries)} images, such as number {wrong[0]}"
        raise ZooError(f"{path}: {some}, lack filename, split or sentences with 'raw'\n{layout}")
    return entries


def _whole(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("filename", "split")):
        return False
    said = entry.get("sentences")
    return isinstance(said, list) and all(isinstance(s, dict) and isinstance(s.get("raw"), str) for s in said)
