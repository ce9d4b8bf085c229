"""Mining pairs from clicks beside the same score in pandas, each in a process of its own. Target: 5 times the rate, a third of the memory.

``pytest benchmarks/bench_mining.py`` mines 300,000 clicks; with ``-m slow`` ten million, in minutes and with 8 GB for pandas.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.beside import beside, children_seconds, keep
from benchmarks.mining import draw_clicks

ROOT = Path(__file__).parents[1]


@pytest.mark.benchmark(timer=children_seconds, group="mining")
@pytest.mark.parametrize("clicks, rounds", [(300_000, 3), pytest.param(10_000_000, 1, marks=pytest.mark.slow)])
def test_mining(benchmark, tmp_path, clicks, rounds):
    """CPU time of all threads, libraries' imports included; the pairs of both are equal."""
    log = tmp_path / "clicks.parquet"
    draw_clicks(clicks, log)
    told = {}

    def mine_by(side):
        command = [sys.executable, "-m", "benchmarks.mining", side, str(log), str(tmp_path / f"{side}.parquet")]
        told[side] = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    found = beside(benchmark, lambda: mine_by("zoo"), lambda: mine_by("pandas"), rounds=rounds, timer=children_seconds)
    ours, theirs = (pq.read_table(tmp_path / f"{side}.parquet") for side in ("zoo", "pandas"))
    assert ours.equals(theirs.cast(ours.schema))
    peaks = {f"peak_bytes_{side}": told[side]["peak_bytes"] for side in told}
    share = told["zoo"]["peak_bytes"] / told["pandas"]["peak_bytes"]
    keep(
        benchmark,
        f"mining {clicks}",
        found,
        target=5.0,
        packages=("duckdb", "pandas"),
        pairs=len(ours),
        **peaks,
        memory_share=share,
        memory_target=1 / 3,
        memory_met=share <= 1 / 3,
    )
