"""MVSA-Single: posts of a picture and a text, and the mood of both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from zoo.config import Rates
from zoo.data._labelled import Found, Item, LabelledFolder, Settings, find
from zoo.data._splits import Unit
from zoo.errors import ZooError
from zoo.registry import register

MOODS = ("negative", "neutral", "positive")
SHARES = {"": (0.6, 0.2, 0.2)}
LAYOUT = """mvsa_single is a folder with
  data/<id>.jpg, data/<id>.txt
  labelResultAll.txt     a line of column names, then: id, a tab, the mood of the text, a comma, the mood of the picture
of MVSA-Single, https://mcrlab.net/research/mvsa-sentiment-analysis-on-multi-view-social-data; moods are negative, neutral, positive."""


@register("data", "mvsa_single", licence="of each post its owner's; for research")
def mvsa_single(
    root: Path | None,
    *,
    folder: str = "mvsa_single",
    splits: Path | None = None,
    seed: Annotated[int, Field(ge=0)] = 0,
    modalities: tuple[Literal["image", "text"], ...] = ("image", "text"),
    missing_train: Rates = 0.0,
    missing_test: Rates = 0.0,
) -> LabelledFolder:
    """MVSA-Single (Niu et al., 2016, https://doi.org/10.1007/978-3-319-27674-8_2): posts from Twitter, three moods.

    Text and picture were rated apart. Where they agree, that is the class; where one is neutral, it is the other's; posts that are
    positive in one and negative in the other are left out (Xu and Mao, 2017, https://doi.org/10.1145/3132847.3133142). No lists are
    published with the set: of each class three fifths, drawn by ``seed``, train, one fifth is val, one test. MLA's own lists have 1,555
    posts to train and 519 to test, fewer than this rule keeps; other lists are given as ``splits``.

    Not known to this loader: who wrote a post, so that one writer may be in two splits, and whether a post was posted again. Texts are
    read as UTF-8, and those that are not as Latin-1; the statistics count these.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        splits: Lists in a JSON or CSV, as `zoo data split` writes them, whose rows are named by id; None: as above.
        seed: Of the splits where no file gives them, and of what is lost.
        modalities: What rows show.
        missing_train: Share of the training rows that lose each modality, ``{image: 0.5}``; a number is the share of all cells,
            as `draw_presence` says. What files lack comes on top.
        missing_test: The same of the test rows.

    Raises:
        ZooError: If the folder or something in it is not there, if a modality, a split or a class is left empty, or of ``splits``.
    """
    place = find(root, folder, LAYOUT, "data", "labelResultAll.txt")
    rated = _rated(place / "labelResultAll.txt")
    moods = {name: mood for name, both in rated.items() if (mood := mood_of(*both))}
    texts = {name: _text(place / f"data/{name}.txt") for name in moods} if "text" in modalities else {}
    items = [
        Item(Unit(name, mood), {"image": (place / f"data/{name}.jpg",), "text": texts[name][0] if texts else ""})
        for name, mood in moods.items()
    ]
    left_out = {"text_and_picture_contradict": len(rated) - len(moods)}
    counted = {"texts_not_utf8": sum(latin for _, latin in texts.values())}
    found = Found("mvsa_single", place, LAYOUT, items, MOODS, SHARES, left_out=left_out, counted=counted)
    return LabelledFolder(found, Settings(splits, seed, modalities, missing_train, missing_test))


def mood_of(text: str, picture: str) -> str:
    """The mood of a post; nothing, if its two sides contradict each other."""
    moods = {text, picture} - {"neutral"}
    return "neutral" if not moods else moods.pop() if len(moods) == 1 else ""


def _rated(path: Path) -> dict[str, tuple[str, str]]:
    """The moods of text and picture by id.

    Raises:
        ZooError: On lines that hold no such moods.
    """
    lines = [line.split() for line in path.read_text(encoding="latin-1").splitlines()[1:] if line.strip()]
    found = [(line[0], *"".join(line[1:]).split(",")) for line in lines]
    wrong = [n for n, line in enumerate(found, 2) if len(line) != 3 or not {*line[1:]} <= {*MOODS}]
    if wrong:
        raise ZooError(f"{path}: {len(wrong)} lines, such as number {wrong[0]}, are not id, tab, mood, comma, mood\n{LAYOUT}")
    if len({line[0] for line in found}) < len(found):
        raise ZooError(f"{path}: an id stands there twice")
    return {name: (text, picture) for name, text, picture in found}


def _text(path: Path) -> tuple[str, bool]:
    """A text without line ends, nothing if there is no file; and whether it was read as Latin-1."""
    content = path.read_bytes() if path.is_file() else b""
    try:
        return " ".join(content.decode().split()), False
    except UnicodeDecodeError:
        return " ".join(content.decode("latin-1").split()), True
