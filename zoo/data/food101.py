"""UPMC Food-101: pictures of dishes and the titles of the pages that showed them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from zoo.config import Rates
from zoo.data._labelled import Found, Item, LabelledFolder, Settings, find
from zoo.data._splits import Unit
from zoo.errors import ZooError
from zoo.registry import register

SHARES = {"train": (0.9, 0.1, 0.0), "test": (0.0, 0.0, 1.0)}
LAYOUT = """food101 is a folder with
  images/train/<class>/<class>_<n>.jpg, images/test/...
  texts/train_titles.csv, texts/test_titles.csv     without a header: name of the picture, title, class
of UPMC Food-101, https://visiir.isir.upmc.fr; the Food-101 of Bossard et al. is another set, and has no texts."""


@register("data", "food101", licence="of each picture and page its owner's; for research")
def food101(
    root: Path | None,
    *,
    folder: str = "food101",
    splits: Path | None = None,
    seed: Annotated[int, Field(ge=0)] = 0,
    modalities: tuple[Literal["image", "text"], ...] = ("image", "text"),
    missing_train: Rates = 0.0,
    missing_test: Rates = 0.0,
) -> LabelledFolder:
    """UPMC Food-101 (Wang et al., 2015, https://doi.org/10.1109/ICMEW.2015.7169757): some 90,000 pictures with a title, 101 dishes.

    Test is the folder of that name; a tenth of the training pictures of each class, drawn by ``seed``, is val. Other lists, such
    as those of MMBT with 5,000 pictures in val, are given as ``splits``.

    Not known to this loader: how true a class is, the pictures being what a search engine gave for the name of the dish; titles often
    hold that very name.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        splits: Lists in a JSON or CSV, as `zoo data split` writes them, whose rows are named by picture; None: as above.
        seed: Of val where no file gives it, and of what is lost.
        modalities: What rows show.
        missing_train: Share of the training rows that lose each modality, ``{image: 0.5}``; a number is the share of all cells,
            as `draw_presence` says. What files lack comes on top.
        missing_test: The same of the test rows.

    Raises:
        ZooError: If the folder or something in it is not there, if a modality, a split or a class is left empty, or of ``splits``.
    """
    needed = [f"images/{part}" for part in SHARES] if "image" in modalities else []
    needed += [f"texts/{part}_titles.csv" for part in SHARES] if "text" in modalities else []
    place = find(root, folder, LAYOUT, *needed)
    items = [item for part in SHARES for item in _pictures(place, part, modalities)]
    classes = tuple(sorted({item.unit.label for item in items}))
    found = Found("food101", place, LAYOUT, items, classes, SHARES)
    return LabelledFolder(found, Settings(splits, seed, modalities, missing_train, missing_test))


def _pictures(place: Path, part: str, modalities: tuple[str, ...]) -> list[Item]:
    """The pictures of a folder and those that only a title is known of."""
    titles = _titles(place / f"texts/{part}_titles.csv") if "text" in modalities else {}
    files = {p.name: p for p in (place / "images" / part).glob("*/*.jpg")}
    items = []
    for name in sorted(titles.keys() | files.keys()):
        label = files[name].parent.name if name in files else titles[name][1]
        picture = files.get(name, place / "images" / part / label / name)
        items.append(Item(Unit(name, label, part=part), {"image": (picture,), "text": titles[name][0] if name in titles else ""}))
    return items


def _titles(path: Path) -> dict[str, tuple[str, str]]:
    """Title and class of each picture.

    Raises:
        ZooError: On a line that has not the three columns.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ZooError(f"{path}: no CSV in UTF-8 ({e})") from e
    if wrong := [n for n, line in enumerate(lines, 1) if len(line) != 3 or not line[0] or not line[2]]:
        raise ZooError(f"{path}: {len(wrong)} lines, such as number {wrong[0]}, are not name of the picture, title, class\n{LAYOUT}")
    return {name: (title.strip(), label) for name, title, label in lines}
