"""ImageNet: a thousand classes of photographs, to classify by their names without training on them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data._captioned import Pictures
from zoo.data._labelled import find
from zoo.data._looked import look_at
from zoo.data._splits import SPLITS
from zoo.errors import ZooError, unknown
from zoo.registry import register
from zoo.types import Row

logger = logging.getLogger("zoo.data")

LAYOUT = """imagenet is a folder with
  val/<wnid>/<picture>.JPEG    the validation pictures of ILSVRC 2012 by class, n01440764 and so on, https://www.image-net.org
  train/<wnid>/<picture>.JPEG  with the setting train
  classes.txt                  lines <wnid> <name>, <other name>, ..., as LOC_synset_mapping.txt has them;
                               or classes.json: {"<wnid>": "<name>"}, or {"0": ["<wnid>", "<name>"]}"""


class ImageNet:
    """Pictures and their classes. It is a `LabelledData`.

    Args:
        pictures: As they are read.
        names: (N,) of the pictures.
        labels: (N,) int64 places in ``classes``.
        split: (N,) of each picture.
        classes: Names in words.
        broken: Names of the pictures that could not be decoded, and are left out.
        statistics: For the report.
        fingerprint: Of files and settings.
    """

    modalities: tuple[str, ...] = ("image",)

    def __init__(
        self,
        pictures: Pictures,
        names: Sequence[str],
        labels: np.ndarray,
        split: np.ndarray,
        classes: tuple[str, ...],
        broken: Sequence[str],
        statistics: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.rows: Sequence[Row] = pictures
        self.row_ids: Sequence[Any] = names
        self.labels, self._split, self.classes = labels, split, classes
        self.broken: Sequence[Any] = broken
        self.statistics, self.fingerprint = statistics, fingerprint

    def split(self, name: str) -> np.ndarray:
        """(n,) int64 rows; ``val`` is empty, and ``train`` too unless it was asked for.

        Raises:
            ZooError: If there is no such split.
        """
        if name not in SPLITS:
            raise ZooError(unknown("split", name, SPLITS))
        return np.flatnonzero(self._split == name)

    def lengths(self) -> np.ndarray:
        """(N,) int64 ones: pictures have no length."""
        return np.ones(len(self.labels), dtype=np.int64)


@register("data", "imagenet", licence="of each picture its owner's; for research")
def imagenet(root: Path | None, *, folder: str = "imagenet", names: str = "classes.txt", train: bool = False) -> ImageNet:
    """ImageNet (Russakovsky et al., 2015, https://arxiv.org/abs/1409.0575) for classification by names: 50,000 pictures, 1,000 classes.

    Split ``test`` is the folder val, since the labels of the challenge's own test pictures are not public. A class is the first of its
    names; CLIP's results are on a list that was written for it, which is given as ``names``.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        names: The file of the classes' names, below ``folder`` or absolute, a ``.txt`` or a ``.json``; its order is that of the classes.
        train: Whether the folder train is a split too, which takes a look at each of its 1.3 million pictures.

    Raises:
        ZooError: If the folder or a file is not there, a class has no name, or not one picture can be used.
    """
    place = find(root, folder, LAYOUT, "val", names, *(["train"] if train else []))
    named = _names(place / names)
    files = [("test", p) for p in _pictures(place / "val")] + [("train", p) for p in (_pictures(place / "train") if train else [])]
    if unnamed := sorted({p.parent.name for _, p in files} - named.keys()):
        raise ZooError(f"{place / names}: {len(unnamed)} of the folders are no class in it, such as {', '.join(unnamed[:3])}\n{LAYOUT}")
    looks = look_at([p for _, p in files])
    good = [(s, p) for s, p in files if not looks[p].fault]
    faults = [f"{p} {looks[p].fault}" for _, p in files if looks[p].fault]
    if not good:
        raise ZooError(f"{place}: not one of {len(files)} pictures can be used{f', such as: {faults[0]}' if faults else ''}\n{LAYOUT}")
    if faults:
        logger.warning("%d pictures of imagenet cannot be used, such as %s", len(faults), faults[0])
    order = {wnid: i for i, wnid in enumerate(named)}
    classes = tuple(named.values())
    total = hashlib.sha256(json.dumps(list(named.items())).encode())
    for s, p in good:
        total.update(f"{s} {p.parent.name}".encode() + looks[p].sha256)
    return ImageNet(
        Pictures([str(p) for _, p in good]),
        [str(p.relative_to(place)) for _, p in good],
        np.array([order[p.parent.name] for _, p in good], dtype=np.int64),
        np.array([s for s, _ in good]),
        classes,
        [str(p.relative_to(place)) for _, p in files if looks[p].fault],
        {
            "rows": {s: sum(of == s for of, _ in good) for s in SPLITS},
            "classes_without_a_picture": len(named.keys() - {p.parent.name for _, p in good}),
            "names_of_several_classes": sorted(name for name, n in Counter(classes).items() if n > 1),
            "faults": faults[:10],
        },
        total.hexdigest(),
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*/*") if p.suffix.lower() in (".jpeg", ".jpg", ".png") and not p.name.startswith("."))


def _names(path: Path) -> dict[str, str]:
    """{wnid: name} in the order of the file.

    Raises:
        ZooError: If it is neither kind of file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ZooError(f"{path} cannot be read ({e})\n{LAYOUT}") from e
    if isinstance(value, dict):
        value = [pair if isinstance(pair, list) else [key, pair] for key, pair in value.items()]
    whole = isinstance(value, list) and all(len(pair) == 2 and all(isinstance(x, str) and x.strip() for x in pair) for pair in value)
    if not whole or not value:
        raise ZooError(f"{path}: not every line or entry is a wnid and a name\n{LAYOUT}")
    found = {wnid: name.split(",")[0].strip() for wnid, name in value}
    if len(found) < len(value):
        raise ZooError(f"{path}: {Counter(w for w, _ in value).most_common(1)[0][0]} stands there twice")
    return found
