"""Ours and another library's way to do the same, in turn in one process: the ratio of their times, kept by machine."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from zoo.bench import commit, machine, pick_device
from zoo.files import write_json

RESULTS = Path(__file__).parent / "results/libraries"


class Beside(NamedTuple):
    """What the rounds gave."""

    ours: float  # seconds of CPU time, median over the rounds
    theirs: float
    ratio: float  # median over the rounds of theirs / ours: how many times faster ours is
    low: float  # of the ratio
    high: float
    rounds: int


def children_seconds() -> float:
    """CPU time of the processes that this one started and that have ended, all of their threads together."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def beside(
    benchmark: Any, ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int, timer: Callable[[], float] = time.process_time
) -> Beside:
    """Time ``ours`` by pytest-benchmark, and before each of its rounds ``theirs`` by the same timer.

    Args:
        benchmark: The fixture, marked with the same ``timer``.
        ours: Has run before.
        theirs: Has run before.
        rounds: Of each.
        timer: Of CPU time: on a shared machine the clock on the wall tells how busy the others are.
    """
    others: list[float] = []

    def before() -> None:
        start = timer()
        theirs()
        others.append(timer() - start)

    benchmark.pedantic(ours, setup=before, rounds=rounds)
    own: list[float] = benchmark.stats.stats.data
    ratios = [b / a for a, b in zip(own, others, strict=True)]
    return Beside(statistics.median(own), statistics.median(others), statistics.median(ratios), min(ratios), max(ratios), rounds)


def keep(benchmark: Any, name: str, found: Beside, *, target: float | None, packages: tuple[str, ...], **about: Any) -> None:
    """Put a result into this machine's file, in the place of an earlier one of the same name.

    Args:
        benchmark: The fixture, which shows it too.
        name: Of what was done.
        found: How long it took.
        target: The ratio that was wanted; None: none was.
        packages: Whose versions matter.
        **about: Sizes, and what else was measured.
    """
    device = machine(pick_device())
    path = RESULTS / f"{device['name']}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"machine": device, "measured": {}}
    versions = {package: version(package) for package in packages}
    entry = {
        **found._asdict(),
        "target": target,
        "met": None if target is None else found.ratio >= target,
        **about,
        "versions": versions,
        "commit": commit(),
    }
    stored["measured"] = dict(sorted({**stored["measured"], name: entry | {"date": datetime.now(UTC).isoformat()}}.items()))
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(path, stored)
    benchmark.extra_info |= entry
