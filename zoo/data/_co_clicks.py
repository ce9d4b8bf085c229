"""Who was clicked together, counted and ranked a bounded number of co-clicks at a time: the heavy half of mining, in sorted arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

UNIT = 10**15  # scores are summed as whole numbers of 1/UNIT: exact, hence the same for any order of summing
AT_ONCE = 2**20  # co-clicks that one step holds: few enough for the processor's caches
Array = NDArray[Any]


class Events(NamedTuple):
    """Which group holds which note, in the order of the notes and again in that of the groups; E events, G groups, M notes."""

    note: Array  # (E,) int32 from 0, ascending
    group: Array  # (E,) int32 from 0
    first: Array  # (E,) float64, seconds
    member: Array  # (E,) int32: the notes of group 0, of group 1, ...
    last: Array  # (E,) float64, seconds
    start: Array  # (G + 1,) where a group's notes begin in ``member``
    size: Array  # (G,) how many notes it holds, those that were not drawn too
    weight: Array  # (G,) int64, what a co-click counts in it
    groups: Array  # (M,) float64, in how many groups a note is held


class Pairs(NamedTuple):
    """Counted pairs, sorted by a and b."""

    a: Array  # (P,) int32
    b: Array  # (P,) int32
    total: Array  # (P,) int64, the weights of their groups
    groups: Array  # (P,) int64, how many these are


def gathered(group: pa.ChunkedArray, note: Array, at: Array, *, notes: int, most: int | None, seed: int) -> Events:
    """Clicks to events, of which a group's first and last click on a note are kept.

    Args:
        group: (C,) of any type that can be compared; the clicks are sorted by group, then by note.
        note: (C,) int32 from 0.
        at: (C,) seconds.
        notes: How many there are.
        most: Of a group with more notes, so many are drawn; None: all.
        seed: Of the draw.
    """
    opens = _changes(group)
    begins = np.flatnonzero(opens | (np.diff(note, prepend=-1) != 0))
    member, start = note[begins], np.flatnonzero(opens[begins])
    first, last = (np.asarray(f.reduceat(at, begins) if len(begins) else at) for f in (np.minimum, np.maximum))
    size = np.diff(start, append=len(member))
    of = np.repeat(np.arange(len(size), dtype=np.int32), size)
    groups = np.bincount(member, minlength=notes).astype(np.float64)
    if most is not None and (size > most).any():
        drawn = _drawn(start, size, most, seed)
        member, of, first, last = member[drawn], of[drawn], first[drawn], last[drawn]
    start = np.searchsorted(of, np.arange(len(size) + 1))
    for_place = len(member).bit_length()
    by_note = np.sort(member.astype(np.int64) << for_place | np.arange(len(member))) & (2**for_place - 1)  # numbers sort faster than places
    weight = np.floor(UNIT / size + 0.5).astype(np.int64)
    return Events(member[by_note], of[by_note], first[by_note], member, last, start, size, weight, groups)


def _changes(column: pa.ChunkedArray) -> Array:
    """(C,) bool: whether a value differs from the one before it; the first does."""
    if not len(column):
        return np.empty(0, bool)
    return np.concatenate([[True], pc.not_equal(column.slice(1), column.slice(0, len(column) - 1)).to_numpy()])


def _drawn(start: Array, size: Array, most: int, seed: int) -> Array:
    """The places of the events that stay, ascending."""
    draw = np.random.default_rng(seed)
    stays = np.ones(size.sum(), bool)
    for group in np.flatnonzero(size > most):
        stays[start[group] : start[group] + size[group]] = False
        stays[start[group] + draw.choice(size[group], most, replace=False)] = True
    return np.flatnonzero(stays)


def counted(events: Events, asked: Array, *, directed: bool) -> Iterator[tuple[Pairs, float]]:
    """Pairs of the notes that are asked for (M,), whole notes at a time, each with the share of the work that is done by then."""
    if not asked.all():
        wanted = asked[events.note]
        events = events._replace(note=events.note[wanted], group=events.group[wanted], first=events.first[wanted])
    size = np.diff(events.start)[events.group]  # (E,) co-clicks that an event is in
    done = np.concatenate([[0], np.cumsum(size)])
    weights, code = np.unique(events.weight, return_inverse=True)  # few: a code fits in a key where a weight does not
    begins = np.flatnonzero(np.diff(events.note, prepend=-1))  # of each note's events
    limit = min(AT_ONCE, 2 ** (62 - len(events.groups).bit_length() - len(weights).bit_length()))
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
    for_weight, for_b = len(weights).bit_length(), len(events.groups).bit_length()
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
