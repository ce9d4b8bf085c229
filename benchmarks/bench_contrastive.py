"""The contrastive loss and its contenders under pytest-benchmark: `make bench`, which also keeps the results of this machine."""

import time
from itertools import cycle
from pathlib import Path

import pytest
import torch

from benchmarks.grid import cpu_grid, gpu_grid, rounds_of
from zoo.bench import error_of, machine, memory_of, new_record, pick_device, prepare, store
from zoo.contenders import contenders
from zoo.measure import make_ceiling, make_inputs, time_call, timing

DEVICE = pick_device()
GRID = cpu_grid() if DEVICE == "cpu" else [entry for part in (1, 2, 3) for entry in gpu_grid(part)]
RESULTS = Path(__file__).parent / "results"
pytestmark = pytest.mark.filterwarnings("default")  # of rivals, whose warnings are not ours to mend


@pytest.fixture(scope="module", autouse=True)
def _as_measured():
    """One thread on a CPU; on a GPU tf32 for float32, which some contenders use whatever one asks for."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest" if DEVICE == "cpu" else "high")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.benchmark(timer=time.process_time if DEVICE == "cpu" else time.perf_counter)
@pytest.mark.parametrize("contender", contenders(), ids=lambda c: c.name)
@pytest.mark.parametrize("entry", GRID, ids=lambda e: e.case.name)
def test_contrastive_loss(benchmark, entry, contender):
    """Each round has other inputs and a matmul of its own to be compared with. A contender that cannot run is stored with the reason."""
    case, about = entry.case, machine(DEVICE)
    step, missing = (None, reason) if (reason := entry.left_out(contender)) else prepare(case, contender)
    if step is None:
        store([new_record(case, contender, missing=missing)], about, "make bench", RESULTS)
        pytest.skip(str(missing))
    multiply, ceiling_flops = make_ceiling(case.dtype, DEVICE)
    multiply()
    rotation, ceilings = cycle([make_inputs(case, seed) for seed in range(3)]), []

    def next_round():
        given = next(rotation)
        given.clear()
        ceilings.append(time_call(multiply, DEVICE))
        return (given,), {}

    def call(given):
        step(given)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.pedantic(call, setup=next_round, rounds=rounds_of(case))
    seconds = timing(case, benchmark.stats.stats.data, ceilings, ceiling_flops)
    memory, error = memory_of(case, contender, step), error_of(case, contender, step)
    benchmark.extra_info |= {"ceiling_share": 1 / seconds.ratio, "memory": memory, "error": error._asdict(), "ceilings": ceilings}
    store([new_record(case, contender, timing=seconds, memory=memory, error=error)], about, "make bench", RESULTS)
