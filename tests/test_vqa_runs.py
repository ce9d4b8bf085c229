"""Questions about pictures from files to report: the answers of ten people are what is measured, and rare ones are no fault of the data."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import zoo
from zoo.answers import AnsweredData
from zoo.batches import targets_of
from zoo.card import card
from zoo.cli import app
from zoo.compare import compare
from zoo.errors import ZooError
from zoo.evaluate.classification import check, every_subset
from zoo.evaluate.vqa import People, accuracy
from zoo.metric import Key, measure_name
from zoo.questions import main_key, questions
from zoo.recipe import load_recipe
from zoo.registry import make
from zoo.sections import Classify
from zoo.types import LabelledData

COLOURS = ("red", "green", "blue")
ASKED = {"is it red": "yes/no", "what colour is it": "other", "how many": "number"}
LOOKS = {"name": "tiny_image", "dim": 24, "heads": 2, "layers": 1, "image_size": 16}
TINY = {
    "model": {"name": "vqa", "classes": 7, "base": {"name": "albef", "vision": LOOKS, "layers": 2, "dim": 8}},
    "data": {"name": "vqa_v2", "least": 3, "val": 0.2},
    "objective": "cross_entropy",
    "optimizer": {"lr": 4e-3},
    "run": {"steps": 3, "batch_size": 16, "log_every": 1, "log_gradients": True, "device": "cpu"},
    "classify": {"bootstrap": 20, "missing": [0.5]},
}
WHOLE = Key("answers", "all", "all", 1)


def people(n, asked):
    """What ten people say of picture n: two to all of them the truth, of every fifth picture what is true of no other."""
    colour = COLOURS[n % 3]
    usual = {"is it red": "yes" if colour == "red" else "no", "what colour is it": colour, "how many": "1"}[asked]
    if asked == "how many" and n % 5 == 0:
        usual = f"about {n}"
    other = {"yes": "no", "no": "yes", "red": "green", "1": "one"}.get(usual, "red")
    alone = 2 * (n % 5)  # of ten, how many agree with nobody
    return usual, ([usual] * (10 - alone) + [other, *(f"word {i}" for i in range(9))])[:10]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of data folders with VQA v2 in small: 45 pictures of one colour, three questions each."""
    place = tmp_path_factory.mktemp("data") / "vqa_v2"
    for part, numbers in (("train2014", range(30)), ("val2014", range(100, 115))):
        (place / part).mkdir(parents=True)
        questions, answered = [], []
        for n in numbers:
            Image.new("RGB", (16, 16), COLOURS[n % 3]).save(place / part / f"COCO_{part}_{n:012d}.jpg")
            for k, (text, kind) in enumerate(ASKED.items()):
                usual, said = people(n, text)
                number = {"question_id": 10 * n + k, "image_id": n}
                questions.append({**number, "question": text})
                answers = [{"answer": one, "answer_id": i + 1} for i, one in enumerate(said)]
                answered.append({**number, "multiple_choice_answer": usual, "answers": answers, "answer_type": kind})
        (place / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps({"questions": questions}))
        (place / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({"annotations": answered}))
    return place.parent


@pytest.fixture(scope="module")
def data(root):
    return make("data", TINY["data"], root)


@pytest.fixture(scope="module")
def outcome(root, tmp_path_factory):
    arms = {"blip": {"model.base": {"name": "blip", "vision": LOOKS, "layers": 1, "dim": 8}}}
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return zoo.run(TINY, baselines=arms, out=out, floor={"soft_accuracy": 1.0}, data_root=root)


def changed(root, folder, what, change):
    """The settings of the same pictures with questions or annotations of train2014 that were changed, in a folder of data folders."""
    place = folder / "vqa_v2"
    place.mkdir()
    for file in (root / "vqa_v2").glob("*.json"):
        shutil.copy(file, place)
    (file,) = place.glob(f"*train2014_{what}.json")
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    return {**TINY["data"], "images": str(root / "vqa_v2")}


def invoke(*words):
    return CliRunner().invoke(app, list(map(str, words)))


class TestData:
    def test_it_says_what_people_answered_and_which_class_stands_for_the_rest(self, data):
        assert isinstance(data, AnsweredData)
        assert isinstance(data, LabelledData)
        assert data.rest == ("(another answer)",)
        assert data.classes == (*data.candidates, *data.rest)
        assert len(data.classes) == 7

    def test_the_class_of_the_rest_needs_no_training_row(self, data):
        rest = data.classes.index(*data.rest)
        assert rest not in data.labels[data.split("train")]
        assert rest in data.labels[data.split("test")]
        check(data, Classify(missing=(0.5,)))

    def test_any_other_class_does(self, data, monkeypatch):
        monkeypatch.setattr(data, "classes", ("purple", *data.classes))
        monkeypatch.setattr(data, "labels", data.labels + 1)
        with pytest.raises(ZooError, match=r"classes without a training row: purple; leave them out"):
            check(data, Classify(missing=(0.5,)))

    @pytest.mark.parametrize(
        ("what", "change", "says"),
        [
            ("questions", {"image_id": "x"}, "have image_id 'x', which is no whole number"),
            ("questions", {"question_id": [1]}, r"have question_id \[1\], which is no whole number"),
            ("questions", {"question": None}, "have question None, which is no text"),
            ("annotations", {"answers": ["yes"] * 10}, r"have answers \['yes', 'yes'.*, and not those of two people or more"),
            ("annotations", {"answers": [{}, {}]}, r"have answers \[\{\}, \{\}\], and not those of two people or more, each \{answer"),
            ("annotations", {"answers": [{"answer": "yes"}]}, ".* not those of two people or more"),
            ("annotations", {"answers": []}, r"have answers \[\], and not those of two people or more"),
            ("annotations", {"answers": None}, "have answers None, which is no list"),
            ("annotations", {"multiple_choice_answer": None}, "have multiple_choice_answer None, which is no text"),
            ("annotations", {"answer_type": 3}, "have answer_type 3, which is no text"),
        ],
    )
    def test_entries_that_are_wrong(self, root, tmp_path, what, change, says):
        settings = changed(root, tmp_path, what, lambda tree: tree[what][2].update(change))
        with pytest.raises(ZooError, match=rf"train2014_{what}\.json: 1 of 90 {what}, such as number 2, {says}"):
            make("data", settings, tmp_path)


class TestPeople:
    def test_a_guess_is_as_right_as_the_challenge_says(self, data):
        rows = data.split("test")
        graded = People(data)
        for guess, name in enumerate(data.classes):
            found = graded.right(rows, np.full(len(rows), guess))
            wanted = accuracy([name] * len(rows), [data.answers[i] for i in rows])
            np.testing.assert_array_equal(found, wanted)
        half = graded.right(rows, data.labels[rows])
        assert 0 < half[half > 0].min() < 1  # or this would be plain accuracy

    def test_training_may_be_told_how_right_every_answer_is(self, data, root):
        rows = data.split("train")
        shares = data.shares(rows)
        assert (shares.shape, shares.dtype) == ((len(rows), len(data.classes)), np.float32)
        by_people = np.array([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1])  # as VLMo and BEiT-3 are told
        said = [[data.answers[i].count(name) for name in data.classes] for i in rows]
        np.testing.assert_allclose(shares, by_people[said], rtol=0, atol=1e-6)
        assert 0 < shares[shares > 0].min() < 1
        soft = make("data", {**TINY["data"], "soft": True}, root)
        assert torch.equal(targets_of(soft, rows), torch.from_numpy(shares))
        assert targets_of(data, rows).tolist() == data.labels[rows].tolist()
        assert soft.fingerprint != data.fingerprint

    def test_with_shares_a_question_counts_where_anybody_gave_a_candidate(self, root, data, tmp_path):
        train = data.split("train")[:2]
        wanted = {data.row_ids[train[0]]: {"x": 5, "red": 3, "1": 2}, data.row_ids[train[1]]: {"x": 6, "y": 4}}

        def change(tree):
            for one in tree["annotations"]:
                if said := wanted.get(one["question_id"]):
                    one |= {"multiple_choice_answer": "x", "answers": [{"answer": a} for a, people in said.items() for _ in range(people)]}

        settings = changed(root, tmp_path, "annotations", change)
        plain, soft = (make("data", {**settings, "soft": each}, tmp_path) for each in (False, True))
        assert {*train} <= {*data.split("train")}
        assert {*train}.isdisjoint(plain.split("train"))
        assert {*soft.split("train")} - {*plain.split("train")} == {train[0]}
        (shares,) = soft.shares(train[:1])
        assert {soft.classes[k]: float(share) for k, share in enumerate(shares) if share} == pytest.approx({"red": 0.9, "1": 0.6})
        assert soft.classes[soft.labels[train[0]]] == "red"
        assert soft.classes.index(*soft.rest) not in soft.labels[soft.split("train")]
        left = soft.statistics["train_left_out_for_rare_answers"]
        assert left == plain.statistics["train_left_out_for_rare_answers"] - 1 > 0
        assert not soft.shares(train[1:]).any()
        assert soft.labels[soft.split("test")].tolist() == data.labels[data.split("test")].tolist()

    def test_nobody_gave_the_class_of_the_rest(self, data):
        rows = data.split("test")
        assert not People(data).right(rows, np.full(len(rows), len(data.classes) - 1)).any()

    def test_kinds_of_questions(self, data):
        rows = data.split("test")
        kinds = People(data).subsets(rows)
        assert list(kinds) == ["number", "other", "yes/no"]
        assert np.array(list(kinds.values())).sum(0).tolist() == [1] * len(rows)
        assert {data.rows[int(i)]["text"] for i in rows[kinds["number"]]} == {"how many"}


class TestRun:
    def test_metrics(self, outcome):
        arm = json.loads((outcome.folder / "metrics.json").read_text())["arms"]["tiny"]
        keys = [(r["protocol"], r["subset"], r["input"], r["queries"]) for r in arm["records"]]
        kinds = [("answers", kind, "all", 15) for kind in ("number", "other", "yes/no")]
        shown = [("answers", "all", name, 45) for name in ("all", "image", "text")]
        assert keys == [shown[0], *kinds, *shown[1:], ("answers", "missing_50", "all", 45)]
        assert {"macro_f1", "shapley", "gradient_share"} < arm.keys()
        assert sum(arm["shapley"].values()) == pytest.approx(outcome.recall - arm["nothing"])

    def test_the_number_is_that_of_the_answers(self, outcome, data):
        """By another way: what `classify` says of each row, and the accuracy of those words."""
        rows = data.split("test")
        chances = zoo.load(outcome.folder).classify([data.rows[int(i)] for i in rows])
        names = json.loads((outcome.folder / "answers.json").read_text())["classes"]
        hits = accuracy([names[k] for k in chances.argmax(1)], [data.answers[i] for i in rows])
        assert outcome.recall == pytest.approx(hits.mean())
        plain = (chances.argmax(1) == data.labels[rows]).mean()
        assert abs(plain - hits.mean()) > 1e-3, "both ways of counting agree, so this shows nothing"
        records = {r["subset"]: r["recall"] for r in outcome.metrics["arms"]["tiny"]["records"] if r["input"] == "all"}
        for kind, there in People(data).subsets(rows).items():
            assert records[kind] == pytest.approx(hits[there].mean())

    def test_verdict_and_floor(self, outcome):
        assert re.match(r"VERDICT: \w+ \| soft_accuracy=0\.\d{3} \| baseline blip=", outcome.verdict)
        assert outcome.missed == [f"soft_accuracy is {outcome.recall:.3f}, below the floor 1.0"]

    def test_plain_accuracy_is_no_floor_here(self, root, tmp_path):
        with pytest.raises(ZooError, match="floor: no metric named 'accuracy'; did you mean 'soft_accuracy'"):
            zoo.run(TINY, out=tmp_path / "x", floor={"accuracy": 0.5}, data_root=root)

    def test_the_report(self, outcome):
        page = (outcome.folder / "report.html").read_text()
        for says in ("<h2>Answers</h2>", "Soft accuracy", "yes/no", "number", "ten people", "50 % missing", "image only", "Macro f1"):
            assert says in page, says
        assert "Protocol answers" not in page
        assert "Recall@" not in page
        assert {"recall.png", "loss.png", "reliability.png"} < {p.name for p in (outcome.folder / "plots").iterdir()}

    def test_the_card(self, outcome):
        page = card(zoo.load(outcome.folder), outcome.folder)
        assert "type: visual-question-answering" in page
        assert "name: VQA accuracy" in page
        assert "split: test" in page
        assert "model.classify(" in page
        assert "answers.json" in page

    @pytest.mark.slow
    def test_the_commands(self, root, outcome, tmp_path):
        recipe = tmp_path / "tiny.yaml"
        recipe.write_text(json.dumps({**TINY, "out": str(tmp_path / "run")}))
        said = invoke("train", recipe, "--data", root)
        assert said.exit_code == 0, said.output
        said = invoke("eval", tmp_path / "run", "--data", root)
        assert said.exit_code == 0, said.output
        lines = [line.split() for line in said.stdout.splitlines()]
        assert lines[0] == ["subset", "input", "soft_accuracy", "interval", "rows"]
        assert [line[:2] for line in lines[1:4]] == [["all", "all"], ["number", "all"], ["other", "all"]]
        said = invoke("eval", outcome.folder, "--data", root, "--json")
        assert said.exit_code == 3, said.output  # the floor
        assert json.loads(said.stdout) == outcome.metrics["arms"]["tiny"]["records"]
        assert invoke("report", outcome.folder).exit_code == 0


@pytest.mark.slow
def test_a_study(root, tmp_path):
    study = compare(
        [{**TINY, "out": "runs/tiny"}], "run.steps=1", "run.log_gradients=false", seeds=2, out=tmp_path, arms=[], data_root=root
    )
    for says in ("# Soft accuracy, split test", "paired over rows", "## soft accuracy", "yes/no", "## macro f1"):
        assert says in study.table, says
    (cell,) = study.numbers["cells"]
    assert {m["subset"] for m in cell["metrics"]} == {"all", "number", "other", "yes/no", "missing_50"}


def test_questions_follow_what_people_said(data, root, monkeypatch):
    recipe = load_recipe(TINY)
    assert main_key(recipe, data) == WHOLE
    assert measure_name(WHOLE.protocol, 1) == "soft_accuracy"
    before = questions(recipe, data)
    assert before.keys() == {f"answers/{name}" for name in ("all", "missing_50", "number", "other", "yes/no")}
    changed = list(data.answers)
    row = int(data.split("test")[0])
    changed[row] = (*changed[row][:-1], "purple")
    monkeypatch.setattr(data, "answers", changed)
    assert all(questions(recipe, data)[name] != digest for name, digest in before.items())


@pytest.mark.slow
def test_a_run_on_how_right_each_answer_is(root, tmp_path):
    outcome = zoo.run(
        TINY, out=tmp_path / "x", objective="binary_cross_entropy", data__soft=True, run__steps=2, classify__missing=[], data_root=root
    )
    assert 0 <= outcome.recall <= 1
    with pytest.raises(ZooError, match="write objective: binary_cross_entropy"):
        zoo.run(TINY, out=tmp_path / "y", data__soft=True, run__steps=1, data_root=root)


@pytest.mark.slow
def test_it_learns_to_answer(root, data, tmp_path):
    outcome = zoo.run(TINY, out=tmp_path / "x", run__steps=150, classify__missing=[], data_root=root)
    rows = data.split("test")
    best = People(data).right(rows, data.labels[rows]).mean()
    records = {(r["subset"], r["input"]): r["recall"] for r in outcome.metrics["arms"]["x"]["records"]}
    assert records["all", "all"] > 0.9 * best
    assert records["all", "all"] > max(records["all", "image"], records["all", "text"]) + 0.1
    found = every_subset(zoo.load(outcome.folder), data, rows)
    assert len(found) == 3
