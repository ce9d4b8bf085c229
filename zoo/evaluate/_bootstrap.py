"""How far a mean over queries can be trusted: percentile intervals from resampled queries."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from zoo.errors import ZooError

_CELLS = 1 << 22  # query draws held at once: 32 MB


class Difference(NamedTuple):
    """One system minus another on the same queries, with its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile bootstrap interval of the mean over queries (Efron 1979, https://doi.org/10.1214/aos/1176344552).

    Queries are drawn with replacement, as if independent of one another; queries that share partners are not quite, so a
    true interval is a little wider. A draw is kept as how often each query came, so that all columns share the draws.

    Args:
        values: (Q,) or (Q, M) float; one row per query.
        resamples: Draws of Q queries each; 0: none, and both ends are the mean.
        seed: Of the draws; the same seed and Q give the same draws.

    Returns:
        Low and high, each of shape () or (M,).

    Raises:
        ZooError: If there is no query.
    """
    count = len(values)
    if count == 0:
        raise ZooError("an interval needs at least one query, got none")
    if resamples == 0:
        mean = np.asarray(values.mean(axis=0))
        return mean, mean
    generator = np.random.default_rng(seed)
    at_once = max(1, _CELLS // count)
    means = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = generator.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)  # (rows, Q)
        means.append(times @ values.astype(np.float64) / count)
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low, high


def paired_difference(hits_a: np.ndarray, hits_b: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Difference:
    """Mean of ``hits_a - hits_b`` with its interval; pairing by query takes out what makes a query hard for both.

    Args:
        hits_a: (Q,) recall of each query under the first system.
        hits_b: (Q,) the same queries, in the same order, under the second.
        resamples: As for `interval`.
        seed: As for `interval`.

    Raises:
        ZooError: If the two do not hold the same number of queries.
    """
    if hits_a.shape != hits_b.shape or hits_a.ndim != 1:
        raise ZooError(f"a paired difference needs the same queries twice, got shapes {hits_a.shape} and {hits_b.shape}")
    difference = hits_a.astype(np.float64) - hits_b
    low, high = interval(difference, resamples=resamples, seed=seed)
    return Difference(float(difference.mean()), float(low), float(high))
