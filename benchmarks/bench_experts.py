"""A block of modality experts on a pair, each token through its own, beside every expert on every token and a mask.

``pytest benchmarks/bench_experts.py``. One thread; the peak of memory is that of a process of its own.
"""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from benchmarks.beside import beside, keep
from zoo import block
from zoo.attention import Sight
from zoo.block import Block, Shape

ROOT = Path(__file__).parents[1]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
BANKS = {"norm2": ("text", "image"), "ffn": ("text", "image")}
CHILD = "import sys; from benchmarks.bench_experts import peaks; peaks(*sys.argv[1:])"


class Size(NamedTuple):
    """Of a block and what it reads: B pairs of a text and a picture, in tokens."""

    B: int
    text: int
    image: int
    dim: int
    heads: int


SIZES = {"VLMo base": Size(4, 40, 197, 768, 12), "VLMo tiny": Size(64, 24, 17, 64, 4)}
HOW = ("forward", "forward and backward")


def masked(part: nn.Module, x: Tensor, runs: Sequence[tuple[str, int]]) -> Tensor:
    """What a model does that has no such operation: all experts read all tokens, and of each what is its own is kept."""
    if not isinstance(part, nn.ModuleDict):
        return part(x)
    expert = torch.repeat_interleave(torch.tensor([[*part].index(e) for e, _ in runs]), torch.tensor([n for _, n in runs]))  # (N,)
    return sum((own(x) * (expert == i)[:, None] for i, own in enumerate(part.values())), torch.zeros(()))


def make_calls(size: Size, how: str) -> dict[str, Callable[[], Tensor]]:
    """The same block and the same tokens, each way."""
    torch.manual_seed(0)
    made = Block(Shape(size.dim, size.heads, bias="qv", layer_scale=0.1), BANKS)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(size.B, size.text + size.image, size.dim)
    upstream, runs = torch.randn_like(x), [("text", size.text), ("image", size.image)]

    def run() -> Tensor:
        if how == "forward":
            with torch.no_grad():
                return made(x, runs, Sight())[0]
        out = made(x, runs, Sight())[0]
        made.zero_grad(set_to_none=True)
        out.backward(upstream)
        return out.detach()

    def run_masked() -> Tensor:
        with patch.object(block, "routed", masked):
            return run()

    return {"routed": run, "masked": run_masked}


def peaks(name: str, how: str) -> None:
    """Print {way: bytes at the peak of one call above what was there before it}; for a process that has done nothing else."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: glibc gives back what is freed
    found = {}
    for way, call in make_calls(SIZES[name], how).items():
        call()
        RESET.write_text("5")
        before = _bytes("VmRSS")
        call()
        found[way] = _bytes("VmHWM") - before
    print(json.dumps(found))


def _bytes(key: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def peaks_apart(name: str, how: str) -> dict[str, int]:
    """What `peaks` prints in another process."""
    command = [sys.executable, "-c", CHILD, name, how]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return {f"peak_bytes_{way}": found for way, found in json.loads(done.stdout).items()}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.process_time, group="a block of modality experts")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SIZES)
def test_block(benchmark, name, how):
    """Of the matrices of the block two thirds are the feed-forward's; with two experts a mask makes it twice as much."""
    calls = make_calls(SIZES[name], how)
    torch.testing.assert_close(calls["routed"](), calls["masked"](), rtol=1e-4, atol=1e-4)
    found = beside(benchmark, calls["routed"], calls["masked"], rounds=7)
    memory = peaks_apart(name, how) if RESET.is_file() else {}
    about = {"size": SIZES[name]._asdict(), "command": "pytest benchmarks/bench_experts.py"}
    keep(benchmark, f"a block of experts, {name}, {how}, of masked experts", found, target=None, packages=("torch",), **about, **memory)
