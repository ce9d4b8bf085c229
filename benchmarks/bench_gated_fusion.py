"""Two vectors mixed through a gate, beside the form that lays them side by side first: `pytest benchmarks/bench_gated_fusion.py`."""

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from zoo.kernels.gated_fusion import gated_fusion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZES = {"cpu": [(512, 256)], "cuda": [(512, 896), (4096, 896), (32768, 1024), (32768, 4096)]}[DEVICE]  # rows, D


def side_by_side(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    z = torch.sigmoid(torch.nn.functional.linear(torch.cat([a, b], dim=1), weight))
    return z * a + (1 - z) * b


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "side by side": side_by_side,
    "reference": partial(gated_fusion, impl="reference"),
}
if DEVICE == "cuda":
    CONTENDERS["side by side, compiled"] = torch.compile(side_by_side, dynamic=False)
    CONTENDERS["triton"] = partial(gated_fusion, impl="triton")


@pytest.mark.benchmark(timer=time.process_time if DEVICE == "cpu" else time.perf_counter)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("rows, dim", SIZES)
def test_gated_fusion(benchmark, rows, dim, contender):
    """Forward and backward."""
    inputs = [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for shape in ((rows, dim), (rows, dim), (dim, 2 * dim))]
    upstream, call = torch.randn(rows, dim, device=DEVICE, dtype=DTYPE), CONTENDERS[contender]

    def step():
        torch.autograd.grad(call(*inputs), inputs, upstream)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{rows}x{dim} {DEVICE} forward+backward"
    benchmark.pedantic(step, rounds=20 if DEVICE == "cpu" else 30, warmup_rounds=3)
    benchmark.extra_info["tflops"] = 12 * rows * dim * dim / benchmark.stats.stats.median / 1e12
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
