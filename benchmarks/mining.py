"""One side of the comparison of miners in a process of its own: ``python -m benchmarks.mining zoo clicks.parquet out.parquet``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WEEK = 7 * 86400
LOW, UP, TOP = 0.01, 30.0, 10  # of NoteLLM's miner
UNIT = 10**15  # scores are sums of whole numbers on both sides: else the order of a sum would decide between equal ones
STATUS = Path("/proc/self/status")


def draw_clicks(clicks: int, path: Path) -> None:
    """A week of clicks: about five a user, and notes of which few are clicked by many."""
    draw = np.random.default_rng(0)
    users, notes = max(clicks // 5, 1), max(clicks // 20, 10)
    user = draw.integers(0, users, clicks)
    note = (notes * draw.random(clicks) ** 3).astype(np.int64)
    at = 1_704_067_200 + draw.integers(0, WEEK, clicks)
    pq.write_table(pa.table({"user_id": user, "note_id": note, "timestamp": at}), path)


def by_zoo(clicks: Path) -> pa.Table:
    """The miner of the zoo, as it is set by default."""
    from zoo.data._mining import mine

    return mine(clicks).pairs.select(["note_a", "note_b", "score", "n_groups"])


def by_pandas(clicks: Path) -> pa.Table:
    """The same score as one writes it down in pandas."""
    import pandas as pd

    log = pd.read_parquet(clicks)
    log = log[log.timestamp >= log.timestamp.max() - WEEK]
    every = log.groupby(["user_id", "note_id"]).timestamp.agg(["min", "max"]).reset_index()
    every["weight"] = (UNIT / every.groupby("user_id").note_id.transform("size")).round().astype("int64")
    both = every.merge(every, on="user_id", suffixes=("_a", "_b"))
    both = both[(both.note_id_a != both.note_id_b) & (both.min_a < both.max_b)]
    pairs = both.groupby(["note_id_a", "note_id_b"]).weight_a.agg(["sum", "size"]).reset_index()
    pairs.columns = pd.Index(["note_a", "note_b", "score", "n_groups"])
    pairs["score"] /= UNIT
    pairs = pairs[(pairs.score >= LOW) & (pairs.score <= UP)].sort_values(["note_a", "score", "note_b"], ascending=[True, False, True])
    return pa.Table.from_pandas(pairs.groupby("note_a").head(TOP), preserve_index=False)


SIDES = {"zoo": by_zoo, "pandas": by_pandas}


def main() -> None:
    """Mine, write the pairs, and print CPU seconds, all threads together, and the bytes held at the peak, libraries included."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("clicks", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    start = time.perf_counter()
    pq.write_table(SIDES[given.side](given.clicks), given.out)
    wall = time.perf_counter() - start
    (peak,) = (1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({"seconds": time.process_time(), "wall": wall, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
