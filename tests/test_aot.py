"""What the compilers made of the kernels, without a GPU: the table is up to date and within the limits, and the tool that fills it."""

import ast
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import aot

ROOT = Path(__file__).parents[1]
CASES = aot.listed()
ROWS = aot.read(aot.RESULTS)
FIGURES = {"registers": 210, "stack": 0, "shared": 147480, "instructions": {"HGMMA": 8, "UTMALDG": 6}}
GOOD = {**FIGURES, "architecture": 90, "digest": "d"}
KERNEL = """
import triton
import triton.language as tl

FACTOR = tl.constexpr({factor})

@triton.jit
def _times(x):
    return x * FACTOR

@triton.jit
def unrelated(x):
    return x

@triton.jit(do_not_specialize=["size"])
def double(x, size, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.store(x + at, _times(tl.load(x + at, mask=at < size)), mask=at < size)

def compile_cases(capability, triton_version):
    if capability == 90:
        signature = {{"x": "*fp32:16", "size": "i32", "WIDTH": "constexpr"}}
        for width in {widths}:
            yield dict(
                kernel="double", label=f"width {{width}}", signature=signature, constexprs={{"WIDTH": width}},
                num_warps=4, num_stages=1, maxnreg=None, dots="none",
            )
"""


def make_case(**changes):
    return aot.Case("m:k", "a", {"x": "*bf16"}, {}, 8, 3, None, "16")._replace(**changes)


@pytest.fixture
def kernels(tmp_path, monkeypatch, request):
    """Writes a module of kernels, under a name of its own, where this process and compile_one.py find it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name, factor=2.0, widths=(64, 128)):
        name = f"{name}_{request.node.originalname}"
        (tmp_path / f"{name}.py").write_text(KERNEL.format(factor=factor, widths=widths))
        return name

    return write


def test_there_are_cases_for_every_architecture_and_version():
    assert {(key.architecture, key.triton) for key in CASES} == {(a, f"{v[0]}.{v[1]}") for a in aot.ARCHITECTURES for v in aot.VERSIONS}


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"sm_{key.architecture}-{key.triton}-{key.kernel.split(':')[1]}-{key.label}")
def test_every_case_is_compiled_and_within_the_limits(key):
    found = aot.complaints(CASES[key], ROWS.get(key), aot.digest(CASES[key]))
    assert not found, f"{'; '.join(found)}: run make aot, or have auto avoid it"


def test_the_table_holds_nothing_else():
    assert set(ROWS) <= set(CASES), "run make aot: it drops what is listed no more"


def test_every_triton_function_is_compiled():
    written = {
        f"zoo.kernels.{path.stem}.{node.name}"
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)
    }
    compiled = set().union(*(aot.sources(kernel) for kernel in {case.kernel for case in CASES.values()}))
    assert written
    assert written <= compiled, f"no case compiles {sorted(written - compiled)}"


@pytest.mark.slow
def test_compiling_again_gives_the_same_figures(tmp_path):
    here = aot.version_of(sys.executable)
    again = [key for key in CASES if key in ROWS and ROWS[key]["triton"] == here and key.architecture == 90 and "error" not in ROWS[key]]
    assert len(again) >= 2
    aot.snapshot(tmp_path)
    for key in (again[0], again[-1]):
        made = aot.compile_case(CASES[key], key.architecture, sys.executable, tmp_path)
        assert {name: ROWS[key].get(name) for name in made if name != "seconds"} == {k: v for k, v in made.items() if k != "seconds"}


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"stack": 88}, "spills 88 bytes, read 0 and written 0 times"),
        ({"instructions": {"HGMMA": 8, "UTMALDG": 6, "LDL": 3, "STL": 4}}, "spills 0 bytes, read 3 and written 4 times"),
        ({"shared": 227 * 1024 + 1}, "shared memory 232449 of 232448 bytes"),
        ({"architecture": 80, "shared": 166913, "instructions": {"HMMA": 64, "LDGSTS": 8}}, "shared memory 166913 of 166912 bytes"),
        ({"architecture": 100, "tensor_memory": 513, "instructions": {"UTCMMA": 8, "UTMALDG": 6}}, "tensor memory 513 of 512 columns"),
        ({"instructions": {"HMMA": 8, "UTMALDG": 6}}, "matrix instructions ['HMMA'], not ['HGMMA']"),
        ({"instructions": {"HMMA": 8, "HGMMA": 8, "UTMALDG": 6}}, "matrix instructions ['HGMMA', 'HMMA'], not ['HGMMA']"),
        ({"instructions": {"HGMMA": 8, "UTMALDG": 2}}, "2 asynchronous copies for 3 stages"),
        ({"error": "Assertion `x' failed."}, "Assertion `x' failed."),
    ],
)
def test_a_broken_limit_is_told(changes, told):
    assert aot.faults(make_case(), GOOD) == []
    assert aot.faults(make_case(), {**GOOD, **changes}) == [told]


def test_exact_products_use_no_matrix_instruction():
    assert aot.faults(make_case(dots="ieee"), {**GOOD, "instructions": {"UTMALDG": 6}}) == []
    assert aot.faults(make_case(dots="ieee"), GOOD) == ["matrix instructions ['HGMMA'], not []"]


def test_a_case_without_a_row_or_with_an_old_one_is_told():
    assert aot.complaints(make_case(), GOOD, "d") == []
    assert aot.complaints(make_case(), None, "d") == ["is not in the table"]
    assert aot.complaints(make_case(), GOOD, "e") == ["was compiled from another source or with other settings"]


def test_what_auto_avoids_breaks_a_limit():
    avoided = make_case(avoided="spills")
    assert aot.complaints(avoided, {**GOOD, "stack": 88}, "d") == []
    assert aot.complaints(avoided, GOOD, "d") == ["keeps every limit, but is avoided: spills"]


def test_a_digest_is_that_of_all_a_kernel_reads(kernels):
    one, same, other = (aot.listed([kernels(name, factor)]) for name, factor in (("one", 2.0), ("same", 2.0), ("other", 3.0)))
    kernel = next(iter(one.values())).kernel
    assert {name.rpartition(".")[2] for name in aot.sources(kernel)} == {"double", "_times", "FACTOR"}

    def values(cases):
        return sorted(aot.sources(next(iter(cases.values())).kernel).values())

    assert values(one) == values(same)
    assert values(one) != values(other)
    narrow, wide = list(one.values())[:2]
    assert len({aot.digest(narrow), aot.digest(wide), aot.digest(narrow._replace(maxnreg=128))}) == 3
    assert aot.digest(narrow) == aot.digest(narrow._replace(label="renamed"))


def test_a_kernel_that_reads_from_a_module_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reads_math.py").write_text("import math\nimport triton\n\n@triton.jit\ndef kernel(x):\n    return math.floor(x)\n")
    with pytest.raises(AssertionError, match=r"reads from <module 'math'.*import the function"):
        aot.sources("reads_math:kernel")


def test_only_what_changed_is_compiled_again(kernels, tmp_path, monkeypatch, capsys):
    compiled = []

    def fake(case, architecture, python, folder):
        assert (folder / "zoo" / "kernels" / "contrastive.py").is_file()
        compiled.append((case.label, python))
        return {**FIGURES, "instructions": {}, "seconds": 2.0, **failing}

    monkeypatch.setattr(aot, "compile_case", fake)
    monkeypatch.setattr(aot, "version_of", {"new": "3.8.0", "old": "3.6.0"}.get)
    path, cases, failing = tmp_path / "results" / "aot.json", aot.listed([kernels("k")]), {}

    def labels(pythons, chosen=cases, only=""):
        compiled.clear()
        aot.compile_listed(chosen, pythons, path, 2, only)
        return sorted(compiled)

    assert labels(["new"], only="width 64 sm_90") == [("width 64", "new")]
    assert labels(["new"]) == [("width 128", "new")]
    assert labels(["new", "old"]) == [("width 128", "old"), ("width 64", "old")]
    written = path.read_text()
    assert labels(["new", "old"]) == []
    assert path.read_text() == written
    assert "seconds" not in written
    assert [row["triton"] for row in json.loads(written)] == ["3.6.0", "3.8.0"] * 2
    assert list(aot.wrong(cases, aot.read(path))) == []

    changed = {key: case._replace(num_warps=8) if key.triton == "3.8" and "64" in key.label else case for key, case in cases.items()}
    failing = {"error": "not compiled within 600 seconds"}
    assert labels(["new", "old"], changed) == [("width 64", "new")]
    assert "-- not compiled within 600 seconds" in capsys.readouterr().out
    assert len(list(aot.wrong(changed, aot.read(path)))) == 1
    failing = {}
    assert labels(["new", "old"], changed) == [("width 64", "new")]  # an error is tried again

    monkeypatch.setattr(aot, "version_of", {"new": "3.8.1", "old": "3.6.0"}.get)
    assert len(labels(["new", "old"], changed)) == 2
    assert labels(["new"], dict(list(changed.items())[:1])) == []
    assert len(aot.read(path)) == 1  # rows of what is listed no more are gone


def test_two_cases_of_one_name_are_refused(kernels):
    with pytest.raises(AssertionError, match=r"two cases for Key.*width 64"):
        aot.listed([kernels("twice", widths=(64, 64))])


def test_a_kernel_is_compiled_without_a_gpu(kernels, tmp_path):
    case = next(case for case in aot.listed([kernels("real")]).values())
    made = aot.compile_case(case, 90, sys.executable, tmp_path)
    assert made["triton"] == aot.version_of(sys.executable)
    assert (made["stack"], made["shared"]) == (0, 0)
    assert 0 < made["registers"] <= 32
    assert aot.faults(case, {**made, "architecture": 90}) == []


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"signature": {"y": "*fp32"}}, "takes ['x', 'size', 'WIDTH'], not ['y']"),
        ({"signature": {"x": "*fp32", "size": "i32:16", "WIDTH": "constexpr"}}, "no launch promises that these are divisible: ['size']"),
        ({"constexprs": {"WIDTH": 100}}, "arange's range must be a power of 2"),
    ],
)
def test_a_case_that_does_not_compile_has_an_error_of_one_line(kernels, tmp_path, changes, told):
    case = next(case for case in aot.listed([kernels("wrong")]).values())._replace(**changes)
    made = aot.compile_case(case, 90, sys.executable, tmp_path)
    assert list(made) == ["error"]
    assert told in made["error"]


def test_a_compile_that_hangs_is_ended(kernels, tmp_path):
    case = next(case for case in aot.listed([kernels("slow")]).values())
    assert aot.compile_case(case, 90, sys.executable, tmp_path, timeout=0.01) == {"error": "not compiled within 0 seconds"}


@pytest.mark.parametrize(
    "output, told",
    [
        (
            "python: /build/WS.cpp:1201: int mlir::f(): Assertion `a && b' failed.\n" + "#loc = loc(x)\n" * 2000,
            "Assertion `a && b' failed.",
        ),
        ("// ptx\nLLVM ERROR: operation destroyed\n stack dump\n 0. python", "LLVM ERROR: operation destroyed"),
        (
            "E: PTXAS error: Internal\nptxas /tmp/tmpa.ptx, line 4; error   : (C7602) no registers\nptxas fatal  : aborted",
            "error   : (C7602) no registers",
        ),
        (
            "/home/me/kernels/_k.py:12:3: error: 'tt.dot' op failed\nTraceback\nRuntimeError: PassManager::run failed",
            "error: 'tt.dot' op failed",
        ),
        ("Traceback\nCompilationError: at 2:4:\n  nothing\nNameError('nothing is not defined')\n", "NameError('nothing is not defined')"),
        ("FileNotFoundError: /home/me/k.py", "FileNotFoundError: k.py"),
        ("", ""),
    ],
)
def test_the_telling_line_of_a_failure(output, told):
    assert aot.summary(output) == told


def test_the_command_says_what_is_wrong(kernels, tmp_path, monkeypatch, capsys):
    name = kernels("told")
    monkeypatch.setattr(aot, "modules", lambda: [name])
    monkeypatch.setattr(aot, "compile_case", lambda *_: {**FIGURES, "instructions": {}, "stack": 88 if fails else 0})
    given, fails = ["--out", str(tmp_path / "aot.json")], True
    assert aot.main(given) == 1
    assert "width 64: spills 88 bytes" in capsys.readouterr().out
    (tmp_path / "aot.json").unlink()
    fails = False
    assert aot.main(given) == 1
    assert "Triton 3.6" in (out := capsys.readouterr().out)  # no interpreter has it
    assert "is not in the table" in out
    monkeypatch.setattr(aot, "VERSIONS", tuple(v for v in aot.VERSIONS if aot.version_of(sys.executable).startswith(f"{v[0]}.{v[1]}.")))
    assert aot.main(given) == 0
    assert "2 cases, all within the limits" in capsys.readouterr().out
