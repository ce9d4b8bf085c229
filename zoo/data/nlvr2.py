"""NLVR2: sentences about two photographs each, true of them or false."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from zoo.config import Rates
from zoo.data._labelled import Found, Item, LabelledFolder, Settings, find
from zoo.data._splits import Unit
from zoo.errors import ZooError
from zoo.registry import register

FOLDERS = {"train": "images/train", "dev": "dev", "test1": "test1"}  # of the pictures of each part
SHARES = {"train": (1.0, 0.0, 0.0), "dev": (0.0, 1.0, 0.0), "test1": (0.0, 0.0, 1.0)}
CLASSES = ("false", "true")
LAYOUT = """nlvr2 is a folder with
  data/train.json, data/dev.json, data/test1.json     of https://github.com/lil-lab/nlvr, where they lie in nlvr2/data
  images/train/<directory>/train-<set>-<pair>-img0.png and -img1.png
  dev/dev-<set>-<pair>-img0.png, ..., test1/test1-<set>-<pair>-img0.png, ...
whose pictures the authors give out on request; these may be in another folder, the setting images"""
Modality = Literal["image", "image_2", "text"]


class Statements(LabelledFolder):
    """Sentences about two pictures each, and which of the rows are about one sentence. It is a `LabelledData` and `zoo.labelled.Stated`.

    Args:
        found: The files.
        settings: What was asked for.

    Raises:
        ZooError: If a modality is nowhere, a split is empty, or a class has no training row.
    """

    def __init__(self, found: Found, settings: Settings) -> None:
        super().__init__(found, settings)
        self.statements: np.ndarray = np.unique([_sentence(name) for name in self.row_ids], return_inverse=True)[1]
        self.statistics = {**self.statistics, "splits": "as published"}


@register("data", "nlvr2", licence="of each picture its owner's; for research")
def nlvr2(
    root: Path | None,
    *,
    folder: str = "nlvr2",
    images: str = ".",
    seed: Annotated[int, Field(ge=0)] = 0,
    modalities: tuple[Modality, ...] = ("image", "image_2", "text"),
    missing_train: Rates = 0.0,
    missing_test: Rates = 0.0,
) -> Statements:
    """NLVR2 (Suhr et al., 2019, https://arxiv.org/abs/1811.00491): 100,322 rows of a sentence and two photographs, left and right.

    Of the 107,292 of the paper the rest is the test that was kept back. Split ``train`` has 86,373, ``val``, the published dev, 6,982, and
    ``test``, the public test1, 6,967. A sentence stands with up to four pairs of pictures; besides accuracy,
    reports have its authors' consistency, the share of sentences that are told right of all their pairs.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        images: The folder of images/train, dev and test1, below ``folder`` or absolute.
        seed: Of what is lost.
        modalities: What rows show.
        missing_train: Share of the training rows that lose each modality, ``{image_2: 0.5}``; a number is the share of all cells,
            as `draw_presence` says. Pictures that are not there come on top.
        missing_test: The same of the test rows.

    Raises:
        ZooError: If the folder or something in it is not there, a file is not as published, or a modality or split is left empty.
    """
    place = find(root, folder, LAYOUT, *(f"data/{part}.json" for part in FOLDERS))
    lines = {part: _entries(place / f"data/{part}.json", part) for part in FOLDERS}
    items = [_item(entry, part, place / images / FOLDERS[part]) for part, entries in lines.items() for entry in entries]
    found = Found("nlvr2", place, LAYOUT, items, CLASSES, SHARES, "sentences")
    return Statements(found, Settings(None, seed, modalities, missing_train, missing_test))


def _item(entry: dict[str, Any], part: str, pictures: Path) -> Item:
    """One line; the pictures of train lie in numbered folders."""
    name: str = entry["identifier"]
    pair = pictures / str(entry.get("directory", "")) / name.rpartition("-")[0]
    left, right = (pair.with_name(f"{pair.name}-img{side}.png") for side in (0, 1))
    unit = Unit(name, str(entry["label"]).lower(), _sentence(name), part)
    return Item(unit, {"image": (left,), "image_2": (right,), "text": entry["sentence"].strip()})


def _sentence(name: str) -> str:
    """``dev-850-2-0``, of the part, the set, the pair and the sentence, without the pair."""
    part, of, _, sentence = name.split("-")
    return f"{part}-{of}-{sentence}"


def _entries(path: Path, part: str) -> list[dict[str, Any]]:
    """The lines of a file.

    Raises:
        ZooError: If one is no such JSON.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise ZooError(f"{path}: no text in UTF-8 ({e})\n{LAYOUT}") from e
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as e:
            raise ZooError(f"{path}, line {number}: no JSON ({e}); each line is one\n{LAYOUT}") from e
        if fault := _fault(entry, part):
            raise ZooError(f"{path}, line {number}: {fault}\n{LAYOUT}")
        entries.append(entry)
    return entries


def _fault(entry: Any, part: str) -> str:
    """What is wrong with a line, "" for nothing."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("identifier", "sentence")):
        return "there is no identifier, or no sentence"
    numbers = entry["identifier"].split("-")
    if len(numbers) != 4 or numbers[0] != part or not all(x.isdigit() for x in numbers[1:]):
        return f"the identifier {entry['identifier']!r} is not {part}-<set>-<pair>-<sentence>"
    if str(entry.get("label", "")).lower() not in CLASSES:
        return f"the label of {entry['identifier']} is {entry.get('label')!r}, and neither True nor False"
    return ""
