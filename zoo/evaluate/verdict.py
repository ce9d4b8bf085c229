"""Is the model better than what it has to beat? One line that a person and a script can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from zoo.errors import ZooError, unknown
from zoo.evaluate._bootstrap import paired_difference

Outcome = Literal["WIN", "MARGINAL", "REGRESSION", "UNDECIDED"]
ENOUGH = 20  # queries; of fewer, the resamples are too much alike for their interval to mean what it says


class Comparison(NamedTuple):
    """One arm against one baseline on the same queries; ``mean``, ``low`` and ``high`` are of the paired difference."""

    arm: str
    baseline: str
    recall: float
    baseline_recall: float
    mean: float
    low: float
    high: float
    queries: int

    @property
    def outcome(self) -> Outcome:
        """WIN if the whole interval lies above 0, REGRESSION if it lies below, MARGINAL if it holds 0; UNDECIDED below `ENOUGH` queries."""
        if self.queries < ENOUGH:
            return "UNDECIDED"
        return "WIN" if self.low > 0 else "REGRESSION" if self.high < 0 else "MARGINAL"


def compare(
    arm: str, baselines: Sequence[str], hits: Mapping[str, np.ndarray], *, resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """``arm`` against each of ``baselines``, the best baseline first.

    Args:
        arm: The system in question.
        baselines: The systems it has to beat.
        hits: The recall of every query, (Q,), by name of the system; the same queries in the same order.
        resamples: Of the bootstrap over queries.
        seed: Of the bootstrap.

    Raises:
        ZooError: If a system has no hits, or the queries differ in number.
    """
    faults = [unknown("system with hits", name, hits) for name in (arm, *baselines) if name not in hits]
    if faults:
        raise ZooError("\n".join(faults))
    comparisons = []
    for baseline in baselines:
        mine, other = hits[arm], hits[baseline]
        difference = paired_difference(mine, other, resamples=resamples, seed=seed)
        comparisons.append(Comparison(arm, baseline, float(mine.mean()), float(other.mean()), *difference, len(mine)))
    return sorted(comparisons, key=lambda c: -c.baseline_recall)


def verdict(measure: str, comparisons: Sequence[Comparison]) -> str:
    """The line against the best baseline; its fields are separated by `` | ``.

    ``VERDICT: WIN | recall@10=0.312 | baseline bm25=0.241 | difference=+0.071 [+0.055, +0.087]``

    Args:
        measure: What is compared, as `zoo.metric.measure_name` calls it.
        comparisons: By `compare`.

    Raises:
        ZooError: If there is no baseline.
    """
    if not comparisons:
        raise ZooError("a verdict needs a baseline: name at least one, such as 'bm25'")
    best = max(comparisons, key=lambda c: c.baseline_recall)
    return (
        f"VERDICT: {best.outcome} | {measure}={best.recall:.3f} | baseline {best.baseline}={best.baseline_recall:.3f}"
        f" | difference={best.mean:+z.3f} [{best.low:+z.3f}, {best.high:+z.3f}]"
    )
