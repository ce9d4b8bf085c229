"""The benchmark of the contrastive loss behind `zoo bench`: measure contenders, keep results by machine, notice what got slower."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.contenders import Contender, breakages, contenders
from zoo.errors import Failure, ZooError
from zoo.files import write_json
from zoo.measure import Case, Error, Step, Timing, make_inputs, measure_error, measure_memory, measure_times

RESULTS = Path("benchmarks/results")
MARGIN = 0.05  # of the baseline's ratio: less is never called a regression, however small the spread it recorded
ERROR_ROWS = {"cpu": 1024, "cuda": 4096}  # the float64 truth is dense
WARM_ROWS = 256
_STORING = f"in a checkout, make bench stores them in {RESULTS}, where --compare looks without --results"
_PACKAGES = ("torch", "triton", "numpy")
_CHILD = "import sys; from zoo.bench import memory_child; memory_child(*sys.argv[1:])"


class Record(NamedTuple):
    """What one contender did in one case: numbers, or why there are none."""

    case: Case
    contender: str
    commit: str
    date: str
    timing: Timing | None = None
    memory: int | None = None  # bytes above the inputs
    error: Error | None = None
    missing: str | None = None


def short_cases(device: str) -> list[Case]:
    """Those of `zoo bench`, the first of which is put before the contenders; they are also part of the full grid."""
    size = {"rows": 8192, "dtype": "bf16"} if device == "cuda" else {"rows": 2048, "dtype": "fp32"}
    return [Case(**size, dim=512, direction=direction, device=device) for direction in ("both", "rows", "self")]  # type: ignore[arg-type]


def pick_device() -> str:
    """ "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> dict[str, Any]:
    """Name of this machine, under which its results are kept, and what it is made of."""
    processor, cores = _processor(), os.cpu_count() or 1
    about = {"processor": processor, "cores": cores, "system": platform.system()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    called = about["gpu"] if device == "cuda" else f"{processor} {cores} cores"
    return {"name": re.sub(r"[^a-z0-9]+", "-", str(called).lower()).strip("-"), **about}


def _processor() -> str:
    """Linux alone keeps the model's name where Python does not look."""
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", listing.read_text(), re.MULTILINE) if listing.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


@cache
def commit() -> str:
    """Of the checkout this file lies in, "-dirty" if it was changed since; "unknown" outside of one.

    Asked once: the results that a run stores are such a change.
    """
    here = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def versions() -> dict[str, str]:
    """Of Python, torch and whatever contender is there."""
    found = {"python": platform.python_version()}
    for package in dict.fromkeys([*_PACKAGES, *(c.package for c in contenders() if not c.is_ours)]):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def prepare(case: Case, contender: Contender) -> tuple[Step | None, str | None]:
    """A step that has run once, or why there is none.

    A loss of others that breaks (`breakages`) is listed with what it raised, and the rest is measured. An error of our own is raised,
    except for a case too large for this machine.
    """
    if reason := contender.refusal(case):
        return None, reason
    try:
        step = contender.make(case)
        step(make_inputs(warm_case(case, contender), seed=1))
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except breakages() as e:
        if contender.is_ours:
            raise
        return None, f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
    return step, None


def warm_case(case: Case, contender: Contender) -> Case:
    """What the first, uncounted call gets: on a CPU a small one, where nothing is compiled for the size; on a GPU the case itself."""
    return case if case.device == "cuda" or contender.compiles else case._replace(rows=min(case.rows, WARM_ROWS))


def run_case(case: Case, rivals: Sequence[Contender], rounds: int, *, extras: bool = True) -> list[Record]:
    """One record for each contender, in their order: time in turn, then memory and error if ``extras``."""
    tried = {contender: prepare(case, contender) for contender in rivals}
    made = {contender: step for contender, (step, _) in tried.items() if step is not None}
    times = measure_times(case, {contender.name: step for contender, step in made.items()}, rounds)
    records = {c: new_record(case, c, missing=reason) for c, (_, reason) in tried.items()}
    records |= {c: new_record(case, c, timing=times[c.name]) for c in made}
    if extras:
        with ThreadPoolExecutor(1 if case.device == "cuda" else 2) as pool:  # on a CPU it waits for processes that mostly import
            memories = pool.map(lambda one: memory_of(case, *one), made.items())
            for (contender, step), memory in zip(made.items(), memories, strict=True):
                records[contender] = records[contender]._replace(memory=memory, error=error_of(case, contender, step))
    return list(records.values())


def error_of(case: Case, contender: Contender, step: Step) -> Error:
    """`measure_error` at a size whose dense loss in float64 is soon done."""
    small = case._replace(rows=min(case.rows, ERROR_ROWS[case.device]))
    return measure_error(small, contender.make(small) if contender.compiles else step)


def new_record(case: Case, contender: Contender, **measured: Any) -> Record:
    """A record of now and of this commit."""
    return Record(case, contender.name, commit(), datetime.now(UTC).isoformat(timespec="seconds"), **measured)


def memory_of(case: Case, contender: Contender, step: Step) -> int | None:
    """`measure_memory`; on a CPU in a process of its own, since a process remembers its peak.

    Raises:
        Failure: If that process dies.
    """
    if case.device == "cuda":
        return measure_memory(case, step)
    command = [sys.executable, "-c", _CHILD, contender.name, json.dumps(case._asdict())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{contender.name}, {case.name}: measuring its memory ended with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_child(name: str, given: str) -> None:
    """What the process of `memory_of` does: print the bytes."""
    torch.set_num_threads(1)
    case, (contender,) = Case(**json.loads(given)), contenders([name])
    print(json.dumps(measure_memory(case, contender.make(case), warm=warm_case(case, contender))))


def store(records: Iterable[Record], about: dict[str, Any], command: str, folder: Path = RESULTS) -> Path:
    """Put ``records`` into the file of this machine; older ones of the same case and contender go, others stay.

    Args:
        records: Of this machine.
        about: What `machine` gave.
        command: That made them.
        folder: Of all machines.
    """
    path = folder / f"{about['name']}.json"
    kept = {(r.case, r.contender): r for r in (load(path) if path.is_file() else [])}
    kept |= {(r.case, r.contender): r for r in records}
    run = {
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }
    return write_json(path, {"machine": about, "run": run, "records": [_plain(record) for record in kept.values()]})


def _plain(record: Record) -> dict[str, Any]:
    nested = {key: value._asdict() for key, value in (("timing", record.timing), ("error", record.error)) if value is not None}
    plain = {key: value for key, value in record._asdict().items() if value is not None}
    return {"name": record.case.name, **plain, "case": record.case._asdict(), **nested}


def load(path: Path) -> list[Record]:
    """The records of a file that `store` wrote.

    Raises:
        ZooError: If it is none.
    """
    try:
        return [_record(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["records"]]
    except (ValueError, KeyError, TypeError) as e:
        raise ZooError(f"{path} holds no results of this version ({e}): delete it, and make new ones: {_STORING}") from e


def _record(
    *, name: str, case: dict[str, Any], timing: dict[str, Any] | None = None, error: dict[str, Any] | None = None, **rest: Any
) -> Record:
    return Record(case=Case(**case), timing=Timing(**timing) if timing else None, error=Error(**error) if error else None, **rest)


def machines(folder: Path = RESULTS) -> dict[str, Path]:
    """The files of results by machine; what else lies in the folder is left alone."""
    contents = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {path.stem: path for path, content in contents.items() if isinstance(content, dict) and "records" in content}


def baseline(about: dict[str, Any], folder: Path = RESULTS) -> list[Record]:
    """The stored records of this machine.

    Raises:
        ZooError: If there are none.
    """
    path = folder / f"{about['name']}.json"
    if not path.is_file():
        others = ", ".join(machines(folder)) or "none"
        raise ZooError(f"no baseline of the machine {about['name']} in {folder} (have: {others}): {_STORING}")
    return load(path)


class Comparison(NamedTuple):
    """One case of ours now and in the baseline."""

    now: Record
    before: Record

    @property
    def limit(self) -> float:
        """Of the ratio to the matmul; beyond it is a regression."""
        assert self.before.timing is not None, self.before
        _, ratio, low, high, _ = self.before.timing
        return ratio + max(high - low, MARGIN * ratio)

    @property
    def regressed(self) -> bool:
        """Whether it got slower by more than the baseline's own rounds differed."""
        return self.now.timing is not None and self.now.timing.ratio > self.limit

    def sentence(self) -> str:
        """One line, with the case and the baseline's commit."""
        now, before = self.now.timing, self.before.timing
        assert now is not None, self.now
        assert before is not None, self.before
        verdict = "SLOWER" if self.regressed else "ok"
        return (
            f"{verdict}: {self.now.contender}, {self.now.case.name}: {now.ratio:.2f} x the matmul's time; {self.limit:.2f}"
            f" allowed, {before.ratio:.2f} at commit {self.before.commit}"
        )


def compare(records: Iterable[Record], before: Iterable[Record]) -> list[Comparison]:
    """Set the ratio of each timed record to its run's matmul against the same in the baseline.

    Seconds of different runs are never compared: another clock rate or neighbour changes them, and the matmul with them.

    Raises:
        ZooError: If the baseline lacks a case.
    """
    known = {(r.case, r.contender): r for r in before if r.timing is not None}
    timed = [record for record in records if record.timing is not None]
    if lacking := [f"{r.contender}, {r.case.name}" for r in timed if (r.case, r.contender) not in known]:
        raise ZooError("\n".join([*(f"the baseline of this machine has no {one}" for one in lacking), _STORING]))
    return [Comparison(record, known[record.case, record.contender]) for record in timed]


def table(records: Sequence[Record]) -> str:
    """A block a case: times as multiples of ours and the matmul's, memory above the inputs, relative errors of loss and gradient of x."""
    blocks = []
    for case in dict.fromkeys(record.case for record in records):
        rows = [["contender", "time/ours", "time/matmul", "extra memory", "error value", "error gradient"]]
        mine = [record for record in records if record.case == case]
        ours = next((r.timing.ratio for r in mine if r.contender == "ours" and r.timing is not None), None)
        rows += [[record.contender, *_cells(record, ours)] for record in mine if record.timing is not None]
        widths = [max(len(record.contender) for record in mine), *(max(len(row[i]) for row in rows) for i in range(1, len(rows[0])))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{record.contender.ljust(widths[0])}  {record.missing}" for record in mine if record.timing is None]
        blocks.append("\n".join([case.name, *lines]))
    return "\n\n".join(blocks)


def _cells(record: Record, ours: float | None) -> list[str]:
    assert record.timing is not None, record
    error = record.error
    return [
        "-" if ours is None else f"{record.timing.ratio / ours:.2f}",
        f"{record.timing.ratio:.2f}",
        "-" if record.memory is None else f"{record.memory / 2**20:.1f} MiB",
        "-" if error is None else f"{error.value:.1e}",
        "-" if error is None or error.x is None else f"{error.x:.1e}",
    ]


class Outcome(NamedTuple):
    """What `zoo bench` prints."""

    text: str
    slower: list[str]  # a sentence for each regression


def bench(device: str | None = None, *, compared_with: Path | None = None, say: Callable[[str], object] = lambda _: None) -> Outcome:
    """A case with every contender, in about a minute; or, to compare, all short cases with ours alone.

    Args:
        device: "cpu", on one thread, or "cuda". None: the GPU if there is one.
        compared_with: A folder of results with a baseline of this machine.
        say: Gets a line before the work begins.

    Raises:
        ZooError: On another device, or if there is no baseline of this machine.
    """
    device = pick_device() if device is None else device
    if device not in ERROR_ROWS or (device == "cuda" and not torch.cuda.is_available()):
        raise ZooError(f"no device {device!r} to measure on: write cpu{' or cuda' if torch.cuda.is_available() else ''}")
    about, cases = machine(device), short_cases(device)
    before = None if compared_with is None else baseline(about, compared_with)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        say(f"measuring on {about['name']}: {', '.join(case.name for case in (cases if before else cases[:1]))}")
        if before is None:
            return Outcome(table(run_case(cases[0], [c for c in contenders() if c.name == "ours" or not c.is_ours], rounds=5)), [])
        compared = compare([record for case in cases for record in run_case(case, contenders(["ours"]), rounds=9, extras=False)], before)
    finally:
        torch.set_num_threads(threads)
    sentences = [one.sentence() for one in compared]
    return Outcome("\n".join(sentences), [s for one, s in zip(compared, sentences, strict=True) if one.regressed])
