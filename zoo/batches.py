"""What a training set is made of, pairs or labelled rows, as batches made in the data loader's workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from zoo.collate import Known, PairCollate, Sample, processed, stack
from zoo.errors import ZooError
from zoo.types import Batch, Classifying, Data, LabelledData, PairData, Row


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


class LabelledBatches(Dataset[Batch]):
    """As `PairBatches`, of rows of known class."""

    def __init__(self, data: LabelledData, process: int, processor: Any, keep: int) -> None:
        self.samples, self.train, self.labels, self.process = Kept(data.rows, processor, keep), data.split("train"), data.labels, process

    def __getitem__(self, shares: np.ndarray) -> Batch:
        """The batch whose ``shares`` (processes, B) are the rows of each process."""
        own = self.train[shares[self.process]]
        return Batch(stack([self.samples[i] for i in own.tolist()]), targets=torch.from_numpy(self.labels[own]), ids=torch.from_numpy(own))


def batches_of(data: Data, process: int, processor: Any, keep: int) -> Dataset[Batch]:
    """The training batches of one process, for indices of the shape (processes, B)."""
    made = PairBatches if isinstance(data, PairData) else LabelledBatches
    return made(data, process, processor, keep)  # type: ignore[arg-type]


def lengths_of(data: Data) -> np.ndarray:
    """How long each training pair, that is its longer row, or each training row is, for length buckets."""
    lengths = data.lengths()
    return lengths[data.pairs("train")].max(1) if isinstance(data, PairData) else lengths[data.split("train")]


def training_rows(data: Data) -> Iterator[Row]:
    """Every row that training may see, decoded one after the other."""
    rows, used = (data.notes, np.unique(data.pairs("train"))) if isinstance(data, PairData) else (data.rows, data.split("train"))
    return (rows[int(i)] for i in used)


def check_fit(model: Any, data: Data) -> None:
    """Whether a model and its training data speak of the same things.

    Raises:
        ZooError: If one is of classes and the other is not, their numbers differ, or the rows never show what an encoder is for.
    """
    classes = isinstance(model, Classifying)
    if classes != isinstance(data, LabelledData):
        has, needs = ("pairs", "rows of known class") if classes else ("rows of known class", "pairs of items")
        raise ZooError(f"model and data: this model learns from {needs}, and the data are {has}: write another model.name or data.name")
    if classes and isinstance(data, LabelledData):
        if model.classes != len(data.classes):
            raise ZooError(f"model.classes: {model.classes}, and the data have {len(data.classes)} classes: write {len(data.classes)}")
        keys: tuple[str, ...] = model.processor.keys()
        if lost := [key for key in keys if key not in data.modalities]:
            raise ZooError(f"model.encoders: no row shows {', '.join(lost)} (the data show: {', '.join(data.modalities)}); name these")
