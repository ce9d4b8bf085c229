"""What one call of a contrastive loss costs and how exact it is: time beside a matmul, memory above its inputs, error against float64."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.contrastive import contrastive_loss

Direction = Literal["both", "rows", "self"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COSINE = 0.25  # of a row and its positive: high enough to be found among thousands of random rows, low enough to leave a loss
CEILING_SIZE = {"cpu": 2048, "cuda": 8192}  # side of the square matmul whose rate is the ceiling
MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


class Case(NamedTuple):
    """One size and kind of loss to be measured."""

    rows: int  # of each side; of the only side for direction "self"
    dim: int
    dtype: str = "fp32"  # one of DTYPES
    direction: Direction = "both"
    backward: bool = True  # forward and backward; else forward alone
    scale: float = 50.0
    device: str = "cpu"

    @property
    def name(self) -> str:
        """As tables and messages call it: ``both 8192x512 fp32 forward+backward``."""
        steps = "forward+backward" if self.backward else "forward"
        return f"{self.direction} {self.rows}x{self.dim} {self.dtype} {steps}" + (f" scale {self.scale:g}" if self.scale != 50 else "")

    @property
    def flops(self) -> int:
        """Of the matmuls: logits once (2 N M D), again for the gradient, and a gradient of each side (8 N M D together).

        The same count for every contender and direction, whatever it really does, so that shares can be compared.
        """
        return (8 if self.backward else 2) * self.rows * self.rows * self.dim


class Inputs(NamedTuple):
    """What a contender gets. The leaves collect gradients where the case has a backward."""

    x: Tensor  # (N, D) unit rows
    y: Tensor | None  # (N, D), row i belongs to row i of x; None for direction "self"
    scale: Tensor  # () float32
    partner: Tensor  # (N,) int64: 0..N-1, or for direction "self" the other half

    def leaves(self) -> list[Tensor]:
        """Those that are there, in their order."""
        return [leaf for leaf in (self.x, self.y, self.scale) if leaf is not None]

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves():
            leaf.grad = None


Step = Callable[[Inputs], Tensor]  # one measured call: the loss, detached; gradients are in the leaves


class Timing(NamedTuple):
    """Seconds of a call, and how often the same run's matmul ceiling goes into them."""

    seconds: float  # median over the rounds
    ratio: float  # median over the rounds of the time over what the case's FLOP take at the ceiling's rate in the same round
    low: float  # of the ratio
    high: float
    rounds: int


class Error(NamedTuple):
    """Relative errors against float64: of the value, and in the L2 norm of each gradient. None: there is no such gradient."""

    value: float
    x: float | None = None
    y: float | None = None
    scale: float | None = None


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random unit rows, each with a positive at a cosine of `COSINE`; never zeros, which are faster than numbers."""
    generator = torch.Generator(case.device).manual_seed(seed)
    pairs = case.rows // 2 if case.direction == "self" else case.rows
    first, other = (_unit_rows(pairs, case.dim, generator) for _ in range(2))
    second = F.normalize(COSINE * first + math.sqrt(1 - COSINE**2) * other)
    partner = torch.arange(case.rows, device=case.device)
    dtype = DTYPES[case.dtype]
    if case.direction == "self":
        x, y, partner = torch.cat([first, second]).to(dtype), None, (partner + pairs) % (2 * pairs)
    else:
        x, y = first.to(dtype), second.to(dtype)
    inputs = Inputs(x, y, torch.tensor(case.scale, device=case.device), partner)
    for leaf in inputs.leaves():
        leaf.requires_grad_(case.backward)
    return inputs


def _unit_rows(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=generator, device=generator.device))


def make_ceiling(dtype: str, device: str, size: int | None = None) -> tuple[Callable[[], object], int]:
    """A matmul of random data and its FLOP: what the machine can do in this dtype, with torch set as it is."""
    size = CEILING_SIZE[device] if size is None else size
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def time_call(call: Callable[[], object], device: str) -> float:
    """Seconds of one call: process CPU time, which on a shared machine is steadier than the clock on the wall; on a GPU, events."""
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1000


def timing(case: Case, seconds: Sequence[float], ceilings: Sequence[float], ceiling_flops: int) -> Timing:
    """Put the seconds of each round beside the seconds that the ceiling's matmul took in the same round."""
    ratios = [one / (ceiling * case.flops / ceiling_flops) for one, ceiling in zip(seconds, ceilings, strict=True)]
    return Timing(statistics.median(seconds), statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def measure_times(case: Case, steps: dict[str, Step], rounds: int, *, sets: int = 3) -> dict[str, Timing]:
    """Time all steps in turn, ``rounds`` times over, each round on other inputs and with a ceiling of its own.

    What disturbs the machine for a while then disturbs every contender and the ceiling alike. The steps have run before: nothing is
    left to be imported or compiled.

    Args:
        case: What the steps were made for.
        steps: By contender.
        rounds: Counted calls of each.
        sets: Of inputs, used in rotation: one set that stays in a cache would flatter.
    """
    inputs = [make_inputs(case, seed) for seed in range(sets)]
    multiply, ceiling_flops = make_ceiling(case.dtype, case.device)
    multiply()
    ceilings: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        given = inputs[i % sets]
        ceilings.append(time_call(multiply, case.device))
        for name, step in steps.items():
            given.clear()
            seconds[name].append(time_call(lambda step=step, given=given: step(given), case.device))  # type: ignore[misc]
    return {name: timing(case, seconds[name], ceilings, ceiling_flops) for name in steps}


def measure_memory(case: Case, step: Step, *, warm: Case | None = None) -> int | None:
    """Bytes at the peak of one call above its inputs; gradients count, since the call makes them.

    On a GPU by torch's allocator. On a CPU it is what the process held, so call it in a process of its own; None where the
    system does not tell (no Linux).

    Args:
        case: What the step was made for.
        step: The call.
        warm: A case for a first call that loads libraries and compiles; None where that has been done.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if case.device == "cpu":
        if not (status.is_file() and reset.is_file()):
            return None
        # Else glibc would keep what the first call freed, and the second would seem to need less.
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)
    if warm is not None:
        step(make_inputs(warm, seed=1))
    inputs = make_inputs(case, seed=0)
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset.write_text("5")  # VmHWM starts again from what is held now
    before = _status_bytes(status, "VmRSS")
    step(inputs)
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, key: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def measure_error(case: Case, step: Step) -> Error:
    """How far value and gradients of ``step`` are from the dense loss in float64 on the same, already rounded, numbers."""
    inputs, truth = make_inputs(case, seed=0), make_inputs(case, seed=0)
    x, y = truth.x.detach().double(), None if truth.y is None else truth.y.detach().double()
    exact = Inputs(x, y, truth.scale.detach().double(), truth.partner)
    for leaf in exact.leaves():
        leaf.requires_grad_(case.backward)
    value = contrastive_loss(
        x, y, scale=exact.scale, positive=exact.partner, direction="both" if case.direction == "both" else "rows", impl="reference"
    )
    if case.backward:
        value.backward()
    got = step(inputs)
    return Error(
        _relative(got, value.detach()),
        *(
            None if leaf is None or leaf.grad is None or true is None or true.grad is None else _relative(leaf.grad, true.grad)
            for leaf, true in zip((inputs.x, inputs.y, inputs.scale), (x, y, exact.scale), strict=True)
        ),
    )


def _relative(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())
