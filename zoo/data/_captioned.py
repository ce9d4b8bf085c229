"""Pictures and their texts in memory: the one class behind every data set of captions, wherever its files come from."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from zoo.data._collection import decode
from zoo.errors import Failure, ZooError, unknown
from zoo.pictures import UNDECODABLE, why
from zoo.types import Row

SPLITS = ("train", "val", "test")


class Pictures(Sequence[Row]):
    """Pictures as raw rows, decoded on access.

    Args:
        files: (P,) of each the bytes of an image file, or its path.
        folder: Where paths begin.
    """

    def __init__(self, files: Sequence[bytes | str] | pa.ChunkedArray, folder: Path | None = None) -> None:
        self.files, self.folder = files, folder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        i = operator.index(index)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        file = self.files[i]
        file = file.as_py() if isinstance(file, pa.Scalar) else file
        try:
            return {"id": i, "image": decode(file, self.folder)}
        except UNDECODABLE as e:
            named = file if isinstance(file, str) else f"picture {i}"
            raise Failure(f"{named}: was decoded when the data set was loaded, and cannot be any more ({why(e)})") from e


class Captioned:
    """Pictures, texts, and which belong together in each split. It is a `CaptionedData`.

    Args:
        pictures: As they are read.
        picture_ids: (P,) their own names.
        captions: (C,) texts, none twice.
        pairs: {split: (n, 2) int64 picture and caption}; ``train``, ``val`` and ``test`` are empty where they are not named.
        kinds: (P,) what kind of picture each is, for reports; None: they are of no kinds.
        subject: (P,) int64, as of `zoo.types.CaptionedData`; None: pictures that share a caption have one, directly or through others.
        planted: {split: (n,) bool, the pairs whose caption was exchanged for another on purpose}; splits that are not named have none.
        broken: Names of the pictures that could not be decoded, and are in no pair.
        statistics: For the report.
        fingerprint: Of files and settings.

    Raises:
        ZooError: If no split has a pair.
    """

    def __init__(
        self,
        pictures: Pictures,
        picture_ids: Sequence[Any],
        captions: Sequence[str],
        pairs: Mapping[str, np.ndarray],
        *,
        kinds: Sequence[str] | None,
        subject: np.ndarray | None = None,
        planted: Mapping[str, np.ndarray] | None = None,
        broken: Sequence[Any] = (),
        statistics: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        if not any(len(found) for found in pairs.values()):
            raise ZooError(f"no split has a pair of a picture and a text (splits: {', '.join(pairs) or 'none'})")
        pairs = {name: np.zeros((0, 2), dtype=np.int64) for name in SPLITS} | {**pairs}  # those to evaluate on may be all that is there
        self.pictures: Sequence[Row] = pictures
        self.picture_ids: Sequence[Any] = picture_ids
        self.captions: Sequence[str] = captions
        self.broken: Sequence[Any] = list(broken)
        self.fingerprint = fingerprint
        self._pairs, self._planted = dict(pairs), dict(planted or {})
        self.kinds, self.splits = kinds, tuple(pairs)
        self._kinds = None if kinds is None else np.array(kinds, dtype=object)
        everything = np.concatenate(list(pairs.values()))
        self.subject = linked(everything, len(pictures)) if subject is None else subject
        self.statistics: Mapping[str, Any] = {
            "pictures": len(pictures),
            "captions": len(captions),
            "pairs": {name: len(found) for name, found in pairs.items()},
            "subjects": len(np.unique(self.subject[everything[:, 0]])),
            **statistics,
        }

    def pairs(self, split: str) -> np.ndarray:
        """(n, 2) int64 picture and caption.

        Raises:
            ZooError: If there is no such split.
        """
        if split not in self._pairs:
            raise ZooError(unknown("split", split, self._pairs))
        return self._pairs[split].copy()

    def groups(self, split: str) -> Mapping[str, np.ndarray]:
        """{kind of picture: (n,) bool over ``pairs(split)``}, in alphabetical order, of those that the split has.

        Raises:
            ZooError: If there is no such split.
        """
        shown = self.pairs(split)[:, 0]
        if self._kinds is None:
            return {}
        kinds = self._kinds[shown]
        return {str(kind): kinds == kind for kind in sorted(set(kinds.tolist())) if kind}

    def planted(self, split: str) -> np.ndarray:
        """(n,) bool over ``pairs(split)``: whose caption was exchanged for another one on purpose; training never asks.

        Raises:
            ZooError: If there is no such split.
        """
        count = len(self.pairs(split))
        return self._planted[split].copy() if split in self._planted else np.zeros(count, dtype=bool)

    def lengths(self) -> np.ndarray:
        """(C,) int64 characters of each caption."""
        return np.array([len(text) for text in self.captions], dtype=np.int64)


def linked(pairs: np.ndarray, pictures: int) -> np.ndarray:
    """(P,) int64, one number for all pictures that a chain of shared captions links; those of no pair have one of their own.

    Args:
        pairs: (n, 2) picture and caption.
        pictures: How many there are.
    """
    of = list(range(pictures))

    def first(i: int) -> int:
        while of[i] != i:
            of[i] = of[of[i]]
            i = of[i]
        return i

    holder: dict[int, int] = {}  # of each caption, a picture that has it
    for picture, caption in pairs.tolist():
        one, other = first(picture), first(holder.setdefault(caption, picture))
        of[max(one, other)] = min(one, other)
    return np.unique([first(i) for i in range(pictures)], return_inverse=True)[1].astype(np.int64)


def each_once(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Texts without repetitions, in the order in which they come, and (n,) int64 the place of each of ``texts`` among them."""
    places: dict[str, int] = {}
    number = np.array([places.setdefault(text, len(places)) for text in texts], dtype=np.int64)
    return list(places), number
