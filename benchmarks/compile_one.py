"""Compile one kernel for a GPU that need not be there, and tell what the compiler made of it; aot.py calls this once per case.

    python benchmarks/compile_one.py < case.json

A process of its own, for a compiler that fails aborts, hangs or prints its whole program; and a file of its own that imports Triton
alone, for it also runs in the environment of the other Triton version. The case is an object with the fields of ``aot.Case`` and an
``architecture`` (80, 90, 100); what is printed are the figures as one line of JSON. A compiler that fails ends this with its error.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

COUNTED = (  # in the machine code, by what they say of a kernel
    "HGMMA",  # matrix instruction of a warp group, sm_90
    "HMMA",  # matrix instruction of one warp
    "UTCMMA",  # matrix instruction of the fifth generation, sm_100; UTCHMMA, UTCQMMA, ... counted as one
    "LDGSTS",  # asynchronous copy, sm_80
    "UTMALDG",  # asynchronous copy of a block by a descriptor (TMA), sm_90
    "UTMASTG",  # the same on the way out
    "LDL",  # spilled registers read
    "STL",  # spilled registers written
    "SHFL",  # exchange between the lanes of a warp
    "MUFU",  # exponentials and their like
)
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)(\S*)", re.MULTILINE)
USAGE = re.compile(r"\bREG:(\d+)\s+STACK:(\d+)")
SHAPE = re.compile(r"\d+x\d+x\d+")


def build(case: dict):
    """The compiled kernel of a case. A type ``*bf16:16`` promises, as a launch does, what is divisible by 16."""
    module, name = case["kernel"].split(":")
    kernel = vars(importlib.import_module(module))[name]
    assert list(case["signature"]) == kernel.arg_names, f"{case['kernel']} takes {kernel.arg_names}, not {list(case['signature'])}"
    fixed = {p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    promised = {argument for argument, kind in case["signature"].items() if kind.endswith(":16")}
    assert not fixed & promised, f"no launch promises that these are divisible: {sorted(fixed & promised)}"
    types = {argument: kind.removesuffix(":16") for argument, kind in case["signature"].items()}
    divisible = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(types) if argument in promised}
    source = ASTSource(kernel, types, case["constexprs"], divisible)
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    if case["maxnreg"] is not None:
        options["maxnreg"] = case["maxnreg"]
    return triton.compile(source, target=GPUTarget("cuda", case["architecture"], 32), options=options)


def count(machine_code: str) -> tuple[Counter[str], list[str]]:
    """How often each instruction of ``COUNTED`` stands there, and the tiles of the warp group's matrix instructions."""
    found: Counter[str] = Counter()
    shapes = set()
    for name, modifiers in OPCODE.findall(machine_code):
        found["UTCMMA" if name.startswith("UTC") and name.endswith("MMA") else name] += 1
        if name == "HGMMA":
            shapes |= set(SHAPE.findall(modifiers))
    return found, sorted(shapes)


def disassemble(binary: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def figures(compiled) -> dict:
    """Registers and bytes of stack per thread; bytes of shared and columns of tensor memory per program; counts of instructions."""
    usage = disassemble(compiled.asm["cubin"], "-res-usage")
    (resources,) = USAGE.findall(usage)
    found, shapes = count(disassemble(compiled.asm["cubin"], "-sass"))
    assert found, "the machine code was not understood: no instruction was found in it"
    made = {
        "registers": int(resources[0]),
        "stack": int(resources[1]),
        "shared": compiled.metadata.shared,
        "instructions": {name: found[name] for name in COUNTED if found[name]},
    }
    if shapes:
        made["shapes"] = shapes
    if compiled.metadata.tmem_size:  # sm_100
        made["tensor_memory"] = compiled.metadata.tmem_size
    return made


def main() -> None:
    case = json.load(sys.stdin)
    start = time.perf_counter()
    made = figures(build(case))
    print(json.dumps({**made, "triton": triton.__version__, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
