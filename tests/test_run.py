"""A whole run from Python: arms, what each is measured on, verdict, floors, and what lies in the folder afterwards."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from accelerate.utils import set_seed

import zoo
from zoo.data.planted_notes import plant
from zoo.embed import embed_notes, search_notes
from zoo.evaluate.retrieval import embedding_scorer, measure
from zoo.recipe import load_recipe
from zoo.run import Shown, embed, load_data, missed_floors

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
    "evaluate": {"k": [5, 10], "bootstrap": 20, "examples": 2},
}
BASELINES = {
    "bm25": "bm25",
    "popularity": "popularity",
    "text only": {"model.fusion": "text_only"},
    "image only": {"model.fusion": ["early", "gated_late"], "data.inputs": ["image"]},
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return zoo.run(TINY, baselines=BASELINES, out=folder, floor={"recall@10": 1.0, "recall@5": 0.0})


@pytest.fixture(scope="module")
def data():
    return load_data(load_recipe(TINY))


def records(outcome, arm):
    return outcome.metrics["arms"][arm]["records"]


class TestOutcome:
    def test_the_folder(self, outcome):
        here = {path.name for path in outcome.folder.iterdir()}
        assert {"recipe.yaml", "model.json", "model.safetensors", "log.jsonl", "metrics.json", "examples.json", "report.html"} <= here
        assert {path.name for path in (outcome.folder / "arms").iterdir()} == {"text only", "image only"}

    def test_metrics(self, outcome):
        metrics = json.loads((outcome.folder / "metrics.json").read_text())
        assert metrics == json.loads(json.dumps(outcome.metrics))
        assert list(metrics["arms"]) == ["tiny", *BASELINES]
        assert metrics["main"] == {"arm": "tiny", "protocol": "one_target", "subset": "all", "input": "both", "k": 10}
        assert metrics["data"]["notes"] == 300
        assert {"torch", "threads", "processor", "seed"} <= metrics["machine"].keys()
        assert metrics["verdict"] == outcome.verdict
        assert {c["baseline"] for c in metrics["comparisons"]} == set(BASELINES)
        assert metrics["arms"]["bm25"]["parameters"] == 0 < metrics["arms"]["tiny"]["parameters"]

    def test_every_protocol_subset_input_and_k_is_there_once(self, outcome):
        keys = [(r["protocol"], r["subset"], r["input"], r["k"]) for r in records(outcome, "tiny")]
        assert len(keys) == len(set(keys))
        assert {key[0] for key in keys} == {"one_target", "multi"}
        assert {key[2] for key in keys} == {"both", "text", "image"}
        assert {key[3] for key in keys} == {5, 10}
        assert all(0 <= r["low"] <= r["recall"] <= r["high"] <= 1 for r in records(outcome, "tiny"))

    def test_the_verdict(self, outcome):
        state, recall, *_ = outcome.verdict.split(" | ")
        assert state.startswith("VERDICT: ")
        assert recall == f"recall@10={outcome.recall:.3f}"

    def test_floors(self, outcome):
        assert outcome.missed == [f"recall@10 is {outcome.recall:.3f}, below the floor 1.0"]

    def test_the_log_is_one_line_a_step(self, outcome):
        lines = [json.loads(line) for line in (outcome.folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]


class TestArms:
    def test_an_arm_is_measured_on_what_its_data_shows(self, outcome):
        model = zoo.load(outcome.folder / "arms/image only")
        recipe = load_recipe(outcome.folder / "arms/image only/recipe.yaml")
        seen = load_data(recipe)
        assert all("title" not in row for row in seen.notes)
        vectors = embed(model, seen.notes)
        expected = measure(embedding_scorer(vectors), seen, ks=[10], protocol="one_target", resamples=0)[0]
        found = next(
            r
            for r in records(outcome, "image only")
            if (r["protocol"], r["subset"], r["input"], r["k"]) == ("one_target", "all", "both", 10)
        )
        assert found["recall"] == pytest.approx(expected.recall, abs=0)
        assert expected.low == expected.recall == expected.high  # no resampling, no interval

    def test_an_input_of_which_a_model_sees_nothing_or_everything_has_no_metric(self, outcome):
        assert {r["input"] for r in records(outcome, "text only")} == {"both"}
        assert {r["input"] for r in records(outcome, "image only")} == {"both"}

    def test_all_arms_answer_the_same_queries(self, outcome):
        asked = {
            r["queries"]
            for arm in outcome.metrics["arms"]
            for r in records(outcome, arm)
            if (r["protocol"], r["subset"]) == ("multi", "all")
        }
        assert len(asked) == 1

    def test_a_second_call_does_not_train_again(self, outcome):
        weights = (outcome.folder / "model.safetensors").read_bytes()
        *lines, last = (outcome.folder / "log.jsonl").read_text().splitlines()
        log = "\n".join([*lines, json.dumps(json.loads(last) | {"seconds": 1234.5})]) + "\n"
        (outcome.folder / "log.jsonl").write_text(log)
        again = zoo.run(TINY, baselines=BASELINES, out=outcome.folder)
        assert again.metrics["arms"]["tiny"]["seconds"] == 1234.5  # of the training, not of this call
        assert (outcome.folder / "model.safetensors").read_bytes() == weights
        assert (outcome.folder / "log.jsonl").read_text() == log
        assert records(again, "tiny") == records(outcome, "tiny")
        assert records(again, "image only") == records(outcome, "image only")
        assert again.missed == []

    @pytest.mark.parametrize(
        "override, says",
        [
            ({"evaluate.split": "val"}, "baselines.other: it changes 'evaluate', and arms are compared on the same queries"),
            ({"data.seed": 7}, "baselines.other: its 'data' has other notes, pairs or candidates in split 'test'"),
        ],
    )
    def test_an_arm_that_answers_other_questions(self, tmp_path, override, says):
        with pytest.raises(zoo.ZooError, match=says):
            zoo.run(TINY, baselines={"other": override}, out=tmp_path / "run")
        assert list(tmp_path.iterdir()) == []

    def test_an_arm_with_the_name_of_the_run(self, tmp_path):
        with pytest.raises(zoo.ZooError, match="'bm25' is the name of the run folder, and so of the model itself; rename one"):
            zoo.run(TINY, baselines={"bm25": "bm25"}, out=tmp_path / "bm25")
        assert list(tmp_path.iterdir()) == []


class TestEvaluate:
    def test_a_folder_gives_what_the_run_gave(self, outcome, data):
        metrics = zoo.evaluate(outcome.folder, loaded=data)
        assert [m.record() for m in metrics] == records(outcome, "tiny")

    def test_a_model_needs_its_recipe(self, outcome, data):
        model = zoo.load(outcome.folder)
        with pytest.raises(zoo.ZooError, match=r"write|needs the recipe that names the data"):
            zoo.evaluate(model)
        metrics = zoo.evaluate(model, recipe=TINY, loaded=data, evaluate__inputs=["both"], evaluate__k=[10], evaluate__subsets=False)
        assert [(m.protocol, m.subset, m.input, m.k) for m in metrics] == [(p, "all", "both", 10) for p in ("one_target", "multi")]

    def test_floors_speak_of_the_headline(self, outcome, data):
        recipe = load_recipe(TINY, floor={"recall@5": 0.999})
        metrics = zoo.evaluate(outcome.folder, loaded=data)
        assert missed_floors(recipe, metrics)[0].startswith("recall@5 is 0.")
        assert missed_floors(load_recipe(TINY), metrics) == []

    @pytest.mark.parametrize(
        "override, says",
        [
            ({"model__fusion": "early"}, "no section to evaluate by named 'model'"),
            ({"evaluate__split": "tset"}, "no split named 'tset'"),
            ({"evaluate__k": [10, 4000], "floor": {}}, "k = 4000, but a query of one_target/all has"),
        ],
    )
    def test_questions_that_the_data_cannot_answer(self, outcome, data, override, says):
        with pytest.raises(zoo.ZooError, match=says):
            zoo.evaluate(outcome.folder, loaded=data, **override)

    def test_a_model_that_sees_nothing(self, outcome):
        with pytest.raises(zoo.ZooError, match="this model sees nothing of any item"):
            zoo.evaluate(outcome.folder / "arms/text only", data__inputs=["image"])

    def test_shown(self):
        rows = [{"id": 0, "title": "a", "topic": "b", "content": "c", "image": "d"}]
        assert Shown(rows, "both")[0] == rows[0]
        assert set(Shown(rows, "text")[0]) == {"id", "title", "topic", "content"}
        assert set(Shown(rows, "image")[0]) == {"id", "image"}

    def test_an_item_of_which_the_model_sees_nothing_has_the_zero_vector(self, outcome):
        vectors = embed(zoo.load(outcome.folder), [{"id": 0}, {"id": 1, "title": "shoes"}], batch_size=1)
        assert not vectors[0].any()
        assert np.linalg.norm(vectors[1]) == pytest.approx(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    planted = plant(notes=120, users=200, seed=0, language="english", short_share=0.2, image_size=16)
    (root / "mine/images").mkdir(parents=True)
    notes = planted.notes.to_pylist()
    for note in notes:
        image = note.pop("image")
        note["note_id"] = f"n{note['note_id']:03}"
        note["image"] = None if image is None else f"images/{note['note_id']}.png"
        if image is not None:
            (root / "mine" / note["image"]).write_bytes(image)
    clicks = [click | {"note_id": f"n{click['note_id']:03}"} for click in planted.clicks.to_pylist()]
    pa.csv.write_csv(pa.Table.from_pylist(notes), root / "mine/notes.csv")
    pa.csv.write_csv(pa.Table.from_pylist(clicks).drop(["split"]), root / "mine/clicks.csv")
    return root


class TestOwnNotes:
    """A user's folder in CSV, from the clicks to a search."""

    def test_end_to_end(self, root, tmp_path):
        data = {"name": "notes", "folder": "mine", "mine": {"low": 0, "window_days": None}, "val_from": 0.4, "test_from": 0.7}
        outcome = zoo.run(
            TINY, data=data, data_root=root, out=tmp_path / "mine", evaluate__protocols=["multi"], evaluate__main={"protocol": "multi"}
        )
        assert outcome.metrics["data"]["images"] > 100
        assert outcome.verdict.endswith("no baselines in this recipe")
        assert embed_notes(outcome.folder, tmp_path / "a.parquet", data_root=root) == 120
        assert embed_notes(outcome.folder, tmp_path / "b.parquet", notes=root / "mine") == 120
        by_data, by_folder = (search_notes(outcome.folder, tmp_path / f"{x}.parquet", {}, note="n007", k=3) for x in "ab")
        assert by_data == by_folder
        assert all(hit["note_id"].startswith("n") for hit in by_data)

    def test_vectors_of_an_arm_without_text_do_not_see_the_text(self, root, tmp_path, outcome):
        folder = outcome.folder / "arms/image only"
        embed_notes(folder, tmp_path / "a.parquet", notes=root / "mine")
        image = next((root / "mine/images").iterdir())
        hit = search_notes(folder, tmp_path / "a.parquet", {"image": image}, k=1)[0]
        assert hit["score"] == pytest.approx(1, abs=1e-5)
        assert Path(image).stem == hit["note_id"]


class TestUntrained:
    """run.steps: 0 measures a model as it was built: the row of a table that says what training is worth."""

    def test_nothing_moves(self, tmp_path):
        with pytest.warns(UserWarning, match="random weights that nothing was trained or loaded into"):
            outcome = zoo.run(TINY, run__steps=0, model__dim=None, out=tmp_path / "prompt", baselines={"bm25": "bm25"})
        torch.manual_seed(0)
        set_seed(0)
        fresh = zoo.build(**{**TINY["model"], "dim": None})
        kept = zoo.load(outcome.folder)
        assert all(torch.equal(kept.state_dict()[name], value) for name, value in fresh.state_dict().items())
        assert not kept.trained
        assert outcome.metrics["arms"]["prompt"]["parameters"] == 0
        assert outcome.metrics["arms"]["prompt"]["seconds"] == 0
        assert (outcome.folder / "report.html").is_file()
        with pytest.warns(UserWarning, match="random weights"):
            again = zoo.run(TINY, run__steps=0, model__dim=None, out=tmp_path / "prompt", baselines={"bm25": "bm25"})
        assert again.recall == outcome.recall
