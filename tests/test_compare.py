"""Studies at tiny size: which trials there are, going on where one stopped, what fails, and the numbers of the table."""

import json
import logging
import re
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import zoo
from zoo import cli
from zoo.compare import Cell, compare, markdown, plan
from zoo.compare import _metric as metric
from zoo.metric import Key, Metric
from zoo.objectives.pair_infonce import PairInfonce
from zoo.recipe import load_recipe
from zoo.study import Result, _Clock, _died, perform_all, result, states
from zoo.trials import read_grid, trials

TINY = {
    "model": {
        "name": "notellm2",
        "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 4, "vocab_size": 1024},
        "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "image_size": 16},
        "connector": {"name": "attention_pool", "num_queries": 2},
        "fusion": ["micl", "gated_late"],
        "dim": 16,
        "language": "en",
        "content_length": 20,
    },
    "data": {"name": "planted_notes", "notes": 300, "users": 300, "image_size": 16},
    "objective": "pair_infonce",
    "run": {"steps": 2, "batch_size": 8, "log_every": 1, "device": "cpu"},
    "evaluate": {"protocols": ["multi"], "k": [5, 50], "main": {"protocol": "multi", "k": 5}, "bootstrap": 20, "inputs": ["both", "text"]},
    "baselines": {"bm25": "bm25", "base": {"model.fusion": "early"}},
    "out": "runs/tiny",
}
MAIN = Key("multi", "all", "both", 5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of a recipe, an arm and word overlap, two seeds each."""
    folder = tmp_path_factory.mktemp("study") / "out"
    return compare([TINY], seeds=2, arms=["all"], out=folder)


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished.folder, tmp_path / "out"))


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a trial was trained")

    monkeypatch.setattr("zoo.study.train_and_measure", refuse)


def names(found):
    return [trial.title for trial in found]


def of(study, cell):
    return next(c for c in study.numbers["cells"] if c["cell"] == cell)


def found_in(cell, key=MAIN):
    return next(m for m in cell["metrics"] if (m["protocol"], m["subset"], m["input"], m["k"]) == key)


class TestTrials:
    def test_cells_and_seeds(self, tmp_path):
        found = trials([TINY], "run.steps=3", out=tmp_path, seeds=2, grid={"objective.alpha": [1, 9]}, arms=["base", "bm25"])
        assert names(found) == [
            "tiny, objective.alpha=1, seed 0",
            "tiny, objective.alpha=1, seed 1",
            "tiny, objective.alpha=9, seed 0",
            "tiny, objective.alpha=9, seed 1",
            "tiny, bm25",  # word overlap knows neither seeds nor the objective
            "tiny, base, objective.alpha=1, seed 0",
            "tiny, base, objective.alpha=1, seed 1",
            "tiny, base, objective.alpha=9, seed 0",
            "tiny, base, objective.alpha=9, seed 1",
        ]
        last = found[-1].recipe
        assert (last.objective["alpha"], last.model["fusion"], last.seed, last.run.steps) == (9, "early", 1, 3)
        assert last.out == tmp_path / "tiny, base, objective.alpha=9" / "seed_1"

    def test_the_grid_goes_over_what_an_arm_says(self, tmp_path):
        found = trials([TINY], out=tmp_path, seeds=1, grid={"model.fusion": ["text_only", ["micl"]]}, arms=["base"])
        assert [t.recipe.model["fusion"] for t in found] == ["text_only", ["micl"]] * 2
        assert found[1].recipe.out.parent.name == 'tiny, model.fusion=["micl"]'.replace('"', "_")

    def test_a_classic_baseline_follows_a_grid_over_the_data(self, tmp_path):
        found = trials([TINY], out=tmp_path, seeds=3, grid={"data.notes": [200, 300]}, arms=["bm25"])
        assert names(found)[-2:] == ["tiny, bm25, data.notes=200", "tiny, bm25, data.notes=300"]

    def test_files_are_called_by_their_name(self, tmp_path):
        for name in ("one", "two"):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(TINY))
        found = trials([tmp_path / "one.yaml", str(tmp_path / "two.yaml")], out=tmp_path, seeds=1)
        assert names(found) == ["one, seed 0", "two, seed 0"]

    def test_files_of_one_name_are_called_by_their_folders_too(self, tmp_path):
        for name in ("one/emoji", "two/emoji"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(TINY))
        found = trials([tmp_path / "one/emoji.yaml", str(tmp_path / "two/emoji.yaml"), TINY], out=tmp_path / "out", seeds=1)
        assert names(found) == ["one/emoji, seed 0", "two/emoji, seed 0", "tiny, seed 0"]
        assert [t.recipe.out.parent.name for t in found] == ["one_emoji", "two_emoji", "tiny"]

    def test_the_study_of_pictures_and_texts_can_be_planned(self, tmp_path, monkeypatch):
        spec = spec_from_file_location("study_of_pictures", Path(__file__).parents[1] / "studies/image_text/study.py")
        study = module_from_spec(spec)
        spec.loader.exec_module(study)
        planned = {}

        def planning(recipes, *overrides, seeds, jobs, data_root, out, against=None, **more):
            found = trials(recipes, *overrides, out=tmp_path / out, seeds=seeds, **more)
            assert against is None or against in {t.cell for t in found}
            planned[out.name] = names(found)
            raise KeyboardInterrupt

        monkeypatch.setattr(study, "compare", planning)
        for part in (study.table, study.momentum):
            with pytest.raises(KeyboardInterrupt):
                part(SimpleNamespace(steps=2, seeds=1, jobs=1, data=tmp_path))
        assert planned["table"] == [f"{name}, seed 0" for name in study.TABLE]
        assert len(planned["momentum"]) >= 6

    def test_a_grid_is_read_as_yaml(self):
        assert read_grid(["a.b=1,1e-4,true", "c=early,[micl, gated_late]"]) == {
            "a.b": [1, 1e-4, True],
            "c": ["early", ["micl", "gated_late"]],
        }
        with pytest.raises(zoo.ZooError) as refused:
            read_grid(["a", "b=[1", "c=1", "c=2"])
        assert "grid 'a': write KEY=VALUE,VALUE" in str(refused.value)
        assert "grid 'b=[1'" in str(refused.value)
        assert "grid c: it stands there twice: write all of its values into one" in str(refused.value)

    def test_all_faults_at_once_and_before_anything(self, tmp_path):
        other = {**TINY, "evaluate": {**TINY["evaluate"], "k": [5, 6, 7]}, "out": "runs/other"}
        for arguments, says in (
            (
                {"overrides": ["seed=3", "out=x"]},
                ["seed: a study sets it by itself: write --seeds N", "out: a study sets it by itself: write --out runs/foo"],
            ),
            (
                {"grid": {"evaluate.split": ["val"], "run.steps": []}},
                ["grid evaluate.split: evaluate is the same for all", "grid run.steps: it has no value"],
            ),
            (
                {"grid": {"model.visual_tokens": [8, 16]}},
                ["model.visual_tokens=8", "no keyword named 'visual_tokens'", "model.visual_tokens=16"],
            ),
            ({"grid": {"run.batch_size": [8, 0, -1]}}, ["run.batch_size=0", "run.batch_size=-1"]),
            ({"grid": {"run.steps": [3, 3]}}, ["cells 'tiny, run.steps=3' and 'tiny, run.steps=3' would share the folder"]),
            ({"arms": ["bas"]}, ["no arm of these recipes named 'bas'; did you mean 'base'?"]),
            ({"recipes": [TINY, other]}, ["other: its 'evaluate' is not that of tiny, and cells answer the same questions"]),
            ({"recipes": [TINY, TINY]}, ["two recipes of this study are called 'tiny'"]),
            ({"recipes": []}, ["a study needs a recipe: name at least one"]),
            ({"seeds": 0}, ["seeds: 0 is none: write 1 or more"]),
            ({"against": "tinny"}, ["against: no cell of this study named 'tinny'; did you mean 'tiny'?"]),
            ({"jobs": 0}, ["jobs: 0 is none: write 1 or more"]),
            ({"overrides": ["evaluate.split=tset"]}, ["tiny: no split named 'tset'; did you mean 'test'?"]),
        ):
            keywords = {"recipes": [TINY], "overrides": [], **arguments}
            with pytest.raises(zoo.ZooError) as refused:
                compare(keywords.pop("recipes"), *keywords.pop("overrides"), out=tmp_path / "out", **keywords)
            assert all(part in str(refused.value) for part in says), (says, str(refused.value))
            assert not (tmp_path / "out").exists(), says


class TestResults:
    def test_every_trial_is_a_run_folder_with_its_result(self, finished):
        folders = sorted(p.parent.relative_to(finished.folder).as_posix() for p in finished.folder.rglob("result.json"))
        assert folders == [f"tiny, base/seed_{s}" for s in (0, 1)] + ["tiny, bm25/seed_0"] + [f"tiny/seed_{s}" for s in (0, 1)]
        there = json.loads((finished.folder / "tiny/seed_1/result.json").read_text())
        assert (there["state"], there["cell"], there["seed"]) == ("done", "tiny", 1)
        assert {"torch", "threads", "commit"} <= there["machine"].keys()
        assert there["seconds"] > 0 < there["parameters"]
        assert len(there["recipe_sha256"]) == len(there["identity"]["data"]) == 64
        assert zoo.load(finished.folder / "tiny/seed_1").trained

    def test_a_trial_is_measured_as_evaluate_measures_it(self, finished):
        folder = finished.folder / "tiny, base/seed_1"
        expected = [m.record() for m in zoo.evaluate(folder)]
        assert json.loads((folder / "result.json").read_text())["records"] == expected
        trial = next(t for t in trials([TINY], out=finished.folder, seeds=2, arms=["all"]) if t.recipe.out == folder)
        assert [m.record() for m in result(trial).metrics] == expected
        assert all(m.hits.mean() == pytest.approx(m.recall, abs=1e-12) for m in result(trial).metrics)

    def test_mean_and_spread(self, finished):
        cell = found_in(of(finished, "tiny, base"))
        metrics = [m for seed in (0, 1) for m in zoo.evaluate(finished.folder / f"tiny, base/seed_{seed}")]
        recalls = [m.recall for m in metrics if (m.protocol, m.subset, m.input, m.k) == MAIN]
        assert list(cell["recall"].values()) == recalls
        assert (cell["n"], cell["mean"], cell["std"]) == (2, np.mean(recalls), np.std(recalls, ddof=1))

    def test_the_files(self, finished):
        written = json.loads((finished.folder / "compare.json").read_text())
        assert written == json.loads(json.dumps(finished.numbers))
        assert (finished.folder / "compare.md").read_text() == finished.table
        assert written["reference"] == "tiny"
        assert [c["cell"] for c in written["cells"]] == ["tiny", "tiny, bm25", "tiny, base"]
        assert written["command"].startswith("zoo compare MAPPING --seeds 2 --arms all --against tiny --out ")

    def test_other_data_is_not_compared_query_by_query(self, copy):
        study = compare([TINY], seeds=1, grid={"data.seed": [0, 1]}, out=copy / "seeds")
        assert study.numbers["cells"][1]["metrics"]
        assert all(m["difference"] is None for m in study.numbers["cells"][1]["metrics"])

    def test_word_overlap_is_compared_with_the_mean_of_the_seeds(self, finished):
        mine, other = found_in(of(finished, "tiny, bm25")), found_in(of(finished, "tiny"))
        assert (mine["n"], mine["std"]) == (1, None)
        assert mine["difference"]["mean"] == pytest.approx(mine["mean"] - other["mean"], abs=1e-12)
        assert other["difference"] is None

    def test_a_difference_is_that_of_the_means(self, finished):
        """At every k, on every subset: what was kept of each query belongs to it."""
        reference = {(m["subset"], m["input"], m["k"]): m["mean"] for m in of(finished, "tiny")["metrics"]}
        metrics = of(finished, "tiny, base")["metrics"]
        assert len(metrics) == 12
        for m in metrics:
            assert m["difference"]["mean"] == pytest.approx(m["mean"] - reference[m["subset"], m["input"], m["k"]], abs=1e-12), m

    def test_the_table(self, finished):
        lines = finished.table.splitlines()
        assert lines[0] == "# Recall@5, multi, split test; mean ± standard deviation over n seeds"
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("| tiny")]
        assert [row[0] for row in rows[:3]] == ["tiny", "tiny, bm25", "tiny, base"]
        assert rows[0][2] == f"{found_in(of(finished, 'tiny'))['mean']:.3f} ± {found_in(of(finished, 'tiny'))['std']:.3f}"
        assert "## multi, recall@5" in lines
        heads = [line for line in lines if line.startswith("| cell") and "short query" in line]
        assert [c.strip() for c in heads[0].strip("|").split("|")] == ["cell", "shown", "all", "short query", "short target"]
        cells = ("tiny", "tiny, bm25", "tiny, base")
        both = [(cell, shown) for cell in cells for shown in ("both", "text") if "bm25" not in cell or shown == "both"]
        assert [(row[0], row[1]) for row in rows[3:]] == both * 2  # at 5 and at 50

    def test_a_grid_on_the_test_split_is_told_what_it_is_not_for(self, finished):
        assert "picked on the test split: pick with evaluate.split=val" in markdown({**finished.numbers, "grid": True})
        assert "picked on the test split" not in markdown({**finished.numbers, "grid": True, "split": "val"})

    def test_a_budget_that_was_missed_is_marked(self, copy, no_training):
        over = compare([TINY], seeds=2, out=copy, budget_seconds=0.0)
        assert "over the budget of 0 s" in over.table
        assert "over the budget" not in compare([TINY], seeds=2, out=copy, budget_seconds=1e6).table

    def test_cells_of_different_software_are_marked(self, copy, no_training):
        def written_by(commit, folder):
            path = copy / folder / "result.json"
            there = json.loads(path.read_text())
            path.write_text(json.dumps(there | {"machine": there["machine"] | {"commit": commit}}))

        for folder in ("tiny/seed_0", "tiny/seed_1", "tiny, base/seed_0", "tiny, base/seed_1"):
            written_by("1" * 40, folder)
        same = compare([TINY], seeds=2, arms=["base"], out=copy)
        assert "commit" not in same.table
        written_by("2" * 40 + "-dirty", "tiny, base/seed_1")
        rows = [line for line in compare([TINY], seeds=2, arms=["base"], out=copy).table.splitlines() if line.startswith("| tiny")]
        remarks = [row.split("|")[-2].strip() for row in rows[:2]]
        assert remarks == ["of commit 1111111", "of commits 1111111, 2222222-dirty"]


class TestGoingOn:
    def test_a_finished_study_is_only_read(self, finished, copy, no_training):
        again = compare([TINY], seeds=2, arms=["all"], out=copy)
        assert again.numbers["cells"] == finished.numbers["cells"]

    def test_more_seeds_train_only_those(self, copy, caplog):
        with caplog.at_level(logging.INFO, "zoo.study"):
            study = compare([TINY], seeds=3, out=copy)
        assert "2 of 3 trials are done already" in caplog.messages
        assert [m for m in caplog.messages if m.startswith("3 of 3")] == ["3 of 3: tiny, seed 2"]
        assert found_in(of(study, "tiny"))["n"] == 3

    def test_what_was_interrupted_goes_on_from_its_checkpoint(self, finished, tmp_path, monkeypatch):
        from zoo.log import Log

        write = Log.write

        def interrupted(self, position, values):
            write(self, position, values)
            if position.step == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(Log, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare([TINY], "run.save_every=1", seeds=1, out=tmp_path / "out")
        monkeypatch.undo()
        assert plan([TINY], "run.save_every=1", seeds=1, out=tmp_path / "out").startswith("begun  tiny, seed 0\n")
        compare([TINY], "run.save_every=1", seeds=1, out=tmp_path / "out")
        lines = (tmp_path / "out/tiny/seed_0/log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
        weights = [(folder / "tiny/seed_0/model.safetensors").read_bytes() for folder in (tmp_path / "out", finished.folder)]
        assert weights[0] == weights[1]

    def test_other_questions_are_asked_without_training(self, copy):
        weights = (copy / "tiny/seed_0/model.safetensors").read_bytes()
        other = ["evaluate.k=[4, 5]"]
        assert plan([TINY], *other, seeds=1, out=copy).startswith("begun  tiny, seed 0\n")
        study = compare([TINY], *other, seeds=1, out=copy)
        assert found_in(of(study, "tiny"), ("multi", "all", "both", 4))["n"] == 1
        assert (copy / "tiny/seed_0/model.safetensors").read_bytes() == weights

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])], ids=["missing", "cut"])
    def test_hits_that_cannot_be_read_are_measured_again(self, finished, copy, caplog, damage):
        weights = (copy / "tiny/seed_0/model.safetensors").read_bytes()
        damage(copy / "tiny/seed_0/hits.safetensors")
        assert plan([TINY], seeds=2, out=copy).startswith("begun  tiny, seed 0\ndone   tiny, seed 1\n")
        says = [m for m in caplog.messages if m.startswith("tiny, seed 0 is measured again: its hits.safetensors is missing or damaged (")]
        assert len(says) == 1
        again = compare([TINY], seeds=2, out=copy)
        assert of(again, "tiny")["metrics"] == of(finished, "tiny")["metrics"]
        assert (copy / "tiny/seed_0/model.safetensors").read_bytes() == weights

    def test_folders_of_another_study_are_refused_all_at_once(self, copy, no_training):
        with pytest.raises(zoo.ZooError) as refused:
            compare([TINY], "optimizer.lr=1e-5", seeds=2, out=copy)
        assert str(refused.value).count("optimizer.lr: 0.0001 there, 1e-05 here") == 2
        with pytest.raises(zoo.ZooError, match=r"belongs to another run:\n  data: "):
            states(trials([TINY], out=copy, seeds=1), {json.dumps(load_recipe(TINY).data, sort_keys=True): Fingerprinted("other")})

    def test_fresh_trains_again(self, copy):
        compare([TINY], "optimizer.lr=1e-5", seeds=1, out=copy, fresh=True)
        assert json.loads((copy / "tiny/seed_0/result.json").read_text())["identity"]["recipe"]["optimizer"]["lr"] == 1e-5

    def test_plan(self, copy, no_training):
        lines = plan([TINY], seeds=3, arms=["bm25"], out=copy, against="tiny, bm25").splitlines()
        assert lines == [
            "done   tiny, seed 0",
            "done   tiny, seed 1",
            "new    tiny, seed 2",
            "done   tiny, bm25",
            "2 cells, 4 trials, 1 of them to do; differences are from 'tiny, bm25'",
        ]

    def test_the_time_that_is_left(self, caplog, monkeypatch, tmp_path):
        found = trials([TINY], out=tmp_path, seeds=3)
        now = iter([0.0, 120.0, 120.0, 180.0])
        monkeypatch.setattr("zoo.study.time.perf_counter", lambda: next(now))
        clock = _Clock(4, 1, 1)
        with caplog.at_level(logging.INFO, "zoo.study"):
            clock.begins(found[0])
            clock.ends(found[0])
            clock.begins(found[1])
        assert caplog.messages == ["2 of 4: tiny, seed 0", "3 of 4: tiny, seed 1; about 4.0 min left"]


class Fingerprinted:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint


class TestFailures:
    @pytest.fixture
    def diverges(self, monkeypatch):
        """An objective of weight 9 gives no number; one of weight 1 does."""
        forward = PairInfonce.forward

        def poisoned(self, model, batch):
            loss = forward(self, model, batch)
            return loss._replace(total=loss.total * float("nan")) if self.alpha == 9 else loss

        monkeypatch.setattr(PairInfonce, "forward", poisoned)

    def test_one_that_diverges_is_written_down_and_the_rest_goes_on(self, tmp_path, diverges, monkeypatch, caplog):
        asked = {"seeds": 1, "grid": {"objective.alpha": [9, 1]}, "out": tmp_path / "out"}
        study = compare([TINY], **asked)
        assert len(study.failed) == 1
        assert study.failed[0].startswith("tiny, objective.alpha=9, seed 0 failed: the loss is nan in step 1")
        broken, whole = study.numbers["cells"]
        assert (broken["metrics"], list(broken["failed"])) == ([], [0])
        assert found_in(whole)["n"] == 1
        assert found_in(whole)["difference"] is None  # from a reference that has no numbers
        assert "seed 0 failed" in study.table
        assert "tiny, objective.alpha=9 has no result, so there are no differences: name another cell with --against." in study.table
        assert plan([TINY], **asked).startswith("failed tiny, objective.alpha=9, seed 0\n")
        monkeypatch.undo()
        assert compare([TINY], **asked).failed == []  # it is tried again

    def test_a_process_that_died(self, copy):
        trial = trials([TINY], out=copy, seeds=1)[0]
        _died(trial, "digest", -9)
        came = result(trial)
        assert (came.state, came.data) == ("failed", "digest")
        assert came.message.startswith("its process ended with exit code -9: run the same command again")

    @pytest.mark.slow
    def test_processes_of_their_own_give_the_same(self, finished, tmp_path):
        study = compare([TINY], seeds=2, out=tmp_path / "out", jobs=2)
        assert study.failed == []
        assert of(study, "tiny")["metrics"] == of(finished, "tiny")["metrics"]


def hits(values, subset="all"):
    values = np.array(values, dtype=float)
    return Metric("multi", subset, "both", 5, float(values.mean()), 0.0, 1.0, np.arange(len(values)), values)


def cell(name, by_seed, classic="", questions="same"):
    asked = {"multi/all": questions}
    return Cell(name, classic, {seed: Result("done", "", [found], 1.0, 1, "", "", asked, {}, {}) for seed, found in by_seed.items()})


class TestDifference:
    def test_queries_are_resampled_and_seeds_kept_together(self):
        mine = cell("a", {0: hits([1, 1, 0, 0]), 1: hits([1, 0, 1, 0])})
        other = cell("b", {0: hits([0, 1, 0, 0]), 1: hits([1, 0, 0, 0])})
        found = metric(MAIN, mine, other)["difference"]
        pooled = np.array([1, 0.5, 0.5, 0]) - np.array([0.5, 0.5, 0, 0])
        drawn = np.random.default_rng(0).integers(4, size=(1000, 4))
        low, high = np.percentile(pooled[drawn].mean(1), [2.5, 97.5])
        assert (found["mean"], found["low"], found["high"]) == pytest.approx((pooled.mean(), low, high), abs=1e-12)
        assert (found["seeds"], found["outcome"]) == ([0, 1], "UNDECIDED")

    def test_only_seeds_that_both_have(self):
        found = metric(
            MAIN, cell("a", {0: hits([1, 1, 1, 1]), 1: hits([1, 0, 0, 0])}), cell("b", {1: hits([0, 0, 0, 0]), 2: hits([1, 1, 1, 1])})
        )
        assert (found["n"], found["mean"]) == (2, 0.625)
        assert (found["difference"]["mean"], found["difference"]["seeds"]) == (0.25, [1])
        assert metric(MAIN, cell("a", {0: hits([1, 1])}), cell("b", {1: hits([1, 1])}))["difference"] is None

    def test_a_classic_reference_meets_every_seed(self):
        mine = cell("a", {0: hits([1, 1, 1, 1]), 1: hits([1, 0, 0, 0])})
        found = metric(MAIN, mine, cell("bm25", {0: hits([0, 0, 0, 0])}, "bm25"))
        assert found["difference"]["mean"] == 0.625

    def test_other_questions_are_no_pairs(self):
        assert metric(MAIN, cell("a", {0: hits([1, 1])}), cell("b", {0: hits([1, 1])}, questions="other"))["difference"] is None
        assert metric(MAIN, cell("a", {0: hits([1, 1])}), cell("b", {0: hits([1, 1], subset="short_query")}))["difference"] is None


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call ``zoo`` as the console script does: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_DATA", raising=False)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    level = logging.getLogger("zoo").level
    yield call
    logging.getLogger("zoo").setLevel(level)


class TestCommand:
    def test_a_finished_study_prints_its_table(self, call, copy, no_training):
        code, out, _ = call("compare", "tiny.yaml", "--seeds", 2, "--arms", "base, bm25", "--out", copy, "--against", "tiny, base")
        assert code == 0
        assert "Difference: from tiny, base, paired over queries" in out
        assert re.search(r"\| tiny +\|.* [0-2] of 2 +\|", out)
        assert out.rstrip("\n") == (copy / "compare.md").read_text().rstrip("\n")

    def test_a_failed_trial_is_exit_code_one(self, call, copy, monkeypatch):
        def fails(*_, **__):
            raise zoo.errors.Failure("the loss is nan")

        monkeypatch.setattr("zoo.study.train_and_measure", fails)
        code, out, err = call("compare", "tiny.yaml", "--seeds", 3, "--out", copy)
        assert code == 1
        assert "tiny, seed 2 failed: the loss is nan" in err
        assert "| tiny | 2 " in out

    def test_faults_are_exit_code_two(self, call):
        for arguments, says in (
            (["run.steps=1"], "compare needs a recipe"),
            (["tiny.yaml", "--grid", "a"], "grid 'a': write KEY=VALUE,VALUE"),
            (["tiny.yaml", "--grid", "run.stepz=1,2", "--dry-run"], "did you mean 'steps'?"),
        ):
            code, out, err = call("compare", *arguments)
            assert (code, out) == (2, "")
            assert says in err
        assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]

    @pytest.mark.parametrize(
        "arguments, says",
        [
            (["notellm2/retail", "--arms", "base,+mICL,+late,only late"], "5 cells, 15 trials, 15 of them to do"),
            (["notellm2/retail", "notellm2/retail_masked", "--arms", "all"], "18 cells, 46 trials, 46 of them to do"),
            (["notellm2/retail_masked", "--grid", "objective.alpha=1,3,9,19"], "4 cells, 12 trials, 12 of them to do"),
            (["notellm2/retail_masked", "--grid", "model.connector.num_queries=8,16,32,48"], "4 cells, 12 trials, 12 of them to do"),
        ],
    )
    def test_the_studies_of_the_retail_recipes_can_be_planned(self, call, arguments, says):
        code, out, _ = call("compare", *arguments, "--dry-run")
        assert code == 0
        assert says in out
        assert not Path("runs").exists()


def test_nothing_to_do_needs_no_data(finished):
    perform_all([], {})
