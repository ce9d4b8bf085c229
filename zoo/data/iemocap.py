"""IEMOCAP: pairs of actors in dialogue, heard, seen and written down, in four emotions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from zoo.config import Positive, Rates
from zoo.data._labelled import Found, Item, LabelledFolder, Settings, find
from zoo.data._splits import Unit
from zoo.errors import ZooError
from zoo.pictures import frames_in
from zoo.registry import register

CLASSES = ("neu", "ang", "sad", "hap")
SAME = {"exc": "hap"}
SHARES = {"": (0.6, 0.2, 0.2)}
RATED = re.compile(r"^\[[^\]]+\]\t(\S+)\t(\w+)\t\[", re.MULTILINE)  # [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5, 2.5, 2.5]
SAID = re.compile(r"^(\S+) \[[^\]]+\]:(.*)$", re.MULTILINE)  # Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.
LAYOUT = """iemocap is a folder with
  Session1 to Session5, and in each
    dialog/EmoEvaluation/<dialogue>.txt               the emotion of every utterance
    dialog/transcriptions/<dialogue>.txt              its words
    sentences/wav/<dialogue>/<utterance>.wav
  Image-01-FPS/<utterance>/<n>.jpg                    frames of dialog/avi, written beforehand by a program that decodes video
which is the release of https://sail.usc.edu/iemocap, given out on request, except for Image-01-FPS, which is not part of it."""


@register("data", "iemocap", licence="of its own: for research, on request")
def iemocap(
    root: Path | None,
    *,
    folder: str = "iemocap",
    splits: Path | None = None,
    seed: Annotated[int, Field(ge=0)] = 0,
    modalities: tuple[Literal["audio", "image", "text"], ...] = ("audio", "image", "text"),
    frames: Positive = 1,
    missing_train: Rates = 0.0,
    missing_test: Rates = 0.0,
) -> LabelledFolder:
    """IEMOCAP (Busso et al., 2008, https://doi.org/10.1007/s10579-008-9076-6): utterances of ten actors; neutral, angry, sad, happy.

    Excitement counts as happiness, and utterances of other emotions, or that raters did not agree on, are left out; 5,531 stay. Each
    session has two actors of its own, and no session is in two splits: three train, one is val, one is test. MLA's results are on random
    lists of utterances, in which all actors recur; such lists are given as ``splits``, and the statistics then say how many sessions
    are shared.

    Not known to this loader: who is in a frame; the videos show both actors, and whoever writes the frames cuts the speaker out, or
    not. Transcripts are what a person heard, laughter and breath in brackets included.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        splits: Lists in a JSON or CSV, as `zoo data split` writes them, whose rows are named by utterance; None: drawn by ``seed``.
        seed: Of the splits where no file gives them, and of what is lost.
        modalities: What rows show: ``audio`` is the path of a WAV file, ``image`` a picture.
        frames: Of each utterance; from 2 on, ``image`` is a list of them, evenly spread, for the encoder `frames`.
        missing_train: Share of the training rows that lose each modality, ``{image: 0.5}``; a number is the share of all cells,
            as `draw_presence` says. What files lack comes on top.
        missing_test: The same of the test rows.

    Raises:
        ZooError: If the folder or something in it is not there, if a modality, a split or a class is left empty, or of ``splits``.
    """
    place = find(root, folder, LAYOUT, *(["Image-01-FPS"] if "image" in modalities else []))
    sessions = sorted(p for p in place.glob("Session*") if p.is_dir())
    if not sessions:
        raise ZooError(
            f"{place}: there is no Session1; there is: {', '.join(sorted(p.name for p in place.iterdir())) or 'nothing'}\n{LAYOUT}"
        )
    items, others = [], 0
    for session in sessions:
        words = dict(_read(session / "dialog/transcriptions", SAID))
        for name, emotion in _read(session / "dialog/EmoEvaluation", RATED):
            if SAME.get(emotion, emotion) not in CLASSES:
                others += 1
                continue
            wav = session / "sentences/wav" / name.rpartition("_")[0] / f"{name}.wav"
            shown = frames_in(place / "Image-01-FPS" / name) if "image" in modalities else ()
            unit = Unit(name, SAME.get(emotion, emotion), group=session.name)
            items.append(Item(unit, {"audio": wav, "image": shown, "text": words.get(name, "").strip()}))
    found = Found("iemocap", place, LAYOUT, items, CLASSES, SHARES, "sessions", {"other_emotions": others})
    return LabelledFolder(found, Settings(splits, seed, modalities, missing_train, missing_test, frames))


def _read(folder: Path, line: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """What the files of a folder say of each utterance."""
    for path in sorted(folder.glob("*.txt")):
        if not path.name.startswith("."):  # the release has files of macOS, ._Ses01F_impro01.txt, that hold no text
            yield from line.findall(path.read_text(encoding="latin-1"))
