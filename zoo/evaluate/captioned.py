"""Which texts a picture finds and which pictures a text finds: recall both ways, and what a random ranking would find.

A query may have several partners: a picture five texts, a text the same thing drawn in four styles. It is answered within K where any of
them is, as results on COCO and Flickr30k are counted (Karpathy and Fei-Fei, 2015, https://arxiv.org/abs/1412.2306). Ties are pessimistic,
as in `zoo.evaluate.retrieval`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import torch

from zoo.errors import Failure, ZooError
from zoo.evaluate._bootstrap import interval
from zoo.metric import DIRECTIONS, Metric
from zoo.sections import Retrieve
from zoo.types import CaptionedData

_CELLS = 1 << 23  # scores held at once: 64 MB in float64


class Search(NamedTuple):
    """One direction of one split: what is asked, among what it is sought, and what is right."""

    direction: str  # of `DIRECTIONS`
    split: str
    queries: np.ndarray  # (Q,) int64 pictures or texts, ascending
    candidates: np.ndarray  # (C,) int64 of the other kind, ascending
    right: np.ndarray  # (n, 2) int64 places in queries and candidates, each pair once
    member: Mapping[str, np.ndarray]  # {group: (Q,) bool}

    @property
    def partners(self) -> np.ndarray:
        """(Q,) int64, how many each query has."""
        return np.bincount(self.right[:, 0], minlength=len(self.queries))

    def is_right(self, first: int, after: int) -> np.ndarray:
        """(after - first, C) bool of some of the queries."""
        out = np.zeros((after - first, len(self.candidates)), dtype=bool)
        some = self.right[(self.right[:, 0] >= first) & (self.right[:, 0] < after)]
        out[some[:, 0] - first, some[:, 1]] = True
        return out


class Nearest(NamedTuple):
    """What each query of a search found first."""

    places: np.ndarray  # (Q, n) int64 places in the candidates, nearest first; of equal ones a partner comes last
    scores: np.ndarray  # (Q, n) float32


def searches(data: CaptionedData, split: str) -> list[Search]:
    """Both directions of a split.

    Raises:
        ZooError: If there is no such split, or nothing in it.
    """
    pairs = data.pairs(split)
    if not len(pairs):
        raise ZooError(
            f"split {split!r} has no pairs of a picture and a text, and so nothing to find: name another split, or give it pictures"
        )
    groups, found = data.groups(split), []
    for direction, (asks, sought) in zip(DIRECTIONS, ((0, 1), (1, 0)), strict=True):
        queries, of = np.unique(pairs[:, asks], return_inverse=True)
        candidates, to = np.unique(pairs[:, sought], return_inverse=True)
        member = {name: np.bincount(of, weights=there, minlength=len(queries)) > 0 for name, there in groups.items()}
        found.append(Search(direction, split, queries, candidates, np.unique(np.stack([of, to], 1), axis=0), member))
    return found


def check(data: CaptionedData, settings: Retrieve) -> None:
    """Whether the data can answer what will be measured.

    Raises:
        ZooError: If a split is not there or empty, has fewer candidates than a k, or has no groups to tell apart.
    """
    faults = []
    for split in settings.splits:
        try:
            both = searches(data, split)
        except ZooError as e:
            faults.append(f"retrieve.splits: {e}")
            continue
        for search in both:
            room = len(search.candidates)
            faults += [
                f"retrieve.k: {k}, but {DIRECTIONS[search.direction]} split {split!r} has {room} candidates" for k in settings.k if k > room
            ]
        if settings.zeroshot.templates and settings.zeroshot.classes == "groups" and len(data.groups(split)) < 2:
            faults.append(f"retrieve.zeroshot.classes: split {split!r} has no groups to tell apart: write captions")
    if faults:
        raise ZooError("\n".join(faults))


def ranks(search: Search, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """(Q,) int64, 1 and more: where each query's first partner lies, by cosine.

    Args:
        search: What is asked.
        queries: (Q, D) vectors.
        candidates: (C, D).

    Raises:
        Failure: If a vector is not finite.
    """
    found = np.zeros(len(search.queries), dtype=np.int64)
    for first, scores in _scored(queries, candidates):
        found[first : first + len(scores)] = places_of_first(scores, search.is_right(first, first + len(scores)))
    return found


def nearest(search: Search, queries: np.ndarray, candidates: np.ndarray, count: int) -> Nearest:
    """The ``count`` nearest candidates of each query, or all where there are fewer.

    Args:
        search: What is asked.
        queries: (Q, D) vectors.
        candidates: (C, D).
        count: Positive.

    Raises:
        Failure: If a vector is not finite.
    """
    places, kept = [], []
    for first, scores in _scored(queries, candidates):
        order = np.lexsort((search.is_right(first, first + len(scores)), -scores), axis=1)[:, :count]
        places.append(order)
        kept.append(np.take_along_axis(scores, order, 1))
    return Nearest(np.concatenate(places), np.concatenate(kept))


def places_of_first(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(q,) int64, 1 and more: how many of the wrong score as high as the best of the right, and one.

    Args:
        scores: (q, C) float, higher is nearer.
        right: (q, C) bool, one in each row at least.
    """
    best = np.where(right, scores, -np.inf).max(1)
    return 1 + ((scores >= best[:, None]) & ~right).sum(1)


def reranked(before: np.ndarray, search: Search, near: Nearest, scores: np.ndarray) -> np.ndarray:
    """(Q,) int64 as `ranks`, where the nearest of each query were scored again and all others stay below them, in their order.

    Args:
        before: (Q,) `ranks` by cosine.
        search: What is asked.
        near: What was scored again.
        scores: (Q, n) higher is nearer, in the order of ``near.places``.
    """
    found = before.copy()
    for first in range(0, len(before), size := max(1, _CELLS // max(1, len(search.candidates)))):
        places = near.places[first : first + size]
        right = np.take_along_axis(search.is_right(first, first + len(places)), places, 1)
        has = right.any(1)  # a query without a partner among them has it behind them, where it was
        found[first : first + len(places)][has] = places_of_first(scores[first : first + len(places)][has], right[has])
    return found


def chance(search: Search, k: int) -> np.ndarray:
    """(Q,) float64, how probable it is that each query is answered within ``k`` by a random ranking."""
    count = len(search.candidates)
    by = {int(m): 1.0 - comb(count - int(m), k) / comb(count, k) for m in np.unique(search.partners)}
    return np.array([by[int(m)] for m in search.partners])


def metrics(search: Search, found: np.ndarray, ks: Sequence[int], given: str, *, resamples: int, seed: int) -> list[Metric]:
    """Recall at each k, with its 95 % interval over queries.

    Args:
        search: What was asked.
        found: (Q,) `ranks`.
        ks: Cut-offs.
        given: What the metric is of, in the place of what was shown: ``all``, or ``reranked``.
        resamples: For the intervals.
        seed: For the intervals.
    """
    hits = (found[:, None] <= np.array(ks)[None]).astype(np.float64)  # (Q, len(ks))
    low, high = interval(hits, resamples=resamples, seed=seed)
    return [
        Metric(search.direction, search.split, given, int(k), float(hits[:, i].mean()), float(low[i]), float(high[i]), search.queries, row)
        for i, (k, row) in enumerate(zip(ks, hits.T.copy(), strict=True))
    ]


def by_group(search: Search, found: np.ndarray, ks: Sequence[int], *, resamples: int, seed: int) -> list[dict[str, object]]:
    """Recall at each k of the queries of every group, with interval and chance, as plain values.

    Args:
        search: What was asked.
        found: (Q,) `ranks`.
        ks: Cut-offs.
        resamples: For the intervals.
        seed: For the intervals.
    """
    rows: list[dict[str, object]] = []
    for name, there in search.member.items():
        if not there.any():
            continue
        hits = (found[there][:, None] <= np.array(ks)[None]).astype(np.float64)
        low, high = interval(hits, resamples=resamples, seed=seed)
        cells = [
            {"k": int(k), "recall": float(hits[:, i].mean()), "low": float(low[i]), "high": float(high[i])}
            | {"chance": float(chance(search, k)[there].mean())}
            for i, k in enumerate(ks)
        ]
        rows.append({"direction": search.direction, "split": search.split, "group": name, "queries": int(there.sum()), "cells": cells})
    return rows


def _scored(queries: np.ndarray, candidates: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Chunks of cosines (q, C) float32, each with the place of its first query.

    Computed in float64 and rounded, so that two candidates with the same vector tie wherever they lie.
    """
    left, right = _unit(queries), _unit(candidates)
    size = max(1, _CELLS // max(1, len(right)))
    for first in range(0, len(left), size):
        yield first, (left[first : first + size] @ right.T).float().numpy()


def _unit(vectors: np.ndarray) -> torch.Tensor:
    """(N, D) float64 of length 1."""
    x = torch.from_numpy(np.asarray(vectors)).double()
    if wrong := int((~x.isfinite().all(1)).sum()):
        raise Failure(f"{wrong} of {len(x)} vectors are not finite: the model diverged")
    return torch.nn.functional.normalize(x, dim=1)
