"""Raw rows to a Batch, in the data loader's workers: process each row, pad, stack, and say which rows belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.types import Batch, ModalityInputs, Pair, Row

Sample = Mapping[str, ModalityInputs]  # one row, processed: its modalities without the B dimension; absent ones are not there


def processed(process: Callable[[Row], Sample], row: Row, number: int) -> Sample:
    """One row, processed.

    Args:
        process: The model's processor.
        row: Raw.
        number: Of the row, for messages.

    Raises:
        ZooError: If something of it cannot be read, naming the row.
    """
    try:
        return process(row)
    except ZooError as e:
        raise type(e)(f"row {number}: {e}") from e


def stack(samples: Sequence[Sample]) -> dict[str, ModalityInputs]:
    """Samples to batched inputs: sequences are padded at the end with 0, absent modalities become zeros with present=False.

    Args:
        samples: At least one.

    Returns:
        {modality: ModalityInputs} over every modality that any sample has.
    """
    modalities = list(dict.fromkeys(m for s in samples for m in s))
    return {m: _stack_one([s.get(m) for s in samples]) for m in modalities}


def _stack_one(items: Sequence[ModalityInputs | None]) -> ModalityInputs:
    deepest = max(x.values.ndim for x in items if x is not None)
    items = [_deepened(x, deepest) for x in items]
    some = next(x for x in items if x is not None)
    present = torch.tensor([x is not None for x in items])
    values = _pad([x.values if x is not None else None for x in items], some.values)
    mask = None
    if any(x is not None and (x.mask is not None or x.values.shape != values.shape[1:]) for x in items):
        mask = _pad([_mask(x) if x is not None else None for x in items], _mask(some))
    extra = {
        key: _pad([x.extra[key] if x is not None else None for x in items], like, fill=-1 if like.ndim == 0 else 0)
        for key, like in some.extra.items()
    }
    return ModalityInputs(values, mask, None if bool(present.all()) else present, extra)


def _deepened(x: ModalityInputs | None, ndim: int) -> ModalityInputs | None:
    """One image among rows of several is a row of one."""
    return x._replace(values=x.values[None]) if x is not None and x.values.ndim < ndim else x


def _mask(x: ModalityInputs) -> Tensor:
    return x.mask if x.mask is not None else torch.ones(len(x.values), dtype=torch.bool)


def _pad(items: Sequence[Tensor | None], like: Tensor, fill: int = 0) -> Tensor:
    """Stack along a new first dimension, the longest first dimension of the items deciding; None becomes ``fill``."""
    if like.ndim == 0:
        return torch.stack([x if x is not None else torch.full_like(like, fill) for x in items])
    longest = max(len(x) for x in items if x is not None)
    blank = like.new_full((longest, *like.shape[1:]), fill)
    rest = (0, 0) * (like.ndim - 1)
    return torch.stack([blank if x is None else F.pad(x, (*rest, 0, longest - len(x)), value=fill) for x in items])


class Known(NamedTuple):
    """Which items are positives of each other, as a compressed table that is cheap to send to a worker."""

    start: Tensor  # (I + 1,) int64
    partner: Tensor  # (P,) int64, those of item i at start[i]:start[i + 1]

    @classmethod
    def of(cls, pairs: Tensor, items: int) -> Known:
        """From (P, 2) pairs of item ids below ``items``; both directions count."""
        both = torch.cat([pairs, pairs.flip(1)]).unique(dim=0)  # sorted by the first
        start = torch.zeros(items + 1, dtype=torch.int64)
        start[1:] = torch.bincount(both[:, 0], minlength=items).cumsum(0)
        return cls(start, both[:, 1].contiguous())

    def within(self, ids: Tensor, together: Tensor | None = None, process: int = 0) -> Tensor:
        """(E, 2) pairs of rows whose items are positives of each other, as in `Batch.known`.

        Args:
            ids: (B,) items of a batch.
            together: (W, B) items of the batches of all processes that train together; None: of this one alone.
            process: Which of them is this one.
        """
        everyone = ids if together is None else together.flatten()
        number = self.start[ids + 1] - self.start[ids]  # of partners
        row, item = torch.arange(len(ids)).repeat_interleave(number), self.partner[_ranges(self.start[ids], number)]
        ordered, place = everyone.sort()
        first = torch.searchsorted(ordered, item)
        number = torch.searchsorted(ordered, item, right=True) - first  # of rows that hold the partner
        return torch.stack([row.repeat_interleave(number), place[_ranges(first, number)] - process * len(ids)], 1)


def _ranges(first: Tensor, number: Tensor) -> Tensor:
    """``first[0], first[0] + 1, ...``, ``number[0]`` of them, then those of ``first[1]``, and so on."""
    return torch.arange(int(number.sum())) + (first - number.cumsum(0) + number).repeat_interleave(number)


class PairCollate:
    """Pairs of raw rows to a Batch laid out q1..qB, d1..dB.

    Args:
        process: The model's processor: a raw row to its modalities.
        known: Pairs that are positives of each other in the training set, wherever they meet in a batch.
    """

    def __init__(self, process: Callable[[Row], Sample], known: Known | None = None) -> None:
        self.process, self.known = process, known

    def __call__(self, pairs: Sequence[Pair], together: Tensor | None = None, process: int = 0) -> Batch:
        """The batch of one process.

        Args:
            pairs: Its pairs.
            together: (W, 2B) items of the batches of all processes that train together; None: of this one alone.
            process: Which of them is this one.
        """
        rows = [p.query for p in pairs] + [p.target for p in pairs]
        return self.joined([self.process(r) for r in rows], torch.tensor([r["id"] for r in rows]), together, process)

    def joined(self, samples: Sequence[Sample], ids: Tensor, together: Tensor | None = None, process: int = 0) -> Batch:
        """The batch of rows that are processed already: the queries, then the targets.

        Args:
            samples: 2B.
            ids: (2B,) their items.
            together: As above.
            process: As above.
        """
        positive = (torch.arange(len(ids)) + len(ids) // 2) % len(ids)
        known = self.known.within(ids, together, process) if self.known else None
        return Batch(stack(samples), ids=ids, positive=positive, known=known)


class RowCollate:
    """Raw rows to a Batch, for encoding."""

    def __init__(self, process: Callable[[Row], Sample]) -> None:
        self.process = process

    def __call__(self, rows: Sequence[Row]) -> Batch:
        return Batch(stack([self.process(r) for r in rows]))
