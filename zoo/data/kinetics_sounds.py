"""Kinetics-Sounds: actions that are both seen and heard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from zoo.config import Positive, Rates
from zoo.data._labelled import Found, Item, LabelledFolder, Settings, find
from zoo.data._splits import Unit
from zoo.errors import ZooError
from zoo.pictures import frames_in
from zoo.registry import register

TRAIN, HELD_OUT = (0.9, 0.1, 0.0), (0.0, 0.0, 1.0)
LAYOUT = """kinetics_sounds is a folder with
  train/<class>/<clip>/<n>.jpg    frames of a clip
  train/<class>/<clip>.wav        its sound, which may lie beside the frames as well: train/<class>/<clip>/<clip>.wav
  val/..., test/...               the same; one of the two at least
cut from the videos of Kinetics-400 (on YouTube) whose class is one of Kinetics-Sounds."""


@register("data", "kinetics_sounds", licence="CC BY 4.0 (the annotations of Kinetics); each video its owner's")
def kinetics_sounds(
    root: Path | None,
    *,
    folder: str = "kinetics_sounds",
    splits: Path | None = None,
    seed: Annotated[int, Field(ge=0)] = 0,
    modalities: tuple[Literal["audio", "image"], ...] = ("audio", "image"),
    frames: Positive = 1,
    missing_train: Rates = 0.0,
    missing_test: Rates = 0.0,
) -> LabelledFolder:
    """Kinetics-Sounds (Arandjelovic, Zisserman, 2017, https://arxiv.org/abs/1705.08168): clips of ten seconds of what is seen and heard.

    Where there are both ``val`` and ``test``, the folders are the splits. Where there is one of the two, it is the split test, as papers
    report it, and a tenth of the training clips of each class, drawn by ``seed``, is val.

    Not known to this loader: which classes belong to Kinetics-Sounds (papers have 31 or 34), which videos have gone from YouTube since,
    and whether two clips are of one video. Classes are the names of the folders.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        splits: Lists in a JSON or CSV, as `zoo data split` writes them, whose rows are named ``folder/class/clip``; None: as above.
        seed: Of val where no folder gives it, and of what is lost.
        modalities: What rows show: ``audio`` is the path of a WAV file, ``image`` a picture.
        frames: Of each clip; from 2 on, ``image`` is a list of them, evenly spread, for the encoder `frames`.
        missing_train: Share of the training rows that lose each modality, ``{image: 0.5}``; a number is the share of all cells,
            as `draw_presence` says. What files lack comes on top.
        missing_test: The same of the test rows.

    Raises:
        ZooError: If the folder or something in it is not there, if a modality, a split or a class is left empty, or of ``splits``.
    """
    place = find(root, folder, LAYOUT, "train")
    parts = [part for part in ("train", "val", "test") if (place / part).is_dir()]
    if len(parts) < 2:
        raise ZooError(f"{place}: there is neither val nor test beside train\n{LAYOUT}")
    items = [item for part in parts for kind in _folders(place / part) for item in _clips(part, kind)]
    classes = tuple(sorted({item.unit.label for item in items}))
    held_out = {"val": (0.0, 1.0, 0.0), "test": HELD_OUT} if len(parts) == 3 else {parts[1]: HELD_OUT}
    shares = {"train": TRAIN if len(parts) == 2 else (1.0, 0.0, 0.0)} | held_out
    found = Found("kinetics_sounds", place, LAYOUT, items, classes, shares)
    return LabelledFolder(found, Settings(splits, seed, modalities, missing_train, missing_test, frames))


def _clips(part: str, kind: Path) -> list[Item]:
    """Of one class."""
    items = []
    for clip in sorted({p.stem for p in kind.glob("*.wav")} | {p.name for p in _folders(kind)}):
        inside = kind / clip / f"{clip}.wav"
        sound = inside if inside.is_file() else kind / f"{clip}.wav"
        items.append(Item(Unit(f"{part}/{kind.name}/{clip}", kind.name, part=part), {"audio": sound, "image": frames_in(kind / clip)}))
    return items


def _folders(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
