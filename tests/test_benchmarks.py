"""The folder benchmarks/: what is measured where, the pictures, and the script for a GPU, run on a CPU at a tiny size."""

import importlib
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_contrastive, grid, plots, training
from zoo import bench, contenders, measure
from zoo.bench import Record, load, machine, store
from zoo.errors import ZooError
from zoo.measure import Case, Timing

ROOT = Path(__file__).parents[1]
ALL = [c.name for c in contenders.contenders()]
GPU_GRID = [entry for part in (1, 2, 3) for entry in grid.gpu_grid(part)]


def record(case, name="ours", ratio=1.5, **more):
    return Record(case, name, "abc1234", "2025-01-01T00:00:00+00:00", Timing(0.1, ratio, ratio, ratio, 5), **more)


class TestGrid:
    """The lists of what is measured, by machine."""

    def test_the_short_cases_are_part_of_the_grid(self):
        """Else `zoo bench --compare` would find no baseline."""
        assert set(bench.short_cases("cpu")) <= {entry.case for entry in grid.cpu_grid()}
        assert set(bench.short_cases("cuda")) <= {entry.case for entry in GPU_GRID}

    def test_no_case_twice(self):
        """The second entry would put reasons in the place of the first one's numbers."""
        for entries in (grid.cpu_grid(), GPU_GRID):
            assert len({entry.case for entry in entries}) == len(entries)

    def test_who_is_left_out_is_left_out_with_a_reason(self):
        for entry in (*grid.cpu_grid(), *GPU_GRID):
            reasons = {c.name: entry.left_out(c) for c in contenders.contenders()}
            assert {name for name, reason in reasons.items() if reason is None} == set(entry.names or ALL)
            assert "" not in reasons.values()

    def test_a_gpu_measures_what_was_promised(self):
        names = {entry.case[:5]: entry.names for entry in GPU_GRID if entry.case.scale == 50}
        for rows in (8192, 32768):
            for dim in (512, 1024):
                for direction in ("both", "rows"):
                    assert names[rows, dim, "bf16", direction, True] is None
                    assert names[rows, dim, "bf16", direction, False] is None
                    assert names[rows, dim, "fp32", direction, True] is None
                assert names[rows, dim, "bf16", "self", True] == ("ours",)
            for dim in (256, 1536, 4096):
                assert names[rows, dim, "bf16", "both", True] == ("ours",)
        assert names[131072, 512, "bf16", "both", True] == names[131072, 1024, "bf16", "both", True] == ("ours", "inf_cl")
        assert names[524288, 512, "bf16", "both", True] == names[1048576, 512, "bf16", "both", True] == ("ours",)

    @pytest.mark.parametrize("case, rounds", [(Case(2048, 512), 5), (Case(16384, 512), 2), (Case(2048, 512, device="cuda"), 20)])
    def test_rounds(self, case, rounds):
        assert grid.rounds_of(case) == rounds
        assert grid.rounds_of(Case(1 << 20, 512, device="cuda")) == 3


class TestPlots:
    def test_curves_are_by_rows_and_leave_out_what_was_not_measured(self):
        other = record(Case(64, 512, "bf16"), "ours")
        records = [record(Case(64, 512)), record(Case(32, 512), ratio=3.0), record(Case(32, 512), "liger")._replace(timing=None), other]
        assert plots.curves(records, lambda r: r.timing and r.timing.ratio) == {"ours": [(32, 3.0), (64, 1.5)]}

    def test_every_contender_has_a_colour(self):
        assert set(plots.COLOURS) == set(ALL)

    def test_pictures(self, tmp_path):
        gone = record(Case(64, 512), "liger")._replace(timing=None, missing="needs cuda")
        store([record(Case(64, 512), memory=1 << 20), record(Case(32, 512), memory=1 << 19), gone], machine("cpu"), "", tmp_path)
        (tmp_path / "aot.json").write_text("{}")
        assert plots.missing([gone]) == {"liger": "needs cuda"}
        paths = plots.draw(tmp_path, tmp_path / "docs")
        assert [path.name for path in paths] == ["contrastive_time.png", "contrastive_memory.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)

    def test_without_results(self, tmp_path):
        with pytest.raises(ZooError, match=r"no results in .*: make some with: make bench"):
            plots.draw(tmp_path, tmp_path)


class TestGpuScript:
    """On a CPU at a tiny size; nothing of it has run on a GPU."""

    @pytest.fixture
    def script(self, monkeypatch, tmp_path):
        def call(*arguments):
            start = [] if "--earlier" in arguments else ["--earlier", str(tmp_path / "nothing")]  # not what this machine has stored
            settings = ["--device", "cpu", "--tiny", "--out", str(tmp_path), *start]
            monkeypatch.setattr(sys, "argv", ["gpu_contrastive", *settings, *arguments])
            gpu_contrastive.main()
            path = tmp_path / f"{machine('cpu')['name']}.json"
            return path, tmp_path / f"gpu_part{arguments[1]}.json"

        kept, precision = dict(measure.CEILING_SIZE), torch.get_float32_matmul_precision()
        monkeypatch.setattr(bench, "memory_of", lambda case, contender, step: 1)
        here = tuple(c._replace(module="absent") if c.compiles else c for c in contenders._CONTENDERS)
        monkeypatch.setattr(contenders, "_CONTENDERS", here)
        yield call
        measure.CEILING_SIZE.update(kept)
        torch.set_float32_matmul_precision(precision)

    def test_part_1_checks_and_measures_ceilings(self, script):
        path, side = script("--part", "1")
        told = json.loads(side.read_text())
        assert {entry["right"] for entry in told["correctness"]} == {True}
        assert len(told["correctness"]) == 3 * 3 * 2
        assert [entry["what"] for entry in told["ceilings"]][-1] == "copy"
        assert {r.contender for r in load(path) if r.timing is not None} == {"ours"}

    def test_a_part_goes_on_from_earlier_results(self, script, tmp_path):
        earlier = tmp_path / "earlier"
        store([record(Case(16, 8), "liger")], machine("cpu"), "", earlier)
        path, _ = script("--part", "2", "--earlier", str(earlier))
        records = load(path)
        assert records[0] == record(Case(16, 8), "liger")
        assert {r.contender for r in records} == set(ALL)
        assert {r.contender for r in records if r.timing is not None} >= {"ours", "open_clip"}

    def test_part_3_ablates_and_trains(self, script):
        _, side = script("--part", "3")
        told = json.loads(side.read_text())
        assert [entry["agree"] for entry in told["curves"]] == [True, True]
        assert {"chunked", "reference"} <= set(told["curves"][0]["of"])
        assert {entry["variant"] for entry in told["ablations"]} >= {"ours", "fixed scale", "precision 3xtf32"}

    def test_when_time_is_over_cases_are_listed(self, script):
        path, _ = script("--part", "2", "--seconds", "-1")
        assert {r.missing for r in load(path)} == {"left out: the time of this part was over"}

    def test_a_wrong_loss_ends_with_one(self, script, monkeypatch):
        monkeypatch.setattr(gpu_contrastive, "TOLERANCE", {"fp32": -1.0, "bf16": 1.0, "fp16": 1.0})
        with pytest.raises(SystemExit, match=r"both 64x40 fp32 forward\+backward: ours Error"):
            script("--part", "1")

    def test_wheels_can_be_imported(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("PYTHONPATH", "before")
        with zipfile.ZipFile(tmp_path / "planted-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("planted_library.py", "answer = 42")
        gpu_contrastive.use_wheels(tmp_path)
        assert importlib.import_module("planted_library").answer == 42
        assert os.environ["PYTHONPATH"].startswith(f"before{os.pathsep}")


def test_curves_that_differ_are_seen():
    same, other = {"losses": [2.0, 1.0]}, {"losses": [2.0, 1.02]}
    assert training.curves_agree([same, same])
    assert not training.curves_agree([same, other])


def test_make_test_does_not_collect_benchmarks(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert "bench_*.py" in pytestconfig.getini("python_files")
    assert list((ROOT / "tests").rglob("bench_*.py")) == []
    assert list((ROOT / "benchmarks").glob("bench_*.py"))
    assert list((ROOT / "benchmarks").glob("test_*.py")) == []
