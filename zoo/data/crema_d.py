"""CREMA-D: actors who say a sentence in one of six emotions, heard and seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from zoo.config import Positive, Rates
from zoo.data._labelled import Found, Item, LabelledFolder, Settings, find
from zoo.data._splits import Unit
from zoo.pictures import frames_in
from zoo.registry import register

EMOTIONS = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
FOLDERS = {"audio": "AudioWAV", "image": "Image-01-FPS"}
SHARES = {"": (0.7, 0.1, 0.2)}
LAYOUT = """crema_d is a folder with
  AudioWAV/<clip>.wav             as in https://github.com/CheyneyComputerScience/CREMA-D
  Image-01-FPS/<clip>/<n>.jpg     frames of VideoFlash/<clip>.flv, one a second, written beforehand by a program that decodes video
where <clip> is <actor>_<sentence>_<emotion>_<level>, such as 1001_DFA_ANG_XX, and <emotion> one of ANG, DIS, FEA, HAP, NEU, SAD."""


@register("data", "crema_d", licence="ODbL 1.0 (the database)")
def crema_d(
    root: Path | None,
    *,
    folder: str = "crema_d",
    splits: Path | None = None,
    seed: Annotated[int, Field(ge=0)] = 0,
    modalities: tuple[Literal["audio", "image"], ...] = ("audio", "image"),
    frames: Positive = 1,
    missing_train: Rates = 0.0,
    missing_test: Rates = 0.0,
) -> LabelledFolder:
    """CREMA-D (Cao et al., 2014, https://doi.org/10.1109/TAFFC.2014.2336244): 7,442 clips of 91 actors, six emotions.

    No actor is in two splits: seven tenths of them train, one tenth is val, two tenths are test. MLA's results are on random lists of
    clips, in which all actors recur; such lists are given as ``splits``, and the statistics then say how many actors are shared.

    Not known to this loader: whether frames are of the clip whose name they have, and how viewers rated it; the class is the emotion
    that the actor was asked to show.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        splits: Lists in a JSON or CSV, as `zoo data split` writes them, whose rows are named by clip; None: drawn by ``seed``.
        seed: Of the splits where no file gives them, and of what is lost.
        modalities: What rows show: ``audio`` is the path of a WAV file, ``image`` a picture.
        frames: Of each clip; from 2 on, ``image`` is a list of them, evenly spread, for the encoder `frames`.
        missing_train: Share of the training rows that lose each modality, ``{image: 0.5}``; a number is the share of all cells,
            as `draw_presence` says. What files lack comes on top.
        missing_test: The same of the test rows.

    Raises:
        ZooError: If the folder or something in it is not there, if a modality, a split or a class is left empty, or of ``splits``.
    """
    place = find(root, folder, LAYOUT, *(FOLDERS[m] for m in modalities))
    wavs = {p.stem: p for p in (place / FOLDERS["audio"]).glob("*.wav")}
    shown = {p.name: p for p in (place / FOLDERS["image"]).glob("*") if p.is_dir()}
    items, odd = [], 0
    for clip in sorted(wavs.keys() | shown.keys()):
        said = clip.split("_")
        if len(said) != 4 or said[2] not in EMOTIONS:
            odd += 1
            continue
        frames_of = frames_in(place / FOLDERS["image"] / clip) if "image" in modalities else ()
        things: dict[str, Path | tuple[Path, ...]] = {"audio": place / FOLDERS["audio"] / f"{clip}.wav", "image": frames_of}
        items.append(Item(Unit(clip, said[2], group=said[0]), things))
    found = Found("crema_d", place, LAYOUT, items, EMOTIONS, SHARES, "actors", {"names_not_understood": odd})
    return LabelledFolder(found, Settings(splits, seed, modalities, missing_train, missing_test, frames))
