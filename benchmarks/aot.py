"""Compile every configuration that ``impl="auto"`` may pick, without a GPU, and keep what the compilers made of it: `make aot`.

    python benchmarks/aot.py --python .venv-triton36/bin/python

compiles for sm_80, sm_90 and sm_100 with the Triton of this environment and of every ``--python``; what stands unchanged in
results/aot.json is not compiled again, so an interrupted run goes on where it was. Whoever adds a kernel gives its file, in kernels/,

    def compile_cases(capability: int, triton_version: tuple[int, int]) -> Iterator[dict]

which yields the fields of `Case` as plain data; nothing here is imported by kernels/. The limits are those of `faults`.

What compiling taught (Triton 3.6.0 with ptxas 12.8 and 3.8.0 with 13.1):

* A launch compiles anew for arguments that are 1 or divisible by 16, and for alignment. The binary differs (the prototype of the
  forward: 242 registers, with all sizes and pointers promised 254), so either the kernel declares ``do_not_specialize`` and
  ``do_not_specialize_on_alignment``, or each variant is a case of its own, with types such as ``*bf16:16`` and ``i32:16``.
* A descriptor (``tensordesc<bf16[128, 64]>``) also compiles for sm_80, to masked loads of which none is asynchronous: not to be used.
* Too much shared or tensor memory is no error of the compiler; only a launch would notice. Hence the limits here.
* An argument passed as None has type "constexpr" and the value None among the constexprs.
* Products in full fp32 ("ieee") keep their operands in registers: 64 x 64 x 32 with 4 warps spills 270 bytes on sm_90.
* With the same source the two versions differ by up to 70 registers and by 1.7 times in exchanges between lanes (SHFL): 189
  against 133 for a tile of 128 x 128 with 4 warps, 411 against 239 for one of 128 x 256 with 8.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from zoo.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "aot.json"
ARCHITECTURES = (80, 90, 100)
VERSIONS = ((3, 6), (3, 8))  # of Triton
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program can have
TENSOR_MEMORY = 512  # columns, on sm_100
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}  # the instruction that reaches the speed of the architecture
TIMEOUT = 600  # seconds; a compile takes two to six
Row = dict[str, Any]


class Case(NamedTuple):
    """One kernel in one configuration."""

    kernel: str  # module:function; compile_cases gives the function's name in its own module
    label: str  # one of its kind among the cases of a kernel, architecture and version
    signature: dict[str, str]  # all arguments in order: "*bf16", "i32", "*fp32:16", "tensordesc<bf16[128, 64]>", "constexpr"
    constexprs: dict[str, int | float | str | None]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    dots: str  # operands of its matrix products: "16" bits, "tf32" (also 3xtf32), "ieee", or "none"
    avoided: str | None = None  # why auto does not pick it; then it must break a limit


class Key(NamedTuple):
    """What a row of the table is about."""

    kernel: str
    label: str
    architecture: int
    triton: str  # "3.6"


def modules() -> list[str]:
    """The files of kernels/ that list cases."""
    files = sorted((ROOT / "kernels").glob("_*.py"))
    return [f"zoo.kernels.{file.stem}" for file in files if "\ndef compile_cases(" in file.read_text(encoding="utf-8")]


def listed(names: Sequence[str] | None = None) -> dict[Key, Case]:
    """The cases of today, of the modules ``names`` or of all: for every architecture and every version, installed or not."""
    found: dict[Key, Case] = {}
    for name in modules() if names is None else names:
        module = importlib.import_module(name)
        for architecture in ARCHITECTURES:
            for version in VERSIONS:
                for plain in module.compile_cases(architecture, version):
                    case = Case(**{**plain, "kernel": f"{name}:{plain['kernel']}"})
                    key = Key(case.kernel, case.label, architecture, ".".join(map(str, version)))
                    assert key not in found, f"two cases for {key}"
                    found[key] = case
    return found


@cache
def sources(kernel: str) -> dict[str, str]:
    """The source of a kernel, of the Triton functions that it calls, and the constants that these read, by full name."""
    from triton.language import constexpr
    from triton.runtime.jit import JITCallable

    module, name = kernel.split(":")
    found: dict[str, str] = {}
    pending = [vars(importlib.import_module(module))[name].fn]
    while pending:
        function = pending.pop()
        source = textwrap.dedent(inspect.getsource(function))
        found[f"{function.__module__}.{function.__qualname__}"] = source
        for used in {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}:
            value = function.__globals__.get(used)
            if isinstance(value, constexpr):
                found[f"{function.__module__}.{used}"] = repr(value.value)
            elif isinstance(value, JITCallable) and not value.fn.__module__.startswith("triton."):
                if f"{value.fn.__module__}.{value.fn.__qualname__}" not in found:
                    pending.append(value.fn)
            else:
                foreign = isinstance(value, ModuleType) and not value.__name__.startswith("triton")
                assert not foreign, f"{function} reads from {value}: import the function, for its source to be seen here"
    return found


def digest(case: Case) -> str:
    """Of all that the binary depends on but the compiler and the architecture."""
    settings = [case.signature, case.constexprs, case.num_warps, case.num_stages, case.maxnreg]
    return hashlib.sha256(json.dumps([sources(case.kernel), settings], sort_keys=True).encode()).hexdigest()[:16]


def faults(case: Case, row: Row) -> list[str]:
    """The limits that a compiled case breaks.

    Spills; memory; on what is made for speed the matrix instruction of the architecture and no slower one, and copies that run
    ahead of the products (not asked of one stage); on what is made for exactness no matrix instruction, which would round to tf32.
    """
    if "error" in row:
        return [row["error"]]
    architecture, counts = row["architecture"], row["instructions"]
    found = []
    if row["stack"] or counts.get("LDL") or counts.get("STL"):
        found.append(f"spills {row['stack']} bytes, read {counts.get('LDL', 0)} and written {counts.get('STL', 0)} times")
    if row["shared"] > SHARED_MEMORY[architecture]:
        found.append(f"shared memory {row['shared']} of {SHARED_MEMORY[architecture]} bytes")
    if row.get("tensor_memory", 0) > TENSOR_MEMORY:
        found.append(f"tensor memory {row['tensor_memory']} of {TENSOR_MEMORY} columns")
    wanted = {MATRIX[architecture]} if case.dots in ("16", "tf32") else set()
    there = {name for name in MATRIX.values() if counts.get(name)}
    if there != wanted:
        found.append(f"matrix instructions {sorted(there)}, not {sorted(wanted)}")
    ahead = counts.get("LDGSTS", 0) + counts.get("UTMALDG", 0)
    if wanted and case.num_stages > 1 and ahead < case.num_stages:
        found.append(f"{ahead} asynchronous copies for {case.num_stages} stages")
    return found


def complaints(case: Case, row: Row | None, source: str) -> list[str]:
    """What is wrong with the ``row`` of a case whose `digest` is ``source``; of a case that auto avoids, that nothing is wrong."""
    if row is None:
        return ["is not in the table"]
    if row["digest"] != source:
        return ["was compiled from another source or with other settings"]
    broken = faults(case, row)
    if case.avoided is not None:
        return [] if broken else [f"keeps every limit, but is avoided: {case.avoided}"]
    return broken


def read(path: Path) -> dict[Key, Row]:
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {key_of(row): row for row in rows}


def key_of(row: Row) -> Key:
    return Key(row["kernel"], row["label"], row["architecture"], ".".join(row["triton"].split(".")[:2]))


def write(path: Path, rows: dict[Key, Row]) -> None:
    """One line for each row, sorted."""
    lines = ",\n".join(json.dumps(rows[key], ensure_ascii=False) for key in sorted(rows))
    write_text(path, f"[\n{lines}\n]\n")


def version_of(python: str) -> str:
    command = [python, "-c", "from importlib.metadata import version; print(version('triton'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def snapshot(folder: Path) -> None:
    """The kernels as they are now, for compiles that take long while somebody edits."""
    shutil.copytree(ROOT / "kernels", folder / "zoo" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zoo" / "__init__.py", folder / "zoo")


def compile_case(case: Case, architecture: int, python: str, folder: Path, timeout: float = TIMEOUT) -> Row:
    """The figures that compile_one.py prints for the `snapshot` in ``folder``, where the cache lies too; or an error in one line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    paths = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [os.path.abspath(python), str(ROOT / "benchmarks" / "compile_one.py")]
    task = json.dumps({**case._asdict(), "architecture": architecture})
    try:
        done = subprocess.run(
            command, input=task, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {timeout:.0f} seconds"}
    if done.returncode:
        return {"error": summary(done.stderr) or f"ended with code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def summary(output: str) -> str:
    """What names the fault in the output of a failed compiler: an assertion, the first error of LLVM or ptxas, or the last line."""
    for pattern in (r"Assertion [`'].*", r"LLVM ERROR.*", r"(?<!PTXAS )\b(?:error|fatal)\s*:.*"):
        if telling := re.search(pattern, output):
            return _anonymous(telling[0])
    return _anonymous(output.strip().rpartition("\n")[2])


def _anonymous(line: str) -> str:
    return re.sub(r"/\S*/", "", line.strip())[:200]  # folders are this machine's


def compile_listed(cases: dict[Key, Case], pythons: Sequence[str], path: Path = RESULTS, jobs: int = 1, only: str = "") -> dict[Key, Row]:
    """Compile what is missing in the table or out of date, with every interpreter, and write the table after each compile.

    Rows of cases that are listed no more are dropped; those of a version that no interpreter has are kept.
    """
    rows = keep(path, cases, {})
    versions = {version_of(python): python for python in pythons}
    missing = [
        (key, full, python)
        for full, python in versions.items()
        for key, case in cases.items()
        if full.startswith(f"{key.triton}.") and is_chosen(key, only) and not _stands(rows.get(key), digest(case), full)
    ]
    print(f"{len(missing)} cases to compile with Triton {' and '.join(versions)}", flush=True)
    pool = ThreadPoolExecutor(jobs)
    with tempfile.TemporaryDirectory() as folder:
        snapshot(Path(folder))
        try:
            running = {
                pool.submit(compile_case, cases[key], key.architecture, python, Path(folder)): (key, full) for key, full, python in missing
            }
            for number, done in enumerate(as_completed(running), 1):
                key, full = running[done]
                figures = done.result()
                seconds = figures.pop("seconds", None)  # of this machine, not of the kernel
                row = {**key._asdict(), "triton": full, "digest": digest(cases[key]), **figures}
                rows = keep(path, cases, {key: row})
                print(f"{number}/{len(missing)} {line(cases[key], row)} ({seconds} s)", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return rows


def keep(path: Path, cases: dict[Key, Case], made: dict[Key, Row]) -> dict[Key, Row]:
    """Read the table again, for another run may have added to it, add what was ``made``, drop what is listed no more."""
    rows = {key: row for key, row in read(path).items() if key in cases} | made
    write(path, rows)
    return rows


def is_chosen(key: Key, only: str) -> bool:
    return only in f"{key.kernel} {key.label} sm_{key.architecture}"


def _stands(row: Row | None, source: str, triton: str) -> bool:
    return row is not None and row["digest"] == source and row["triton"] == triton and "error" not in row


def line(case: Case, row: Row) -> str:
    """A row of the table for people."""
    about = f"sm_{row['architecture']} Triton {row['triton']} {row['kernel'].split(':')[1]} {row['label']}: "
    if "error" not in row:
        counts = ", ".join(f"{count} {name}" for name, count in row["instructions"].items())
        about += f"{row['registers']} registers, {row['shared'] / 1024:.0f} KiB, {counts}"
    broken = "; ".join(faults(case, row))
    return about + (f" -- {'avoided: ' if case.avoided else ''}{broken}" if broken else "")


def wrong(cases: dict[Key, Case], rows: dict[Key, Row]) -> Iterator[str]:
    """One sentence for each case that has a complaint."""
    for key, case in cases.items():
        if found := complaints(case, rows.get(key), digest(case)):
            yield f"sm_{key.architecture} Triton {key.triton} {key.kernel} {key.label}: {'; '.join(found)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every configuration that auto may pick, for GPUs that need not be there.")
    parser.add_argument("--python", action="append", default=[], help="an interpreter with another version of Triton; may be repeated")
    parser.add_argument("--only", default="", help="compile only what has this in: module:kernel label sm_90")
    parser.add_argument("--jobs", type=int, default=1, help="compiles at the same time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table")
    given = parser.parse_args(arguments)
    cases = listed()
    rows = compile_listed(cases, [sys.executable, *given.python], given.out, given.jobs, given.only)
    chosen = {key: case for key, case in cases.items() if is_chosen(key, given.only)}
    found = list(wrong(chosen, rows))
    print("\n".join(found) or f"{len(chosen)} cases, all within the limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
