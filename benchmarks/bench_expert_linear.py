"""Rows through their own experts' weights, beside every row through all of them and a mask: `pytest benchmarks/bench_expert_linear.py`."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from zoo.kernels.expert_linear import expert_linear, route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Size(NamedTuple):
    """Of one layer: B sequences of N tokens, E experts of D_out x D_in."""

    B: int
    N: int
    d_in: int
    d_out: int
    experts: int


SIZES = {
    "cpu": {"small": Size(4, 128, 192, 768, 3)},
    "cuda": {
        "VLMo base": Size(64, 236, 768, 3072, 2),
        "BEiT-3 large": Size(64, 236, 1024, 4096, 2),
        "CogVLM": Size(4, 2048, 4096, 11008, 2),
        "eight experts": Size(64, 236, 768, 3072, 8),
    },
}[DEVICE]


def masked(x: Tensor, weights: Tensor, biases: Tensor, expert: Tensor) -> Tensor:
    """What models do that have no such operation."""
    y = x.new_zeros(*x.shape[:-1], weights.shape[1])
    for e, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = torch.where((expert == e)[..., None], torch.nn.functional.linear(x, weight, bias), y)
    return y


def contenders(size: Size, layout: str) -> dict[str, Callable[..., Tensor]]:
    sizes = [size.N // size.experts + (e < size.N % size.experts) for e in range(size.experts)]
    runs = torch.repeat_interleave(torch.arange(size.experts), torch.tensor(sizes)).expand(size.B, size.N)
    mixed = torch.randint(size.experts, (size.B, size.N), generator=torch.Generator().manual_seed(0))
    expert = (runs if layout == "runs" else mixed).to(DEVICE)
    routing = route(expert, size.experts)
    found: dict[str, Callable[..., Tensor]] = {
        "masked dense": partial(masked, expert=expert),
        "grouped": partial(expert_linear, expert=routing, impl="grouped"),
    }
    if layout == "runs":
        found["runs"] = partial(expert_linear, sizes=sizes)
    if DEVICE == "cuda":  # elsewhere a compiler for what torch.compile writes is not always there
        found["masked dense, compiled"] = partial(torch.compile(masked, dynamic=False), expert=expert)
        found["triton"] = partial(expert_linear, expert=routing, impl="triton")
        found["triton, routed anew"] = partial(expert_linear, expert=expert, impl="triton")
    return found


CASES = [
    (name, layout, contender) for name, size in SIZES.items() for layout in ("mixed", "runs") for contender in contenders(size, layout)
]


@pytest.mark.benchmark(timer=time.process_time if DEVICE == "cpu" else time.perf_counter)
@pytest.mark.parametrize("name, layout, contender", CASES)
def test_expert_linear(benchmark, name, layout, contender):
    """Forward and backward."""
    size = SIZES[name]
    shapes = ((size.B, size.N, size.d_in), (size.experts, size.d_out, size.d_in), (size.experts, size.d_out))
    inputs = [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for shape in shapes]
    upstream = torch.randn(size.B, size.N, size.d_out, device=DEVICE, dtype=DTYPE)
    call = contenders(size, layout)[contender]

    def step():
        torch.autograd.grad(call(*inputs), inputs, upstream)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {layout} {DEVICE} forward+backward"
    benchmark.pedantic(step, rounds=5 if DEVICE == "cpu" else 30, warmup_rounds=2)
    flops = 6 * size.B * size.N * size.d_in * size.d_out  # of one expert for each row
    benchmark.extra_info["tflops"] = flops / benchmark.stats.stats.median / 1e12
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
