"""Who was clicked together, counted and ranked a bounded number of co-clicks at a time: the heavy half of mining, in sorted arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

AT_ONCE = 2**20  # co-clicks that one step holds: few enough for the processor's caches
BATCH = 2**20  # rows that cross from DuckDB at a time
Array = NDArray[Any]


class Events(NamedTuple):
    """Which group clicked which note, in the order of the notes and again in that of the groups; E events, G groups, M notes."""

    note: Array  # (E,) int32 from 0, ascending
    group: Array  # (E,) int32 from 0
    first: Array  # (E,) float64, seconds
    member: Array  # (E',) int32: the notes of group 0, of group 1, ...
    last: Array  # (E',) float64, seconds
    start: Array  # (G + 1,) where a group's notes begin in ``member``
    weight: Array  # (G,) int64, what a co-click counts in this group
    notes: int  # M


class Pairs(NamedTuple):
    """Counted pairs, sorted by a and b."""

    a: Array  # (P,) int32
    b: Array  # (P,) int32
    total: Array  # (P,) int64, the weights of their groups
    groups: Array  # (P,) int64, how many these are


def stored(query: duckdb.DuckDBPyRelation, folder: Path) -> list[Array]:
    """The columns of a result, on disk and mapped, so that a log may be larger than the memory.

    Raises:
        OSError: If the disk is full: told while writing, where a map that is written to would end the process.
    """
    folder.mkdir()
    reader: pa.RecordBatchReader = query.to_arrow_reader(BATCH)
    paths = [folder / field.name for field in reader.schema]
    files: list[BinaryIO] = [path.open("wb") for path in paths]
    try:
        for batch in reader:
            for file, column in zip(files, batch.columns, strict=True):
                file.write(column.to_numpy(zero_copy_only=False).tobytes())
    finally:
        for file in files:
            file.close()
    types = [field.type.to_pandas_dtype() for field in reader.schema]
    return [np.memmap(p, t, "r") if p.stat().st_size else np.empty(0, t) for p, t in zip(paths, types, strict=True)]


def counted(events: Events, *, directed: bool) -> Iterator[tuple[Pairs, float]]:
    """Pairs of all notes, whole notes at a time, each with the share of the work that is done by then."""
    size = np.diff(events.start)[events.group]  # (E,) co-clicks that an event is in
    done = np.concatenate([[0], np.cumsum(size)])
    weights, code = np.unique(events.weight, return_inverse=True)  # few: a code fits in a key where a weight does not
    begins = np.flatnonzero(np.diff(events.note, prepend=-1))  # of each note's events
    limit = min(AT_ONCE, 2 ** (62 - events.notes.bit_length() - len(weights).bit_length()))
    cuts = np.searchsorted(done[begins], np.arange(limit, done[-1], limit))
    cuts = np.unique(np.concatenate([begins[cuts[cuts < len(begins)]], [0, len(events.note)]]))
    for low, high in pairwise(cuts):
        steps = np.searchsorted(done, np.arange(done[low] + 2 * limit, done[high], 2 * limit))  # inside a note that everybody clicks
        edges = np.unique(np.concatenate([[low], steps, [high]]))
        parts = (_count(events, slice(i, j), size, weights, code, directed) for i, j in pairwise(edges))
        yield reduce(_sum, parts), done[high] / max(done[-1], 1)


def _count(events: Events, part: slice, size: Array, weights: Array, code: Array, directed: bool) -> Pairs:
    """Every event beside every one of its group: sorted as whole numbers (a, b, weight), for sorting plain numbers is fast."""
    note, group, k = events.note[part], events.group[part], size[part]
    for_weight, for_b = len(weights).bit_length(), events.notes.bit_length()
    begins = np.diff(note, prepend=note[:1]) != 0
    place = np.arange(k.sum()) + np.repeat(events.start[group] - (np.cumsum(k) - k), k)
    b = events.member[place]
    counts = b != np.repeat(note, k)
    if directed:
        counts &= np.repeat(events.first[part], k) < events.last[place]
    key = np.repeat(np.cumsum(begins) << (for_b + for_weight) | code[group], k)[counts]
    key |= b[counts].astype(np.int64) << for_weight
    key.sort()
    pair = key >> for_weight
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    pair = pair[starts]
    a = note[np.concatenate([[0], np.flatnonzero(begins)])][pair >> for_b]
    total = np.add.reduceat(weights[key & (2**for_weight - 1)], starts) if len(starts) else np.empty(0, np.int64)
    return Pairs(a, (pair & (2**for_b - 1)).astype(np.int32), total, np.diff(starts, append=len(key)))


def _sum(x: Pairs, y: Pairs) -> Pairs:
    """The pairs of both."""
    a, b, total, groups = (np.concatenate(columns) for columns in zip(x, y, strict=True))
    order = np.lexsort((b, a))
    starts = np.flatnonzero((np.diff(a[order], prepend=-1) != 0) | (np.diff(b[order], prepend=-1) != 0))
    return Pairs(a[order][starts], b[order][starts], np.add.reduceat(total[order], starts), np.add.reduceat(groups[order], starts))


def best(pairs: Pairs, worth: Array, top: int) -> tuple[Array, Array]:
    """Which pairs (places, in order of a and rank) are among the ``top`` of their a, and their ranks from 0; equal ones go by b."""
    values = np.unique(worth)
    begins = np.flatnonzero(np.diff(pairs.a, prepend=-1))
    local = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(pairs.a)))
    order = np.argsort(local * len(values) - np.searchsorted(values, worth), kind="stable")
    rank = np.arange(len(order)) - begins[local]  # an a keeps its places, whatever their order
    return order[rank < top], rank[rank < top]


def table(columns: Sequence[tuple[Array, ...]], names: pa.Array) -> pa.Table:
    """Pairs with their notes' own names."""
    none = (*[np.empty(0, np.int32)] * 2, *[np.empty(0)] * 2, *[np.empty(0, np.int64)] * 2)
    a, b, score, cosine, groups, rank = (np.concatenate(found) for found in zip(none, *columns, strict=True))
    found = {"note_a": names.take(pa.array(a)), "note_b": names.take(pa.array(b)), "score": score, "cosine": cosine}
    return pa.table({**found, "n_groups": groups, "rank": rank})
