"""What a training set is made of, pairs, labelled rows or captioned pictures, as batches made in the data loader's workers."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from zoo.collate import Known, PairCollate, Sample, processed, stack
from zoo.errors import ZooError
from zoo.labelled import Soft
from zoo.shown import Kind, draw_shown
from zoo.types import Batch, CaptionedData, Classifying, Data, LabelledData, PairData, Row


class Kept:
    """Raw rows, processed; the first that come stay in memory.

    Args:
        rows: All of the data set.
        process: The model's processor.
        keep: How many stay.
    """

    def __init__(self, rows: Sequence[Row], process: Any, keep: int) -> None:
        self.rows, self.process, self.keep = rows, process, keep
        self.kept: dict[int, Sample] = {}

    def __getitem__(self, item: int) -> Sample:
        """Row ``item``.

        Raises:
            ZooError: If something of it cannot be read, naming the row.
        """
        if item in self.kept:
            return self.kept[item]
        sample = processed(self.process, self.rows[item], item)
        if len(self.kept) < self.keep:
            self.kept[item] = sample
        return sample


class PairBatches(Dataset[Batch]):
    """The batches of one process.

    Args:
        data: Whose training pairs they are made of.
        process: Of those that train together, counted from 0.
        processor: The model's.
        keep: How many processed rows stay in memory.
    """

    def __init__(self, data: PairData, process: int, processor: Any, keep: int) -> None:
        self.samples, self.pairs, self.process = Kept(data.notes, processor, keep), data.pairs("train"), process
        self.collate = PairCollate(processor, Known.of(torch.from_numpy(self.pairs), len(data.notes)))

    def __getitem__(self, shares: np.ndarray) -> Batch:
        """The batch whose ``shares`` (processes, B) are the pairs of each process."""
        pairs = self.pairs[shares]  # (processes, B, 2)
        together = torch.from_numpy(pairs.swapaxes(1, 2).reshape(len(shares), -1))  # queries first, as in a batch
        own = together[self.process]
        return self.collate.joined([self.samples[i] for i in own.tolist()], own, together, self.process)


def targets_of(data: LabelledData, rows: np.ndarray) -> torch.Tensor:
    """What is learned of rows (n,) int64: their classes (n,) int64, or where the data say so how right each class is, (n, K) float32."""
    return torch.from_numpy(data.shares(rows) if isinstance(data, Soft) and data.soft else data.labels[rows])


class LabelledBatches(Dataset[Batch]):
    """As `PairBatches`, of rows of known class."""

    def __init__(self, data: LabelledData, process: int, processor: Any, keep: int) -> None:
        self.samples, self.train, self.process = Kept(data.rows, processor, keep), data.split("train"), process
        self.data = data

    def __getitem__(self, shares: np.ndarray) -> Batch:
        """The batch whose ``shares`` (processes, B) are the rows of each process."""
        own = self.train[shares[self.process]]
        return Batch(stack([self.samples[i] for i in own.tolist()]), targets=targets_of(self.data, own), ids=torch.from_numpy(own))


class CaptionedRows(Sequence[Row]):
    """The pairs of a split as rows of a picture and its text, ``{"id": subject of the picture, "image": ..., "text": ...}``.

    Args:
        data: Whose they are.
        split: Of it.
        shown: (n, 2) bool, whether each pair shows its picture, and its text; None: both.
    """

    def __init__(self, data: CaptionedData, split: str, shown: np.ndarray | None = None) -> None:
        self.pictures, self.captions, self.pairs = data.pictures, data.captions, data.pairs(split)
        self.shown = np.ones((len(self.pairs), 2), dtype=bool) if shown is None else shown
        self.subject = data.subject[self.pairs[:, 0]]  # (n,)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        picture, caption = self.pairs[operator.index(index)].tolist()
        sees, reads = self.shown[index]
        row: dict[str, Any] = {"id": int(self.subject[index])}
        row |= {"image": self.pictures[picture]["image"]} if sees else {}  # what is not shown is not decoded
        return row | ({"text": self.captions[caption]} if reads else {})


class CaptionedBatches(Dataset[Batch]):
    """As `PairBatches`, of pictures with one text each, whose ``ids`` are their subjects.

    Where pictures of different subjects have one text, as a captioner may write it, ``known`` says so.
    """

    def __init__(self, data: CaptionedData, process: int, processor: Any, keep: int, shown: np.ndarray | None) -> None:
        self.rows, self.process = CaptionedRows(data, "train", shown), process
        self.samples, self.said = Kept(self.rows, processor, keep), self.rows.pairs[:, 1]
        both = np.unique(np.stack([self.said, self.rows.subject], 1), axis=0)
        self.repeats = len(both) > len(np.unique(self.said))

    def __getitem__(self, shares: np.ndarray) -> Batch:
        """The batch whose ``shares`` (processes, B) are the pairs of each process."""
        own = shares[self.process]
        known = self._same_text(shares) if self.repeats else None
        return Batch(stack([self.samples[i] for i in own.tolist()]), ids=torch.from_numpy(self.rows.subject[own]), known=known)

    def _same_text(self, shares: np.ndarray) -> torch.Tensor:
        """(E, 2) rows of this process and others, of any, with the same text."""
        first = self.process * shares.shape[1]  # others count on from the first of this process
        row, other = np.nonzero(self.said[shares[self.process]][:, None] == self.said[shares.ravel()])
        apart = other != row + first
        return torch.from_numpy(np.stack([row[apart], other[apart] - first], 1))


def batches_of(data: Data, process: int, processor: Any, keep: int, shown: np.ndarray | None = None) -> Dataset[Batch]:
    """The training batches of one process, for indices of the shape (processes, B); ``shown`` as of `shown_of`."""
    if isinstance(data, PairData):
        return PairBatches(data, process, processor, keep)
    if isinstance(data, CaptionedData):
        return CaptionedBatches(data, process, processor, keep, shown)
    return LabelledBatches(data, process, processor, keep)


def shown_of(data: Data, shares: Mapping[Kind, float], seed: int) -> np.ndarray | None:
    """What each training pair shows under a recipe's ``run.shows``, as of `CaptionedRows`.

    Raises:
        ZooError: If the data are no pictures with texts.
    """
    if not shares:
        return None
    if not isinstance(data, CaptionedData):
        raise ZooError(f"run.shows: it is of pictures with texts, and the data are {says(data)}: leave it out")
    return draw_shown(len(data.pairs("train")), shares, seed)


def lengths_of(data: Data) -> np.ndarray:
    """How long each training pair, that is its longer row or its text, or each training row is, for length buckets."""
    lengths = data.lengths()
    if isinstance(data, PairData):
        return lengths[data.pairs("train")].max(1)
    return lengths[data.pairs("train")[:, 1]] if isinstance(data, CaptionedData) else lengths[data.split("train")]


def training_rows(data: Data, shown: np.ndarray | None = None) -> Iterator[Row]:
    """Every row that training may see, decoded one after the other; ``shown`` as of `shown_of`."""
    if isinstance(data, CaptionedData):
        return iter(CaptionedRows(data, "train", shown))
    rows, used = (data.notes, np.unique(data.pairs("train"))) if isinstance(data, PairData) else (data.rows, data.split("train"))
    return (rows[int(i)] for i in used)


def says(data: Data) -> str:
    """What a data set consists of, in words."""
    if isinstance(data, CaptionedData):
        return "pictures with texts"
    return "rows of known class" if isinstance(data, LabelledData) else "pairs of items"


def check_fit(model: Any, data: Data) -> None:
    """Whether a model and its training data speak of the same things.

    Raises:
        ZooError: If they are of different kinds, the numbers of classes differ, or the rows never show what an encoder is for.
    """
    keys: tuple[str, ...] = model.processor.keys()
    if isinstance(model, Classifying):
        needs = "rows of known class"
    else:
        needs = "pictures with texts" if {*keys} <= {"image", "text"} else "pairs of items"
    if needs != says(data):
        raise ZooError(
            f"model and data: this model learns from {needs}, and the data are {says(data)}: write another model.name or data.name"
        )
    if isinstance(model, Classifying) and isinstance(data, LabelledData):
        if model.classes != len(data.classes):
            raise ZooError(f"model.classes: {model.classes}, and the data have {len(data.classes)} classes: write {len(data.classes)}")
        if lost := [key for key in keys if key not in data.modalities]:
            raise ZooError(f"model.encoders: no row shows {', '.join(lost)} (the data show: {', '.join(data.modalities)}); name these")
