"""The benchmark of the contrastive loss: what is measured, how it is kept, and what a slower loss leads to. Times are injected."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo import bench, cli, contenders, measure
from zoo.bench import Record, baseline, compare, load, machine, prepare, run_case, store, table
from zoo.contenders import Contender
from zoo.errors import Failure, ZooError
from zoo.measure import COSINE, Case, Error, Timing, make_inputs, measure_error, measure_memory, measure_times, timing

ROOT = Path(__file__).parents[1]
SMALL = Case(16, 8)
HERE = [c for c in contenders.contenders() if c.refusal(SMALL) is None]


def contender(name="plain", make=None, **settings):
    """A loss that costs nothing but a sum."""

    def step_of(case):
        return make(case) if make else lambda inputs: inputs.x.detach().sum()

    return Contender(name, step_of, **{"package": "torch", **settings})


class Clock:
    """In the place of `time_call`: a second for each call of our loss, one for whatever else is timed."""

    def __init__(self, monkeypatch):
        self.calls = 0
        loss = contenders.contrastive_loss

        def counted(*arguments, **keywords):
            self.calls += 1
            return loss(*arguments, **keywords)

        monkeypatch.setattr(contenders, "contrastive_loss", counted)
        monkeypatch.setattr(measure, "time_call", self.seconds)

    def seconds(self, call, device):
        before = self.calls
        call()
        return float(max(1, self.calls - before))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def tiny(monkeypatch):
    """`zoo bench` at a size of milliseconds."""
    monkeypatch.setattr(bench, "short_cases", lambda device: [Case(16, 8, direction=d, device=device) for d in ("both", "rows", "self")])
    monkeypatch.setitem(measure.CEILING_SIZE, "cpu", 8)


@pytest.fixture
def slow(monkeypatch):
    """Make our loss do its work twice."""

    def twice(given):
        def make(case):
            step = given.make(case)

            def both_times(inputs):
                step(inputs)
                return step(inputs)

            return both_times

        return given._replace(make=make)

    def now():
        monkeypatch.setattr(contenders, "_CONTENDERS", tuple(twice(c) if c.name == "ours" else c for c in contenders._CONTENDERS))

    return now


@pytest.fixture
def zoo(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code, out, err

    return call


class TestInputs:
    @pytest.mark.parametrize("direction", ["both", "rows", "self"])
    def test_rows_are_unit_and_their_positives_aligned(self, direction):
        inputs = make_inputs(Case(64, 512, direction=direction), seed=3)
        y = inputs.x if inputs.y is None else inputs.y
        assert torch.allclose(inputs.x.norm(dim=1), torch.ones(64))
        cosines = (inputs.x * y[inputs.partner]).sum(1).detach()
        assert torch.allclose(cosines, torch.full((64,), COSINE), atol=0.15)  # 3 of the deviations of a random cosine at D=512
        assert float(cosines.mean()) == pytest.approx(COSINE, abs=0.03)

    def test_of_a_side_partners_are_each_other(self):
        partner = make_inputs(Case(6, 4, direction="self"), seed=0).partner
        assert partner.tolist() == [3, 4, 5, 0, 1, 2]

    def test_a_seed_is_a_set_and_forward_alone_needs_no_gradient(self):
        one, same, other = (make_inputs(SMALL._replace(backward=False), seed=s).x for s in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert not one.requires_grad

    def test_names_and_flops(self):
        case = Case(8, 4, "bf16", "self", backward=False, scale=100)
        assert case.name == "self 8x4 bf16 forward scale 100"
        assert case.flops == 2 * 8 * 8 * 4
        assert Case(8, 4).flops == 8 * 8 * 8 * 4
        assert Case(8, 4).name == "both 8x4 fp32 forward+backward"


class TestContenders:
    @pytest.mark.parametrize("one", HERE, ids=lambda c: c.name)
    @pytest.mark.parametrize("direction", ["both", "rows", "self"])
    @pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of rivals, on how they are called
    def test_those_that_are_here_are_the_same_loss(self, one, direction):
        """Tolerance: float32 sums of up to 48 terms; the largest seen is 1e-6."""
        case = Case(48, 32, direction=direction)
        if one.refusal(case):
            assert one.refusal(case) == f"has no direction {direction!r}"
            return
        if one.compiles:
            pytest.skip("compiles for half a minute; make bench measures its error")
        error = measure_error(case, one.make(case))
        assert [e is None for e in error] == [False, False, direction == "self", one.package == "sentence-transformers"]
        assert max(e for e in error if e is not None) < 1e-5

    def test_ours_come_first_and_all_of_the_plan_are_listed(self):
        names = [c.name for c in contenders.contenders()]
        assert names[:3] == ["ours", "ours chunked", "ours reference"]
        assert {"open_clip", "open_clip compiled", "inf_cl", "torch linear_cross_entropy", "liger", "cut-cross-entropy"} < set(names)
        assert {"sentence-transformers", "sentence-transformers cached"} < set(names)

    def test_a_name_that_is_none(self):
        with pytest.raises(ZooError, match=r"no contender named 'open_clp'; did you mean 'open_clip'\?"):
            contenders.contenders(["ours", "open_clp"])

    @pytest.mark.parametrize(
        "settings, reason",
        [
            ({"module": "no_such_library", "package": "no-such-library"}, "not installed: pip install no-such-library"),
            ({"devices": ("cuda",)}, "needs cuda"),
            ({"directions": ("rows",)}, "has no direction 'both'"),
            ({"multiple_of": (64, 8)}, "needs N % 64 == 0 and D % 8 == 0"),
            ({"multiple_of": (16, 256)}, "needs N % 16 == 0 and D % 256 == 0"),
        ],
    )
    def test_what_cannot_be_measured_is_listed_with_its_reason(self, settings, reason):
        rival = contender(**settings)
        assert rival.refusal(SMALL) == reason
        (record,) = run_case(SMALL, [rival], rounds=1)
        assert (record.timing, record.missing) == (None, reason)
        assert table([record]).splitlines()[-1].split("  ")[-1] == reason

    def test_an_older_torch_lacks_its_own(self, monkeypatch):
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
        (own,) = contenders.contenders(["torch linear_cross_entropy"])
        assert own.refusal(SMALL) == f"not in torch {torch.__version__}: needs 2.13"

    def test_a_rival_that_breaks_is_listed_and_the_others_are_measured(self, tiny):
        class Uncompiled(pytest.importorskip("triton.errors").TritonError):
            pass

        def broken(case):
            raise Uncompiled("no kernel\nfor this")

        records = run_case(SMALL, [contender("broken", broken), contender("whole")], rounds=2, extras=False)
        assert records[0].missing == "Uncompiled: no kernel for this"
        assert records[1].timing.rounds == 2

    def test_what_no_loss_should_raise_is_raised(self):
        class Unheard(Exception):
            pass

        def broken(case):
            raise Unheard

        with pytest.raises(Unheard):
            prepare(SMALL, contender("broken", broken))

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr("zoo.contenders.find_spec", lambda name: None)
        assert {e.__module__ for e in contenders.breakages()} == {"builtins"}

    def test_ours_may_not_break_but_may_not_fit(self):
        def raises(error):
            def make(case):
                raise error

            return contender("ours", make, package="multimodal-zoo")

        with pytest.raises(RuntimeError, match="a fault"):
            prepare(SMALL, raises(RuntimeError("a fault")))
        assert prepare(SMALL, raises(torch.OutOfMemoryError("large"))) == (None, "out of memory")


class TestMeasure:
    def test_a_ratio_is_to_the_matmul_of_its_round(self):
        """Twice the ceiling's seconds for twice its arithmetic is a ratio of 1, at any speed of the machine."""
        case = Case(16, 8)
        told = timing(case, [2.0, 20.0, 6.0], [1.0, 10.0, 1.0], case.flops // 2)
        assert told == Timing(seconds=6.0, ratio=1.0, low=1.0, high=3.0, rounds=3)

    def test_contenders_take_turns_and_inputs_rotate(self, monkeypatch, tiny):
        seen = []
        monkeypatch.setattr(measure, "time_call", lambda call, device: call() is None or 1.0)

        def step(name):
            return lambda inputs: seen.append((name, float(inputs.x.detach()[0, 0])))

        times = measure_times(SMALL, {"a": step("a"), "b": step("b")}, rounds=4)
        assert [name for name, _ in seen] == list("abababab")
        assert seen[0][1] == seen[1][1]
        assert len({value for _, value in seen}) == 3
        assert seen[0][1] == seen[6][1]
        assert times["a"].rounds == 4

    def test_gradients_of_the_last_call_are_gone(self, tiny):
        def step(inputs):
            assert all(leaf.grad is None for leaf in inputs.leaves())
            inputs.x.sum().backward()

        measure_times(SMALL, {"a": step}, rounds=5)

    def test_the_error_is_relative_and_of_each_gradient(self):
        """One part in a thousand too much, everywhere."""
        (reference,) = contenders.contenders(["ours reference"])
        exact = reference.make(SMALL)

        def step(inputs):
            value = exact(inputs)
            for leaf in inputs.leaves():
                leaf.grad *= 1.001
            return value * 1.001

        error = measure_error(SMALL, step)
        assert list(error) == pytest.approx([1e-3] * 4, rel=1e-2)

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="no Linux")
    def test_memory_above_the_inputs(self):
        """In a process of its own, as it must be. 32 MiB are freed before the end, the peak still has them."""
        code = (
            "import torch; from zoo.measure import Case, measure_memory; torch.set_num_threads(1)\n"
            "def step(inputs):\n    kept = torch.ones(1 << 23)\n    torch.ones(1 << 23)\n    return kept.sum()\n"
            "torch.ones(1 << 26)  # an earlier and higher peak\n"
            "print(measure_memory(Case(16, 8), step))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(done.stdout) / 2**20 == pytest.approx(64, abs=4)

    def test_without_linux_memory_is_not_told(self, monkeypatch):
        monkeypatch.setattr(Path, "is_file", lambda self: False)
        assert measure_memory(SMALL, lambda inputs: inputs.x) is None

    def test_the_process_for_memory_prints_bytes(self, capsys):
        bench.memory_child("ours reference", json.dumps(Case(16, 8)._asdict()))
        assert capsys.readouterr().out.strip().isdecimal()

    def test_when_that_process_dies(self, monkeypatch):
        monkeypatch.setattr(bench, "_CHILD", "import sys; sys.exit('killed')")
        with pytest.raises(Failure, match=r"plain, both 16x8 fp32 forward\+backward: measuring its memory ended with 1\nkilled"):
            bench.memory_of(SMALL, contender(), lambda inputs: inputs.x)


def record(case=SMALL, name="ours", ratio=1.5, low=1.4, high=1.6, **more):
    return Record(case, name, "abc1234", "2025-01-01T00:00:00+00:00", Timing(0.1, ratio, low, high, 5), **more)


class TestResults:
    def test_what_is_stored_comes_back(self, tmp_path):
        records = [
            record(memory=7, error=Error(1e-7, 2e-7, None, None)),
            record(name="open_clip")._replace(timing=None, missing="not installed"),
        ]
        about = machine("cpu")
        path = store(records, about, "make bench", tmp_path)
        assert path == tmp_path / f"{about['name']}.json"
        assert load(path) == baseline(about, tmp_path) == records
        kept = json.loads(path.read_text())
        assert kept["machine"] == about
        assert kept["run"]["command"] == "make bench"
        assert torch.__version__.startswith(kept["run"]["versions"]["torch"])
        assert kept["run"]["versions"].keys() >= {"python", "triton", "inf-cl", "open_clip_torch"}
        assert {"commit", "date", "threads", "float32_matmul_precision"} < kept["run"].keys()

    def test_a_later_run_replaces_its_cases_and_keeps_the_others(self, tmp_path):
        about = machine("cpu")
        store([record(), record(name="open_clip")], about, "make bench", tmp_path)
        path = store([record(ratio=9.0)], about, "again", tmp_path)
        assert [(r.contender, r.timing.ratio) for r in load(path)] == [("ours", 9.0), ("open_clip", 1.5)]

    def test_a_machine_has_a_name_for_a_file(self):
        about = machine("cpu")
        assert about["name"].replace("-", "").isalnum()
        assert about["name"].endswith(f"{about['cores']}-cores")

    def test_a_damaged_file(self, tmp_path):
        (tmp_path / "x.json").write_text('{"records": [{"name": "?"}]}')
        with pytest.raises(
            ZooError, match=r"x.json holds no results of this version .*: delete it, and make new ones: in a checkout, make bench"
        ):
            load(tmp_path / "x.json")

    def test_without_a_baseline(self, tmp_path):
        (tmp_path / "nvidia-h200.json").write_text('{"records": []}')
        (tmp_path / "aot.json").write_text("[]")
        with pytest.raises(
            ZooError,
            match=r"no baseline of the machine m in .* \(have: nvidia-h200\): in a checkout, make bench stores them in benchmarks/results",
        ):
            baseline({"name": "m"}, tmp_path)

    def test_a_baseline_without_the_case(self):
        with pytest.raises(
            ZooError,
            match=r"the baseline of this machine has no ours, both 16x8 fp32 forward\+backward\nin a checkout, make bench stores them",
        ):
            compare([record()], [record()._replace(timing=None, missing="out of memory")])

    @pytest.mark.parametrize("ratio, regressed", [(1.4, False), (1.69, False), (1.71, True)])
    def test_a_regression_is_beyond_the_recorded_spread(self, ratio, regressed):
        """1.5 with rounds from 1.4 to 1.6 allows 1.7."""
        (told,) = compare([record(ratio=ratio)], [record()])
        assert told.regressed is regressed
        assert told.limit == pytest.approx(1.7)

    def test_a_spread_of_nothing_still_allows_a_margin(self):
        (told,) = compare([record(ratio=1.56)], [record(low=1.5, high=1.5)])
        assert told.limit == pytest.approx(1.5 * 1.05)
        assert not told.regressed

    def test_table(self):
        lines = table([record(memory=1 << 20, error=Error(1e-7, 2e-7)), record(name="open_clip", ratio=3.0)]).splitlines()
        assert lines[0] == "both 16x8 fp32 forward+backward"
        assert lines[2].split() == ["ours", "1.00", "1.50", "1.0", "MiB", "1.0e-07", "2.0e-07"]
        assert lines[3].split() == ["open_clip", "2.00", "3.00", "-", "-", "-"]


class TestCommand:
    def test_prints_every_contender(self, zoo, tiny, clock, monkeypatch):
        monkeypatch.setattr(bench, "memory_of", lambda case, contender, step: 1 << 20)
        here = tuple(c._replace(module="absent") if c.compiles else c for c in contenders._CONTENDERS)
        monkeypatch.setattr(contenders, "_CONTENDERS", here)
        code, out, err = zoo("bench", "--device", "cpu")
        assert code == 0
        assert err == f"measuring on {machine('cpu')['name']}: both 16x8 fp32 forward+backward\n"
        shown = out.splitlines()[2:]
        assert shown[0].split()[0] == "ours"
        assert len(shown) == len([c for c in here if c.name == "ours" or not c.is_ours])
        assert next(line for line in shown if line.startswith("inf_cl")).split("  ", 1)[1].strip() in (
            "not installed: pip install inf-cl",
            "needs cuda",
        )

    def test_compare_without_a_baseline_is_two(self, zoo, tiny, tmp_path):
        code, out, err = zoo("bench", "--compare", "--device", "cpu", "--results", tmp_path)
        assert (code, out) == (2, "")
        assert f"no baseline of the machine {machine('cpu')['name']}" in err
        assert "make bench" in err

    def test_another_device_is_two(self, zoo):
        code, _, err = zoo("bench", "--device", "tpu")
        assert code == 2
        assert "no device 'tpu' to measure on: write cpu" in err

    def test_a_clean_run_is_zero_and_a_loss_that_does_its_work_twice_is_three(self, zoo, tiny, clock, slow, tmp_path):
        about = machine("cpu")
        for case in bench.short_cases("cpu"):
            store(run_case(case, contenders.contenders(["ours"]), rounds=3, extras=False), about, "make bench", tmp_path)
        arguments = ("bench", "--compare", "--device", "cpu", "--results", tmp_path)

        code, out, err = zoo(*arguments)
        assert code == 0
        assert [line.partition(": ours, ")[0] for line in out.splitlines()] == ["ok"] * 3
        assert "SLOWER" not in err

        slow()
        code, out, err = zoo(*arguments)
        assert code == 3
        assert len(out.splitlines()) == 3
        for kind in ("both", "rows", "self"):
            assert f"SLOWER: ours, {kind} 16x8 fp32 forward+backward: " in err
        assert err.count(f" at commit {bench.commit()}\n") == 3

    def test_threads_are_as_they_were(self, tiny, clock, tmp_path):
        """Even where the baseline turns out to lack a case."""
        before = torch.get_num_threads()
        store([record(Case(4, 4))], machine("cpu"), "", tmp_path)
        try:
            torch.set_num_threads(2)
            with pytest.raises(ZooError, match="the baseline of this machine has no ours, both 16x8"):
                bench.bench("cpu", compared_with=tmp_path)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)
