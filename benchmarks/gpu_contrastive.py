"""The contrastive loss on a GPU in one call: correct first, then how fast, beside whom, and how far it goes.

    python3 -m benchmarks.gpu_contrastive --part 1 --out DIR        (then 2 and 3; 25 minutes together)

From the root of the checkout; it needs torch, Triton and NumPy, none of our other dependencies. Contenders may lie as wheels in a
folder (--wheels). Results are written after each case, on top of those in --earlier: MACHINE.json, which `zoo bench` and the plots
read, and gpu_part<n>.json with what fits no table, such as ceilings, correctness, ablations and training.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.grid import Entry, gpu_grid, rounds_of
from benchmarks.training import curves_agree, train
from zoo.bench import RESULTS, Record, commit, machine, new_record, pick_device, prepare, run_case, store, table, versions
from zoo.contenders import Contender, contenders, ours
from zoo.files import write_json
from zoo.kernels._configurations import Configuration
from zoo.kernels.tuning import reset, tune
from zoo.measure import CEILING_SIZE, DTYPES, Case, Direction, Inputs, Step, make_ceiling, make_inputs, measure_error, time_call

TOLERANCE = {"fp32": 1e-6, "bf16": 2**-9, "fp16": 2**-12}  # half a unit in the last place of the inputs; fp32: sums of a few thousand
ABLATED = Contender("", lambda case: lambda inputs: inputs.x, "variant of ours", directions=("both", "rows", "self"))
SELF: Direction = "self"
TILES = (  # a minute of compiling; `tune` alone would try three times as many
    Configuration(256, 128, 64, 8, 3, split=2, tma=True),
    Configuration(128, 256, 64, 8, 3, split=2, tma=True),
    Configuration(128, 128, 64, 4, 3, split=2, tma=True),
    Configuration(128, 128, 64, 8, 3, split=2, registers=128, tma=True),
    Configuration(128, 64, 64, 4, 4, tma=True),
)
TRAINED: tuple[Literal["triton", "chunked", "reference"], ...] = ("triton", "chunked", "reference")


class Part:
    """One of the three runs: its clock, and its files, which are whole at any moment."""

    def __init__(self, number: int, out: Path, device: str, *, tiny: bool, seconds: float) -> None:
        self.number, self.out, self.device, self.tiny = number, out, device, tiny
        self.about, self.command = machine(device), " ".join(["python3 -m benchmarks.gpu_contrastive", *sys.argv[1:]])
        self.end = time.monotonic() + seconds
        self.side: dict[str, Any] = {
            "machine": self.about,
            "commit": commit(),
            "command": self.command,
            "versions": versions(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }
        self.faults: list[str] = []

    @property
    def is_over(self) -> bool:
        """Whether to start nothing more."""
        return time.monotonic() > self.end

    def keep(self, records: Iterable[Record]) -> None:
        """Print and store records."""
        records = list(records)
        print(table(records), end="\n\n", flush=True)
        store(records, self.about, self.command, self.out)

    def note(self, section: str, entry: dict[str, Any]) -> None:
        """Print and store what is no record."""
        print(section, entry, flush=True)
        self.side.setdefault(section, []).append(entry)
        write_json(self.out / f"gpu_part{self.number}.json", self.side)

    def shrink(self, entries: list[Entry]) -> list[Entry]:
        """On the device of this part; of `tiny`, a few at a size of milliseconds, to have run every line."""
        if not self.tiny:
            return [entry._replace(case=entry.case._replace(device=self.device)) for entry in entries]
        return [
            e._replace(case=e.case._replace(rows=min(max(e.case.rows // 1024, 16), 64), dim=e.case.dim // 32, device=self.device))
            for e in [*entries[:2], *entries[-2:]]
        ]

    def measure(self, entries: list[Entry]) -> None:
        """Every entry with all who take part; who does not is listed too."""
        for i, entry in enumerate(self.shrink(entries)):
            case = entry.case
            reasons = {c: "left out: the time of this part was over" if self.is_over else entry.left_out(c) for c in contenders()}
            rivals = [c for c, reason in reasons.items() if reason is None]
            left = [new_record(case, c, missing=reason) for c, reason in reasons.items() if reason is not None]
            try:
                measured = run_case(case, rivals, rounds_of(case), extras=not self.tiny or i == 0) if rivals else []
            except torch.OutOfMemoryError:  # each fits alone, not with the inputs of all rounds
                measured = [new_record(case, c, missing="out of memory while timed") for c in rivals]
            self.keep([*measured, *left])
            if self.device == "cuda":
                torch.cuda.empty_cache()


def plain(case: Case) -> Step:
    """The dense loss in the dtype of its inputs, which is what rounding alone does to it."""

    def step(inputs: Inputs) -> Tensor:
        logits = inputs.scale.to(inputs.x.dtype) * (inputs.x @ (inputs.x if inputs.y is None else inputs.y).T)
        if inputs.y is None:
            logits = logits.masked_fill(torch.eye(case.rows, dtype=torch.bool, device=case.device), -torch.inf)
        value = F.cross_entropy(logits.float(), inputs.partner)
        if case.direction == "both":
            value = (value + F.cross_entropy(logits.T.float(), inputs.partner)) / 2
        value.backward()
        return value.detach()

    return step


def check(part: Part) -> None:
    """Truth in float64, plain torch and ours: our error is at most the plain one and half a unit in the last place."""
    directions: tuple[Direction, ...] = ("both", "rows", "self")
    sizes = [(64, 40)] if part.tiny else [(4096, 256), (4096, 512), (4096, 1024), (4094, 1000)]
    for dtype in DTYPES:
        for rows, dim in sizes:
            for direction in directions:
                for scale in (50.0, 100.0):
                    case = Case(rows, dim, dtype, direction, True, scale, part.device)
                    mine, its = measure_error(case, ours("auto")(case)), measure_error(case, plain(case))
                    pairs = [(a, b) for a, b in zip(mine, its, strict=True) if a is not None and b is not None]
                    right = all(a <= b + TOLERANCE[dtype] for a, b in pairs)
                    part.note("correctness", {"case": case.name, "right": right, "ours": mine._asdict(), "plain": its._asdict()})
                    part.faults += [] if right else [f"{case.name}: ours {mine}, plain {its}"]


def measure_ceilings(part: Part) -> None:
    """What the machine can do: matmuls on random data in each dtype, a copy."""
    for dtype, precision in (("bf16", "high"), ("fp16", "high"), ("fp32", "high"), ("fp32", "highest")):
        torch.set_float32_matmul_precision(precision)
        multiply, flops = make_ceiling(dtype, part.device)
        multiply()
        seconds = sorted(time_call(multiply, part.device) for _ in range(20))[10]
        part.note(
            "ceilings", {"what": f"matmul {dtype} {precision}", "seconds": seconds, "flops": flops, "rate": flops / max(seconds, 1e-9)}
        )
    torch.set_float32_matmul_precision("high")
    source = torch.randn(1 << (10 if part.tiny else 28), device=part.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = sorted(time_call(lambda: target.copy_(source), part.device) for _ in range(20))[10]
    part.note("ceilings", {"what": "copy", "seconds": seconds, "rate": 2 * 4 * source.numel() / max(seconds, 1e-9)})


def try_tiles(part: Part) -> None:
    """Other tiles than the table's; some spill registers, and only a clock tells whether that matters. Then back to the table."""
    for case in (Case(32768, 512, "bf16"), Case(32768, 512, "bf16", SELF), Case(32768, 1024, "bf16")):
        if part.is_over:
            part.note("tiles", {"case": case.name, "missing": "the time of this part was over"})
            continue
        (entry,) = part.shrink([Entry(case)])[:1]
        inputs, step = make_inputs(entry.case, seed=0), ours("auto")(entry.case)
        try:
            for trial in tune(lambda: (inputs.clear(), step(inputs)), tiles=TILES):  # noqa: B023  # called at once
                part.note("tiles", {"case": entry.case.name, **trial._asdict()})
        finally:
            reset()


def ablate(part: Part) -> None:
    """One thing changed at a time, timed in turn with ours as it is."""
    variants = {
        "ours": ours("auto"),
        "normalize inside": ours("auto", normalize=True),
        "fixed scale": ours("auto", learn_scale=False),
        "chunked": ours("chunked"),
        "reference": ours("reference"),
    }
    exact = {f"precision {p}": ours("auto", precision=p) for p in ("ieee", "tf32", "3xtf32")}
    for case, makers in ((Case(32768, 512, "bf16"), variants), (Case(32768, 1024, "bf16"), variants), (Case(8192, 512, "fp32"), exact)):
        if part.is_over:
            part.note("ablations", {"case": case.name, "missing": "the time of this part was over"})
            continue
        (entry,) = part.shrink([Entry(case)])[:1]
        rivals = [ABLATED._replace(name=name, make=make) for name, make in makers.items()]
        for record in run_case(entry.case, rivals, rounds_of(entry.case), extras=not part.tiny):
            numbers = {"timing": record.timing and record.timing._asdict(), "error": record.error and record.error._asdict()}
            part.note(
                "ablations", {"case": case.name, "variant": record.contender, "missing": record.missing, "memory": record.memory, **numbers}
            )


def train_each(part: Part) -> None:
    """Steps like NoteLLM-2's with every form of the loss; the curves of the smallest batch must agree."""
    for pairs in (8, 16) if part.tiny else (512, 4096, 32768):
        runs = []
        for impl in TRAINED:
            entry: dict[str, Any] = {"impl": impl, "pairs": pairs}
            probe, reason = prepare(Case(256, 32, "bf16", SELF, device=part.device), ABLATED._replace(name=impl, make=ours(impl)))
            if probe is None or part.is_over:
                part.note("training", {**entry, "missing": reason or "the time of this part was over"})
                continue
            try:
                runs.append(train(impl, pairs, steps=12 if pairs <= 512 else 5, device=part.device, tiny=part.tiny))
            except torch.OutOfMemoryError:
                part.note("training", {**entry, "missing": "out of memory"})
                continue
            part.note("training", runs[-1])
        agree = not runs or curves_agree(runs)
        part.note("curves", {"pairs": pairs, "of": [run["impl"] for run in runs], "agree": agree})
        part.faults += [] if agree else [f"training on {pairs} pairs: the curves differ: {[run['losses'] for run in runs]}"]


def use_wheels(folder: Path) -> None:
    """Make the libraries in a folder of wheels importable, after whatever is installed."""
    into = tempfile.mkdtemp()
    for wheel in sorted(folder.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(into)
    sys.path.append(into)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), into]))  # of the processes that it starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--earlier", type=Path, default=RESULTS, help="Results to go on from.")
    parser.add_argument("--wheels", type=Path, help="A folder with wheels of contenders.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=pick_device())
    parser.add_argument("--tiny", action="store_true", help="A few cases at a size of milliseconds.")
    parser.add_argument("--seconds", type=float, default=540, help="Start nothing after this.")
    given = parser.parse_args()
    if given.wheels:
        use_wheels(given.wheels)
    if given.tiny:
        CEILING_SIZE[given.device] = 64
    torch.set_float32_matmul_precision("high")  # tf32, which some contenders use whatever one asks for
    part = Part(given.part, given.out, given.device, tiny=given.tiny, seconds=given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    before, after = (folder / f"{part.about['name']}.json" for folder in (given.earlier, given.out))
    if before.is_file() and not after.exists():
        shutil.copy(before, after)
    if given.part == 1:
        check(part)
        measure_ceilings(part)
    part.measure(gpu_grid(given.part))
    if given.part == 3:
        ablate(part)
        train_each(part)
        if part.device == "cuda":
            try_tiles(part)
    if part.faults:
        raise SystemExit("\n".join(part.faults))


if __name__ == "__main__":
    main()
