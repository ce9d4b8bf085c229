"""Recall@K of item-to-item retrieval: exact, in chunks, by the protocols that published numbers use.

Ties are pessimistic: a candidate that scores the same as a partner counts as better than it, so a scorer that cannot tell
notes apart earns nothing by the order in which they happen to lie. Two tied partners count as better than one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from zoo.errors import ZooError
from zoo.evaluate._bootstrap import Difference, interval, paired_difference
from zoo.evaluate._scorer import Scorer
from zoo.metric import Metric
from zoo.types import PairData

__all__ = [
    "Difference",
    "Scorer",
    "Task",
    "embedding_scorer",
    "measure",
    "multi",
    "one_target",
    "paired_difference",
    "recalls",
    "tasks",
    "topk",
]

Protocol = Literal["one_target", "multi"]
Subset = Literal["all", "short_query", "short_target"]
Input = Literal["both", "text", "image"]
Denominator = Literal["partners", "reachable"]

_CELLS = 1 << 23  # scores held at once: 64 MB in float64


class Task(NamedTuple):
    """What is to be found among what. The query itself is never a candidate, whether or not it is named as one."""

    pairs: np.ndarray  # (P, 2) int64 query and partner; grouped by query in ascending order
    candidates: np.ndarray  # (C,) int64 distinct


def one_target(pairs: np.ndarray, pool: np.ndarray) -> Task:
    """The protocol of NoteLLM-2 (Zhang et al. 2024, https://arxiv.org/abs/2405.16789), as its published code has it.

    Pairs are walked in file order and kept only if neither note has appeared in a kept pair, in either role: every query
    has one partner. The candidates are the pool without *all* kept queries, not only the one that asks.

    Args:
        pairs: (P, 2) int64.
        pool: (C,) int64.
    """
    taken: set[int] = set()
    kept = []
    for query, target in pairs.tolist():
        if query not in taken and target not in taken:
            kept.append((query, target))
            taken.update((query, target))
    chosen = np.array(kept, dtype=np.int64).reshape(-1, 2)
    return Task(chosen[np.argsort(chosen[:, 0])], np.setdiff1d(pool, chosen[:, 0]))


def multi(pairs: np.ndarray, pool: np.ndarray) -> Task:
    """Recall of all partners of a query; the candidates are the pool without the query that asks.

    Args:
        pairs: (P, 2) int64; a pair that stands there twice counts once.
        pool: (C,) int64.
    """
    return Task(np.unique(pairs.reshape(-1, 2), axis=0), np.unique(pool))


def measure(
    scorer: Scorer,
    data: PairData,
    *,
    split: str = "test",
    protocol: Protocol = "multi",
    ks: Sequence[int] = (10, 100),
    input: Input = "both",
    denominator: Denominator = "partners",
    resamples: int = 1000,
    seed: int = 0,
) -> list[Metric]:
    """Recall@K on All, Short-query and Short-target, each with its 95 % interval.

    A subset is evaluated for itself: the pairs whose query (partner) is short are taken out of the file first, and the
    protocol is applied to them, with its own kept pairs, candidates and, under ``multi``, short partners only.

    Args:
        scorer: Gives the score of every note for a chunk of queries.
        data: Whose pairs, pool and short notes are used.
        split: Which of its pairs.
        protocol: `one_target` or `multi`.
        ks: Cut-offs; a query is answered within K if fewer than K candidates are as near as the partner or nearer.
        input: What the scorer saw; it is only written into the result.
        denominator: Of the recall of a query under ``multi``: ``partners``, all of them, so that a query with more than K
            cannot reach 1; ``reachable``, at most K of them, so that every query can.
        resamples: For the intervals.
        seed: For the intervals.

    Returns:
        One record per subset and cut-off; a subset without a pair has none.

    Raises:
        ZooError: If there are no pairs, a partner is not in the pool, a pair joins a note to itself, K exceeds the number of
            candidates, or a score is not finite.
    """
    asked = tasks(data, split=split, protocol=protocol, ks=ks)
    found = recalls(scorer, list(asked.values()), ks, denominator=denominator)
    metrics = []
    for (name, task), hits in zip(asked.items(), found, strict=True):
        queries = np.unique(task.pairs[:, 0])
        low, high = interval(hits, resamples=resamples, seed=seed)
        for i, k in enumerate(ks):
            metrics.append(
                Metric(protocol, name, input, int(k), float(hits[:, i].mean()), float(low[i]), float(high[i]), queries, hits[:, i])
            )
    return metrics


def tasks(data: PairData, *, split: str, protocol: Protocol, ks: Sequence[int]) -> dict[Subset, Task]:
    """What `measure` will ask, without asking it; a subset without a pair has no task.

    Raises:
        ZooError: As `measure`, of all but the scores: a run asks here before it trains.
    """
    pairs, pool, short = data.pairs(split), data.pool(split), data.short()
    if len(pairs) == 0:
        raise ZooError(f"split {split!r} has no pairs: there is nothing to find; mine with lower bounds or name another split")
    _check_pairs(pairs, pool, split)
    apply = {"one_target": one_target, "multi": multi}[protocol]
    subsets: dict[Subset, np.ndarray] = {"all": pairs, "short_query": pairs[short[pairs[:, 0]]], "short_target": pairs[short[pairs[:, 1]]]}
    found = {name: apply(chosen, pool) for name, chosen in subsets.items() if len(chosen)}
    _check_ks(ks, {f"{protocol}/{name}": task for name, task in found.items()})
    return found


def recalls(scorer: Scorer, tasks: Sequence[Task], ks: Sequence[int], *, denominator: Denominator = "partners") -> list[np.ndarray]:
    """The recall of every query of every task; each query is scored once, whatever the number of tasks.

    Returns:
        For each task (Q, len(ks)) float64, its queries in ascending order.

    Raises:
        ZooError: If a score is not finite, or the scores have not a column for every note.
    """
    queries = np.unique(np.concatenate([task.pairs[:, 0] for task in tasks]))
    notes = 1 + max(max(task.candidates.max(initial=0), task.pairs.max(initial=0)) for task in tasks)
    found: list[list[np.ndarray]] = [[] for _ in tasks]
    for asked, scores in _scored(scorer, queries, int(notes)):
        for task, parts in zip(tasks, found, strict=True):
            parts.append(_chunk_recalls(task, asked, scores, ks, denominator))
    return [np.concatenate(parts) for parts in found]


def _scored(scorer: Scorer, queries: np.ndarray, notes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of queries with their scores (q, N), checked. ``notes`` is a lower bound of N."""
    size = max(1, _CELLS // notes)
    for start in range(0, len(queries), size):
        asked = queries[start : start + size]
        scores = np.asarray(scorer(asked))
        if scores.ndim != 2 or scores.shape[0] != len(asked) or scores.shape[1] < notes:
            raise ZooError(f"the scorer gave shape {scores.shape} for {len(asked)} queries over at least {notes} notes: it must be (q, N)")
        wrong = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if len(wrong):
            some = ", ".join(map(str, asked[wrong[:5]]))
            raise ZooError(
                f"scores of {len(wrong)} of {len(asked)} queries are not finite (queries {some}): a ranking of NaN means nothing"
            )
        yield asked, scores


def _chunk_recalls(task: Task, asked: np.ndarray, scores: np.ndarray, ks: Sequence[int], denominator: Denominator) -> np.ndarray:
    """(q, len(ks)) for those of ``asked`` that the task asks.

    A partner is within K exactly if its score is above the (K+1)-th largest: then at most K candidates, itself among
    them, reach it. That needs no ranking of the whole row.
    """
    first, last = np.searchsorted(task.pairs[:, 0], [asked[0], asked[-1] + 1])
    pairs = task.pairs[first:last]
    queries, row, partners = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    if len(queries) == 0:
        return np.zeros((0, len(ks)))
    mine = scores[np.searchsorted(asked, queries)]  # (q, N)
    sought = mine[row, pairs[:, 1]]  # (P,)
    others = torch.from_numpy(mine[:, task.candidates])  # (q, C)
    others[torch.from_numpy(task.candidates == queries[:, None])] = -torch.inf
    width = others.shape[1]
    largest = others.topk(min(max(ks) + 1, width)).values.numpy()  # (q, max(ks) + 1), descending
    recall = np.empty((len(queries), len(ks)))
    for i, k in enumerate(ks):
        border = largest[:, k] if k < width else np.full(len(queries), -np.inf)
        hits = np.bincount(row, weights=sought > border[row], minlength=len(queries))
        recall[:, i] = hits / (np.minimum(partners, k) if denominator == "reachable" else partners)
    return recall


def embedding_scorer(vectors: np.ndarray | torch.Tensor) -> Scorer:
    """Cosine similarity of (N, D) vectors; a zero vector is 0 from everything.

    Computed in float64 and rounded to float32: the last bit of a matrix product depends on where a column lies in its
    block, and two notes with the same vector must tie.

    Raises:
        ZooError: If the vectors are not a matrix of finite numbers.
    """
    unit = _unit(vectors)

    def score(queries: np.ndarray) -> np.ndarray:
        return (unit[torch.from_numpy(queries)] @ unit.T).float().numpy()

    return score


def topk(vectors: np.ndarray | torch.Tensor, queries: np.ndarray | torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The K nearest of (N, D) vectors to each of (Q, D) by cosine; equal scores in the order of the notes.

    Returns:
        (Q, k) int64 note indices and (Q, k) float32 scores, best first.

    Raises:
        ZooError: If k exceeds N, the widths differ, or a value is not finite.
    """
    unit, asked = _unit(vectors), _unit(queries)
    if not 1 <= k <= len(unit):
        raise ZooError(f"k = {k} neighbours of {len(unit)} notes: k must be between 1 and {len(unit)}")
    if unit.shape[1] != asked.shape[1]:
        raise ZooError(f"queries of width {asked.shape[1]} do not fit vectors of width {unit.shape[1]}: encode both with one model")
    places, scores = [], []
    for part in asked.split(max(1, _CELLS // len(unit))):
        best = (part @ unit.T).float().sort(dim=1, descending=True, stable=True)
        places.append(best.indices[:, :k])
        scores.append(best.values[:, :k])
    return torch.cat(places).numpy(), torch.cat(scores).numpy()


def _unit(vectors: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(N, D) float64 on the CPU, L2-normalised."""
    x = torch.as_tensor(vectors).detach().cpu().double()
    if x.ndim != 2:
        raise ZooError(f"vectors of shape {tuple(x.shape)}: expected (notes, width)")
    wrong = (~x.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if wrong:
        raise ZooError(f"{len(wrong)} of {len(x)} vectors are not finite (rows {', '.join(map(str, wrong[:5]))}): the model diverged")
    return torch.nn.functional.normalize(x, dim=1)


def _check_pairs(pairs: np.ndarray, pool: np.ndarray, split: str) -> None:
    faults = []
    itself = int((pairs[:, 0] == pairs[:, 1]).sum())
    if itself:
        faults.append(f"{itself} pairs join a note to itself")
    outside = np.setdiff1d(pairs[:, 1], pool)
    if len(outside):
        faults.append(f"{len(outside)} partners are not in the pool of candidates (notes {', '.join(map(str, outside[:5]))})")
    if faults:
        raise ZooError(f"pairs of split {split!r} cannot be evaluated: {'; '.join(faults)}")


def _check_ks(ks: Sequence[int], tasks: dict[str, Task]) -> None:
    faults = [f"k = {k} is no cut-off" for k in ks if k < 1]
    for name, task in tasks.items():
        room = len(task.candidates) - bool(np.isin(task.pairs[:, 0], task.candidates).any())
        faults += [f"k = {k}, but a query of {name} has {room} candidates" for k in ks if k > room]
    if faults or not ks:
        raise ZooError("; ".join(faults) or "no k was given: write at least one, such as ks=(10, 100)")
