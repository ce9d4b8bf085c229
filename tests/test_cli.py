"""The command line, end to end at tiny size: what each command prints, its exit codes, and what it says of bad input."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from zoo import cli
from zoo.data.planted_notes import plant
from zoo.log import Log

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "list",
    "info",
    "schema",
    "validate",
    "doctor",
    "fetch",
    "mine",
    "embed",
    "search",
    "zeroshot",
    "caption",
    "train",
    "run",
    "eval",
    "report",
    "compare",
    "diagnose",
    "export",
    "convert",
    "bench",
    "balance",
    "capfilt",
    "data",
)
TINY = {
    "model": {
        "name": "notellm2",
        "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 4, "vocab_size": 1024},
        "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "image_size": 16},
        "connector": {"name": "attention_pool", "num_queries": 2},
        "dim": 16,
        "language": "en",
        "content_length": 20,
    },
    "data": {"name": "planted_notes", "notes": 300, "users": 300, "image_size": 16},
    "objective": "pair_infonce",
    "run": {"steps": 2, "batch_size": 8, "log_every": 1, "device": "cpu"},
    "evaluate": {
        "protocols": ["multi"],
        "k": [5],
        "main": {"protocol": "multi", "k": 5},
        "bootstrap": 20,
        "examples": 2,
        "inputs": ["both"],
    },
    "out": "runs/tiny",
}


@pytest.fixture
def zoo(monkeypatch, capsys):
    """Call ``zoo`` with arguments, as the console script does: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code, out, err

    level = logging.getLogger("zoo").level
    yield call
    logging.getLogger("zoo").setLevel(level)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_DATA", raising=False)


def recipe(path=Path("tiny.yaml"), **sections):
    path.write_text(yaml.safe_dump(TINY | sections))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder that ``zoo run`` left, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    recipe(folder / "tiny.yaml", baselines={"bm25": "bm25"})
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "run", "tiny.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs/tiny", done


@pytest.fixture(scope="module")
def notes_folder(tmp_path_factory):
    """A notes data set in CSV, with its pictures as files."""
    folder = tmp_path_factory.mktemp("data") / "mine"
    planted = plant(notes=120, users=200, seed=0, language="english", short_share=0.2, image_size=16)
    write_csv(folder, planted.notes.to_pylist(), planted.clicks.to_pylist())
    return folder


def write_csv(folder, notes, clicks):
    (folder / "images").mkdir(parents=True)
    for note in notes:
        if (image := note.pop("image")) is not None:
            note["image"] = f"images/{note['note_id']}.png"
            (folder / note["image"]).write_bytes(image)
    for name, rows in (("notes", notes), ("clicks", clicks)):
        pa.csv.write_csv(pa.Table.from_pylist(rows), folder / f"{name}.csv")


@pytest.fixture
def csv(notes_folder, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(notes_folder, tmp_path / "data/mine"))


def own_data(**settings):
    return {"name": "notes", "folder": "mine", **settings}


class TestWords:
    def test_help_names_every_command(self, zoo):
        code, out, err = zoo("--help")
        assert (code, err) == (0, "")
        assert [line.split()[0] for line in out.partition("Commands:")[2].partition("Exit codes")[0].splitlines() if line.strip()] == list(
            COMMANDS
        )

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_of_every_command(self, zoo, command):
        code, out, _ = zoo(command, "--help")
        assert code == 0
        assert out.startswith(f"Usage: zoo {command}")

    @pytest.mark.parametrize("command", ["train", "run", "compare"])
    def test_help_says_that_a_run_goes_on(self, zoo, command):
        said = " ".join(zoo(command, "--help")[1].split())
        assert "Ctrl-C and SIGTERM end the step, save, and stop; the same command again goes on from there." in said

    def test_help_keeps_the_lines_of_an_example(self, zoo):
        assert "\n  zoo fetch --unpack all.tar             where there is none\n" in zoo("fetch", "--help")[1]

    def test_help_is_light(self):
        heavy = "{'torch', 'transformers', 'pydantic', 'numpy', 'duckdb'}"
        code = f"import sys, zoo.cli; assert not {heavy} & sys.modules.keys(), sys.modules.keys() & {heavy}"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

    def test_list(self, zoo):
        names = "albef beit_3 blip classifier clip coca dual_encoder meter mla nlvr2 notellm2 visual_tokenizer vlmo vqa"
        assert zoo("list") == (0, "".join(f"{name}\n" for name in names.split()), "")
        assert "gated_late\n" in zoo("list", "fusions")[1]
        assert "planted_notes\n" in zoo("list", "data")[1]
        assert "notellm2/retail\n" in zoo("list", "recipes")[1]

    def test_matrix(self, zoo):
        code, out, _ = zoo("list", "--matrix")
        assert code == 0
        assert ["micl", *10 * ["-"], "arrange", *3 * ["-"]] in [line.split() for line in out.splitlines()]
        assert "connectors of notellm2: attention_pool, identity, linear, mlp, qformer" in out

    def test_info(self, zoo):
        code, out, _ = zoo("info", "notellm2")
        assert code == 0
        assert "joints    arrange (early), combine, schedule (joint)\n" in out
        assert "  backbone: qwen\n" in out
        assert json.loads(zoo("info", "qformer", "--json")[1])["kind"] == "connector"

    def test_schema(self, zoo):
        code, out, _ = zoo("schema")
        assert code == 0
        assert zoo("schema", "--out", "schema.json")[1] == "schema.json\n"
        assert json.loads(out) == json.loads(Path("schema.json").read_text())


class TestUsage:
    @pytest.mark.parametrize(
        "arguments, says",
        [
            (["fly"], "No such command 'fly'"),
            (["list", "--colour"], "No such option: --colour"),
            (["train"], "Missing argument 'RECIPE'"),
            (["search", "run", "vectors.parquet", "--k", "0"], "'--k' / '--top': Input should be greater than or equal to 1"),
            (["validate", "demo", "--rows", "0"], "Invalid value for '--rows': Input should be greater than or equal to 2"),
            (["list", "fusion"], "no list named 'fusion'; did you mean 'fusions'? (have: backbones,"),
            (["info", "gated_lat"], "no part named 'gated_lat'; did you mean 'gated_late'?"),
            (["train", "notellm3"], "no such file, and no shipped recipe named 'notellm3'"),
            (["mine", "clicks.csv"], "no file clicks.csv: give a .parquet or .csv of clicks"),
            (["mine", "clicks.csv", "top"], "setting 'top': write key=value"),
            (["mine", "clicks.csv", "top=[", "low"], "setting 'top=[':1: column"),
            (["mine", "clicks.csv", "top=[", "low"], "setting 'low': write key=value"),
            (["mine", "clicks.csv", "tops=3"], "mine: tops: no keyword named 'tops'; did you mean 'top'?"),
            (["mine", "clicks.csv", "top=0", "low=x"], "mine: 2 faults"),
            (["report", "nowhere"], "nowhere holds no run: expected recipe.yaml, log.jsonl or metrics.json in it"),
            (["eval", "nowhere"], "no model in nowhere, which does not exist: a run folder has model.json"),
            (["embed", "nowhere"], "no model in nowhere"),
            (["search", "nowhere", "none.parquet", "--title", "x"], "no embeddings in none.parquet: write them with: zoo embed nowhere"),
        ],
    )
    def test_two_and_one_message(self, zoo, arguments, says):
        code, out, err = zoo(*arguments)
        assert (code, out) == (2, "")
        assert says in err
        assert list(Path().iterdir()) == []

    def test_a_folder_that_cannot_be_written_is_a_failure(self, zoo, finished):
        Path("file").write_text("")
        code, out, err = zoo("schema", "--out", "file/schema.json")
        assert (code, out) == (1, "")
        assert err.startswith("zoo: [Errno 17] File exists")


class TestRun:
    def test_results_on_standard_output_and_logs_on_standard_error(self, finished):
        _, done = finished
        lines = done.stdout.splitlines()
        assert lines[0].split() == ["arm", "protocol", "subset", "input", "k", "recall", "interval", "queries"]
        assert lines[-2] == "report: runs/tiny/report.html"
        assert lines[-1].startswith("VERDICT: ")
        assert "tiny: step 2/2  lr " in done.stderr
        assert "Traceback" not in done.stderr

    def test_eval(self, zoo, finished):
        code, out, _ = zoo("eval", finished[0])
        assert code == 0
        assert out.splitlines()[0].split() == ["protocol", "subset", "input", "k", "recall", "interval", "queries"]
        code, out, _ = zoo("eval", finished[0], "evaluate.split=val", "--json")
        assert code == 0
        assert {r["subset"] for r in json.loads(out)} >= {"all"}

    def test_eval_refuses_what_is_trained_in(self, zoo, finished):
        code, out, err = zoo("eval", finished[0], "model.fusion=early", "optimizer.lr=7", "evalute.split=val")
        assert (code, out) == (2, "")
        assert "override 'model.fusion': no section to evaluate by named 'model'" in err
        assert "(have: classify, data, evaluate, floor, retrieve, seed)" in err
        assert "override 'optimizer.lr': " in err
        assert "named 'evalute'; did you mean 'evaluate'?" in err

    def test_eval_agrees_with_run(self, zoo, finished):
        records = json.loads((finished[0] / "metrics.json").read_text())["arms"]["tiny"]["records"]
        assert json.loads(zoo("eval", finished[0], "--json")[1]) == records

    def test_a_missed_floor_is_three(self, zoo, finished):
        code, out, err = zoo("eval", finished[0], "floor={recall@5: 1.0}")
        assert code == 3
        assert "multi" in out
        assert err.startswith("recall@5 is 0.")
        assert err.endswith(", below the floor 1.0\n")

    def test_a_missed_floor_of_a_run_is_three_and_the_report_is_there(self, zoo):
        code, out, err = zoo("run", recipe(floor={"recall@5": 1.0}))
        assert code == 3
        assert "below the floor 1.0" in err
        assert out.splitlines()[-1].startswith("RECALL: recall@5=0.")
        assert Path("runs/tiny/report.html").is_file()

    def test_train(self, zoo):
        code, out, err = zoo("train", recipe(), "run.steps=1")
        assert (code, out) == (0, "runs/tiny\n")
        assert "tiny: step 1/1" in err
        assert zoo("train", "tiny.yaml", "run.steps=1")[:2] == (0, "runs/tiny\n")
        code, _, err = zoo("train", "tiny.yaml", "run.steps=1", "--fresh", "seed=1")
        assert code == 0
        assert "tiny: step 1/1" in err

    def test_report(self, zoo, finished):
        folder = Path(shutil.copytree(finished[0], "copy"))
        (folder / "report.html").unlink()
        assert zoo("report", "copy") == (0, "copy/report.html\n", "")
        assert (folder / "report.html").is_file()


class TestVectors:
    def test_embed_and_search(self, zoo, finished):
        assert zoo("embed", finished[0], "--out", "v.parquet")[:2] == (0, "300 vectors in v.parquet\n")
        table = pq.read_table("v.parquet")
        assert table.column_names == ["note_id", "vector"]
        vectors = np.stack(table["vector"].to_numpy())
        assert vectors.shape == (300, 16)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        code, out, _ = zoo("search", finished[0], "v.parquet", "--note", "7", "--k", "3", "--json")
        assert code == 0
        scores = vectors @ vectors[7]
        scores[7] = -2
        assert [hit["note_id"] for hit in json.loads(out)] == np.argsort(-scores)[:3].tolist()
        assert len(zoo("search", finished[0], "v.parquet", "--title", "garden", "--k", "4")[1].splitlines()) == 4

    def test_a_note_finds_itself_by_its_content(self, zoo, finished, notes_folder):
        assert zoo("embed", finished[0], notes_folder, "--out", "v.parquet")[:2] == (0, "120 vectors in v.parquet\n")
        code, out, _ = zoo("search", finished[0], "v.parquet", "--image", next((notes_folder / "images").iterdir()), "--k", "1", "--json")
        assert code == 0
        assert -1.001 <= json.loads(out)[0]["score"] <= 1.001

    def test_what_search_refuses(self, zoo, finished):
        pq.write_table(
            pa.table({"note_id": ["a", "b"], "vector": pa.FixedSizeListArray.from_arrays(pa.array([1.0, 0.0, 0.0, 1.0]), 2)}), "two.parquet"
        )
        pq.write_table(pa.table({"id": [1]}), "other.parquet")
        pq.write_table(pa.table({"note_id": ["a"], "vector": [[1.0]]}), "lists.parquet")
        Path("half.parquet").write_bytes(Path("two.parquet").read_bytes()[:50])
        for arguments, says in (
            (["two.parquet"], "search needs a new note (--title, --topic, --content, --image, --text) or the id"),
            (["two.parquet", "--note", "a", "--title", "x"], "one of the two"),
            (["two.parquet", "--note", "c"], "no note 'c' in two.parquet; its first ids are a, b"),
            (["two.parquet", "--title", "x"], "two.parquet holds vectors of width 2"),
            (["two.parquet", "--image", "gone.png"], "gone.png"),
            (["other.parquet", "--note", "a"], "zoo: other.parquet has no columns note_id, vector (it has: id)\n"),
            (["lists.parquet", "--note", "a"], "it was not written by zoo embed"),
            (["half.parquet", "--note", "a"], "half.parquet cannot be read as parquet"),
        ):
            code, out, err = zoo("search", finished[0], *arguments)
            assert (code, out) == (2, ""), says
            assert says in err
            assert err == says or not says.startswith("zoo:")


class TestData:
    def test_mine(self, zoo, notes_folder):
        code, out, _ = zoo("mine", notes_folder / "clicks.csv", "top=3", "low=0", "--split", "train", "--out", "p.parquet")
        assert code == 0
        assert json.loads(out)["pairs"] == len(pq.read_table("p.parquet")) > 0

    def test_the_folder_is_found_by_option_and_by_environment(self, zoo, csv, monkeypatch):
        recipe(data=own_data(mine={"low": 0}))
        code, _, err = zoo("train", "tiny.yaml")
        assert code == 2
        assert "the data set 'mine' is looked for in a folder of data folders, and none is given" in err
        assert "--data DIR or ZOO_DATA" in err
        assert zoo("train", "tiny.yaml", "--data", "data", "run.steps=1", "out=a")[0] == 0
        for command in ("diagnose", "eval", "embed"):
            code, _, err = zoo(command, "a")
            assert code == 2
            assert err.startswith(f"zoo: write: zoo {command} a --data DIR\nthe data set 'mine' is looked for")
            assert zoo(command, "a", "--data", "elsewhere")[2].startswith("zoo: no folder elsewhere/mine\n")
        monkeypatch.setenv("ZOO_DATA", str(csv.parent))
        assert zoo("train", "tiny.yaml", "run.steps=1", "out=b")[0] == 0
        code, _, err = zoo("train", "tiny.yaml", "--data", "elsewhere", "out=c")
        assert code == 2
        assert "no folder elsewhere/mine" in err
        assert not Path("c").exists()


class TestBadInput:
    """Each is said in one message, and nothing is written."""

    @pytest.mark.parametrize(
        "changes, says",
        [
            ({"model": "notellm3"}, "no model named 'notellm3'; did you mean 'notellm2'?"),
            ({"optimizer": {"learning_rate": 1}}, "no keyword named 'learning_rate'; did you mean 'lr'?"),
            ({"run": {"steps": "many", "batch_size": 0}}, "tiny.yaml: 2 faults"),
            ({"data": "planted_note"}, "no data named 'planted_note'; did you mean 'planted_notes'?"),
            ({"evaluate": {"k": [5], "main": {"protocol": "multi", "k": 10}}}, "10 is none of evaluate.k, [5]"),
            ({"model": {"name": "notellm2", "fusion": ["sum", "concat"]}}, "fusions 'sum' and 'concat' both fill the joint 'combine'"),
            ({"freeze": ["visoin"]}, "visoin"),
            ({"baselines": {"tiny": "bm25"}}, "'tiny' is the name of the run folder"),
            ({"run": {"batch_size": 100000}}, "do not fill one batch of 100000; write a smaller one"),
        ],
    )
    def test_of_the_recipe(self, zoo, changes, says):
        code, out, err = zoo("run", recipe(**changes))
        assert (code, out) == (2, "")
        assert says in err
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        "changes, says",
        [
            ({"split": "tset"}, "no split named 'tset'; did you mean 'test'?"),
            ({"k": [100000], "main": {"protocol": "multi", "k": 100000}}, "k = 100000, but a query of multi/all has 299 candidates"),
        ],
    )
    def test_of_the_evaluation_comes_before_the_training(self, zoo, changes, says):
        code, out, err = zoo("run", recipe(evaluate=TINY["evaluate"] | changes))
        assert (code, out) == (2, "")
        assert says in err
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        "text, says",
        [
            ("model: [", "tiny.yaml:1: column"),
            ("", "a recipe is a mapping with the keys"),
            ("model: notellm2\nmodel: notellm2\n", "written twice, on line 1 too"),
        ],
    )
    def test_of_the_yaml(self, zoo, text, says):
        Path("tiny.yaml").write_text(text)
        code, out, err = zoo("train", "tiny.yaml")
        assert (code, out) == (2, "")
        assert says in err

    def test_an_override_that_is_none(self, zoo):
        code, _, err = zoo("train", recipe(), "optimizer.lr", "run.stepz=3")
        assert code == 2
        assert "override 'optimizer.lr': write key=value" in err
        assert "override 'run.stepz=3': run.stepz: no keyword named 'stepz'; did you mean 'steps'?" in err

    @pytest.mark.parametrize(
        "breaks, says",
        [
            (lambda d: edit(d / "notes.csv", lambda t: t.replace("note_id", "id", 1)), "notes.csv: no column named 'note_id'"),
            (lambda d: edit(d / "clicks.csv", lambda t: t.replace("user_id", "who", 1)), "clicks.csv: no column named 'user_id'"),
            (lambda d: edit(d / "notes.csv", lambda t: t.splitlines()[0] + "\n"), "notes.csv: it has no rows"),
            (lambda d: edit(d / "clicks.csv", lambda t: t.splitlines()[0] + "\n"), "clicks.csv"),
            (
                lambda d: edit(d / "notes.csv", lambda t: t + t.splitlines()[5] + "\n"),
                "notes.csv: 1 note_ids stand there more than once, such as '4'",
            ),
            (lambda d: (d / "notes.csv").unlink(), "there is no notes.parquet or notes.csv; there is: clicks.csv, images"),
        ],
    )
    def test_of_the_data(self, zoo, csv, breaks, says):
        breaks(csv)
        code, out, err = zoo("run", recipe(data=own_data()), "--data", "data")
        assert (code, out) == (2, "")
        assert says in err
        assert not Path("runs").exists()

    def test_broken_images_are_counted_listed_and_absent(self, zoo, csv, caplog):
        broken = sorted((csv / "images").iterdir())[:2]
        broken[0].write_bytes(broken[0].read_bytes()[:60])
        broken[1].unlink()
        assert zoo("run", recipe(data=own_data(mine={"low": 0})), "--data", "data")[0] == 0
        cut, gone = (path.stem for path in broken)
        assert (
            f"1 images cannot be decoded, or have more than 67108864 pixels, and count as absent, those of notes {cut}" in caplog.messages
        )
        lost = f"1 images are not found, such as data/mine/images/{gone}.png, and count as absent, those of notes {gone}"
        assert lost in caplog.messages
        assert json.loads(Path("runs/tiny/metrics.json").read_text())["data"]["images_broken"] == 2

    def test_a_loss_that_is_no_number_is_a_failure(self, zoo, monkeypatch):
        from zoo.objectives.pair_infonce import PairInfonce

        forward = PairInfonce.forward

        def poisoned(self, model, batch):
            loss = forward(self, model, batch)
            return loss._replace(total=loss.total * torch.nan)

        monkeypatch.setattr(PairInfonce, "forward", poisoned)
        code, out, err = zoo("run", recipe())
        assert (code, out) == (1, "")
        assert err.startswith("zoo: the loss is nan in step 1 (epoch 0, batch 0;")
        assert "no step before it, so nothing is saved" in err
        assert not Path("runs/tiny/model.json").exists()
        assert not Path("runs/tiny/metrics.json").exists()

    def test_a_checkpoint_of_another_recipe(self, zoo, finished):
        shutil.copytree(finished[0], "runs/tiny")
        code, out, err = zoo("run", recipe(), "objective.alpha=3")
        assert (code, out) == (2, "")
        assert "objective" in err
        assert "--fresh" in err

    def test_a_truncated_checkpoint_is_a_failure(self, zoo, finished):
        shutil.copytree(finished[0], "runs/tiny")
        weights = next(Path("runs/tiny/checkpoints").glob("*/step.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
        code, out, err = zoo("train", recipe())
        assert (code, out) == (1, "")
        assert "is damaged: step.safetensors differs from what was written; remove" in err

    def test_a_truncated_model_is_a_failure(self, zoo, finished):
        folder = Path(shutil.copytree(finished[0], "copy"))
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
        code, out, err = zoo("embed", folder)
        assert (code, out) == (1, "")
        assert "model.safetensors is damaged" in err
        assert not Path("embeddings.parquet").exists()


def edit(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    "command, advice",
    [("train", "; run the same command again to go on from the last checkpoint"), ("eval", "")],
)
@pytest.mark.parametrize("number, code, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "terminated")])
def test_a_signal_outside_of_training_ends_any_command_with_its_code(zoo, monkeypatch, command, advice, number, code, word):
    def signalled(prog_name):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:  # what typer makes of it
            raise SystemExit(130) from None

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", signalled)
    assert zoo(command) == (code, "", f"zoo: {word}{advice}\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_during_an_evaluation(zoo, monkeypatch):
    monkeypatch.setattr(import_module("zoo.run"), "ask", lambda *_: signal.raise_signal(signal.SIGTERM))
    code, _, err = zoo("run", recipe())
    assert code == 75
    assert err.endswith("zoo: terminated; run the same command again to go on from the last checkpoint\n")


def test_a_signal_in_the_last_step_ends_the_run(zoo, monkeypatch):
    write = Log.write

    def last(self, position, values):
        write(self, position, values)
        if position.step == self.steps:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Log, "write", last)
    monkeypatch.setattr(import_module("zoo.run"), "ask", lambda *_: pytest.fail("it went on"))
    code, _, err = zoo("run", recipe())
    assert code == 75
    assert err.endswith("zoo: stopped after the last step, with the model in runs/tiny; run the same command again to go on from there\n")


def test_ctrl_c_in_a_step_says_what_is_saved(zoo, monkeypatch):
    write = Log.write

    def first(self, position, values):
        write(self, position, values)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Log, "write", first)
    code, _, err = zoo("train", recipe())
    assert code == 130
    assert err.endswith("zoo: stopped and saved after step 1; run the same command again to go on from there\n")
    code, _, err = zoo("report", "runs/tiny")
    assert (code, "training stopped at step 1 of 2" in Path("runs/tiny/report.html").read_text()) == (0, True)


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on():
    """Ctrl-C in the middle of the training: 130, no traceback, and the folder can be resumed."""
    recipe(run=TINY["run"] | {"steps": 100000, "save_every": 5})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    train = [sys.executable, "-m", "zoo", "train", "tiny.yaml"]
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite that runs in the background hands on that Ctrl-C is ignored
    with subprocess.Popen(train, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heeds) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(Path().glob("runs/tiny/checkpoints/step_*")):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert re.search(r"zoo: stopped and saved after step \d+; run the same command again to go on from there\n$", err)
