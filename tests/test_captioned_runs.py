"""Runs and comparisons on captioned pictures: what is measured, what the page shows, what is refused before anything is trained."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import zoo
from tests.captioned_shapes import shapes
from zoo import registry
from zoo.cli import app
from zoo.compare import compare
from zoo.errors import ZooError
from zoo.evaluate.captions import bleu, cider, words
from zoo.metric import Key, input_name, place_name, subset_name
from zoo.questions import ask, check_questions, main_key, questions
from zoo.recipe import load_recipe
from zoo.registry import register
from zoo.study import _measured
from zoo.trials import Trial
from zoo.types import CaptionedData

CLIP = {"name": "clip", "size": "tiny"}
CONTRAST = {"name": "infonce", "on": ["image", "text"]}
TOGETHER = {"name": "together", "of": [{"name": "itc", "queue": 0}, {"name": "itm"}, {"name": "lm"}], "momentum": 0.9}
TINY = {
    "model": {"name": "blip", "size": "tiny", "layers": 2},
    "data": "shapes",
    "objective": TOGETHER,
    "optimizer": {"lr": 2e-3},
    "run": {"steps": 2, "batch_size": 12, "log_every": 1, "device": "cpu"},
    "retrieve": {
        "splits": ["style", "test"],
        "k": [1, 3],
        "bootstrap": 20,
        "examples": 2,
        "rerank": 4,
        "captions": 5,
        "decode": {"longest": 5},
        "prompt": "a",
        "zeroshot": {"templates": ["{}", "a drawing of {}"]},
    },
}
HEADLINE = Key("image_to_text", "style", "all", 1)


@pytest.fixture(scope="module", autouse=True)
def _shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry._known, "entries", dict(registry._known.entries))

        @register("data", "shapes")
        def made(root, *, held_out: str = "small", kinds: bool = True, renamed: str = "") -> CaptionedData:
            """Of this test."""
            return shapes(held_out, kinds, renamed)

        yield


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, _shapes):
    arms = {"clip": {"model": CLIP, "objective": CONTRAST}}
    return zoo.run(TINY, baselines=arms, out=tmp_path_factory.mktemp("runs") / "tiny", floor={"recall@1": 1.0})


@pytest.fixture(scope="module")
def arm(outcome):
    return json.loads((outcome.folder / "metrics.json").read_text())["arms"]


class TestRun:
    def test_metrics(self, arm):
        keys = [(r["protocol"], r["subset"], r["input"], r["k"]) for r in arm["tiny"]["records"]]
        both, ks = ("image_to_text", "text_to_image"), (1, 3)
        assert keys == [(d, s, i, k) for s in ("style", "test") for i in ("all", "reranked") for d in both for k in ks]
        assert [(r["protocol"], r["subset"], r["input"], r["k"]) for r in arm["clip"]["records"]] == [k for k in keys if k[2] == "all"]
        queries = {(r["protocol"], r["subset"]): r["queries"] for r in arm["tiny"]["records"]}
        assert queries == {(both[0], "style"): 15, (both[1], "style"): 15, (both[0], "test"): 12, (both[1], "test"): 4}

    def test_chance(self, arm):
        for found in arm.values():
            assert found["chance"] == pytest.approx(
                {
                    "from picture to text, style, recall@1": 1 / 15,
                    "from picture to text, style, recall@3": 3 / 15,
                    "from text to picture, style, recall@1": 1 / 15,
                    "from text to picture, style, recall@3": 3 / 15,
                    "from picture to text, test, recall@1": 1 / 4,
                    "from picture to text, test, recall@3": 3 / 4,
                    "from text to picture, test, recall@1": 3 / 12,
                    "from text to picture, test, recall@3": 1 - 9 * 8 * 7 / (12 * 11 * 10),
                }
            )

    def test_groups_add_up_to_all(self, arm):
        for found in arm.values():
            for record in (r for r in found["records"] if r["input"] == "all"):
                rows = [g for g in found["groups"] if (g["direction"], g["split"]) == (record["protocol"], record["subset"])]
                assert [g["group"] for g in rows] == ["bar", "circle", "cross", "square"]
                cells = [next(c for c in g["cells"] if c["k"] == record["k"]) for g in rows]
                total = sum(g["queries"] * c["recall"] for g, c in zip(rows, cells, strict=True))
                assert total == pytest.approx(record["queries"] * record["recall"])

    def test_the_second_look_is_compared_with_the_first(self, arm):
        at = {(r["protocol"], r["subset"], r["input"], r["k"]): r["recall"] for r in arm["tiny"]["records"]}
        rows = arm["tiny"]["reranking"]
        assert len(rows) == 8
        for row in rows:
            place = (row["direction"], row["split"])
            assert (row["dual"], row["reranked"]) == pytest.approx([at[*place, given, row["k"]] for given in ("all", "reranked")])
            assert row["mean"] == pytest.approx(row["reranked"] - row["dual"])
            assert row["low"] <= row["mean"] <= row["high"]
            assert row["nearest"] == 4
        assert "reranking" not in arm["clip"]
        assert arm["clip"]["left_out"] == [
            "re-ranking: this model does not read pictures and texts together",
            "captions: this model writes none",
        ]
        assert "left_out" not in arm["tiny"]

    def test_zeroshot(self, arm, outcome):
        rows = {(r["split"], r["group"]): r for r in arm["clip"]["zeroshot"]}
        assert rows["style", "all"]["pictures"] == 15 == rows["style", "all"]["classes"]
        assert rows["test", "all"]["chance"] == pytest.approx(1 / 4)
        for split, count in (("style", 15), ("test", 12)):
            parts = [r for (s, name), r in rows.items() if s == split and name != "all"]
            assert sum(r["pictures"] for r in parts) == count
            assert sum(r["pictures"] * r["accuracy"] for r in parts) == pytest.approx(count * rows[split, "all"]["accuracy"])

    def test_one_template_that_is_the_name_alone_is_retrieval(self, outcome):
        recipe = load_recipe(outcome.folder / "recipe.yaml", retrieve__zeroshot={"templates": ["{}"]}, retrieve__captions=0)
        found = ask(zoo.load(outcome.folder / "arms/clip"), shapes(), recipe)
        by = {m.key: m.recall for m in found.metrics}
        told = {r["split"]: r["accuracy"] for r in found.more["zeroshot"] if r["group"] == "all"}
        assert told == {split: pytest.approx(by["image_to_text", split, "all", 1]) for split in ("style", "test")}

    def test_captions(self, arm, outcome):
        written = json.loads((outcome.folder / "captions.json").read_text())
        assert [entry["split"] for entry in written] == ["style"] * 5 + ["test"] * 5
        data = shapes()
        said = {name: i for i, name in enumerate(data.picture_ids)}
        for entry in written:
            pairs = data.pairs(entry["split"])
            assert entry["said"] == [data.captions[c] for c in pairs[pairs[:, 0] == said[entry["picture"]], 1]]
            assert entry["written"].startswith("a")
            assert entry["groups"] == [entry["picture"].split("_")[1]]
        assert sum("image" in entry for entry in written) == 4
        mine = [words(e["written"]) for e in written[:5]]
        theirs = [[words(t) for t in e["said"]] for e in written[:5]]
        assert arm["tiny"]["captions"]["style, BLEU-1"] == pytest.approx(bleu(mine, theirs)[0].corpus)
        assert arm["tiny"]["captions"]["style, CIDEr"] == pytest.approx(cider(mine, theirs).corpus)
        by = [r for r in arm["tiny"]["captions_by_group"] if r["split"] == "style"]
        assert sum(r["pictures"] * r["cider"] for r in by) == pytest.approx(5 * cider(mine, theirs).corpus)

    def test_the_verdict_and_the_floor_speak_of_the_headline(self, outcome, arm):
        assert re.match(r"VERDICT: UNDECIDED \| recall@1=0\.\d{3} \| baseline clip=0\.\d{3} \| difference=", outcome.verdict)
        at = {(r["protocol"], r["subset"], r["input"], r["k"]): r["recall"] for r in arm["tiny"]["records"]}
        assert outcome.recall == at[HEADLINE]
        assert outcome.missed == [
            f"from picture to text, recall@1 is {at[HEADLINE]:.3f}, below the floor 1.0",
            f"from text to picture, recall@1 is {at[HEADLINE._replace(protocol='text_to_image')]:.3f}, below the floor 1.0",
        ]

    def test_examples(self, outcome):
        entries = json.loads((outcome.folder / "examples.json").read_text())
        assert [(e["direction"], e["split"]) for e in entries] == [
            (d, s) for s in ("style", "test") for d in ("image_to_text", "text_to_image") for _ in range(2)
        ]
        data = shapes()
        assert all(e["query"]["said"][0].startswith("a " + " ".join(e["query"]["text"].split("_")[:2])) for e in entries[:2])
        for entry in entries:
            assert len(entry["neighbours"]) == (4 if (entry["direction"], entry["split"]) == ("image_to_text", "test") else 5)
            scores = [n["score"] for n in entry["neighbours"]]
            assert scores == sorted(scores, reverse=True)
            for other in entry["neighbours"]:
                picture, text = (entry["query"], other) if entry["direction"] == "image_to_text" else (other, entry["query"])
                assert picture["image"]
                assert text["image"] is None
                pair = (data.picture_ids.index(picture["text"]), data.captions.index(text["text"]))
                assert other["hit"] == (list(pair) in data.pairs(entry["split"]).tolist())

    def test_the_report(self, outcome):
        page = (outcome.folder / "report.html").read_text()
        for says in (
            "<h3>From picture to text</h3>",
            "<h3>From text to picture</h3>",
            "a random ranking",
            "× chance",
            "<h2>Re-ranking</h2>",
            "<h2>By kind of picture</h2>",
            "<h3>From text to picture, split test</h3>",
            "<h2>Classes by their names</h2>",
            "<h3>Split style, 15 classes</h3>",
            "<h2>Captions</h2>",
            "CIDEr",
            "Not measured: clip: re-ranking: this model does not read pictures and texts together.",
            "<h2>Against each baseline</h2>",
            "<h2>Examples</h2>",
            "from picture to text, split style",
        ):
            assert says in page, says
        assert "What accuracy does not tell" not in page
        assert "one_target" not in page.partition("<h2>How to read this</h2>")[2]
        assert {p.name for p in (outcome.folder / "plots").iterdir()} == {"recall.png", "loss.png"}
        assert CliRunner().invoke(app, ["report", str(outcome.folder)]).exit_code == 0
        assert (outcome.folder / "report.html").read_text() == page

    def test_eval_gives_what_run_gave(self, outcome):
        said = CliRunner().invoke(app, ["eval", str(outcome.folder), "retrieve.captions=0", "--json"])
        assert said.exit_code == 3, said.output  # the floor
        assert json.loads(said.stdout) == outcome.metrics["arms"]["tiny"]["records"]
        table = CliRunner().invoke(app, ["eval", str(outcome.folder), "floor={}", "retrieve.splits=[val]", "retrieve.k=[1]"]).stdout
        assert table.split("\n")[1].split()[:3] == ["image_to_text", "val", "all"]
        assert "captions: val, BLEU-1 " in table

    def test_pictures_that_were_trained_on_are_not_evaluated(self, outcome):
        with pytest.raises(ZooError, match=r"15 of the 15 pictures of split 'style' are among those that .* was trained on: leave out"):
            zoo.evaluate(outcome.folder, data__held_out="plain")
        assert zoo.evaluate(outcome.folder, data__kinds=False, retrieve__splits=["val"], retrieve__k=[1], retrieve__captions=0)

    def test_the_card(self, outcome):
        page = str(zoo.load(outcome.folder / "arms/clip").generate_model_card(outcome.folder))
        assert "image-text retrieval" in page
        assert "Recall@1 (text_to_image)" in page
        assert 'model.encode(["a red cup", "a shoe"])' in page
        assert "multimodal classification" not in page

    def test_diagnose_is_of_items(self, outcome):
        with pytest.raises(ZooError, match="a diagnosis is for models of items, and this run's data are pictures with texts"):
            zoo.diagnose(outcome.folder)

    def test_what_is_trained_is_not_trained_again(self, outcome, caplog):
        with caplog.at_level("INFO"):
            again = zoo.run(TINY, baselines={"clip": {"model": CLIP, "objective": CONTRAST}}, out=outcome.folder, floor={"recall@1": 1.0})
        assert again.metrics["arms"]["tiny"]["records"] == outcome.metrics["arms"]["tiny"]["records"]
        assert "from step 0" not in caplog.text


class TestCompare:
    def test_cells_are_paired_over_queries(self, tmp_path):
        asked = {"k": [1, 3], "bootstrap": 10, "splits": ["style", "test"]}
        recipe = {**TINY, "model": CLIP, "objective": CONTRAST, "retrieve": asked, "out": "runs/tiny"}
        arms = {"words": {"data.renamed": " of clay"}, "slow": {"optimizer.lr": 1e-6}}
        with pytest.raises(ZooError, match=r"baselines\.words: its 'data' has other rows, pairs or candidates in split 'style'"):
            zoo.run(recipe, baselines=arms, out=tmp_path / "x")
        study = compare([{**recipe, "baselines": arms}], "run.steps=1", seeds=1, arms=["all"], out=tmp_path / "study")
        cells = {c["cell"]: {Key(*(m[f] for f in Key._fields)): m for m in c["metrics"]} for c in study.numbers["cells"]}
        assert study.numbers["main"] == HEADLINE._asdict()
        assert cells["tiny, slow"][HEADLINE]["difference"]["seeds"] == [0]
        assert cells["tiny, words"][HEADLINE]["difference"] is None  # other texts are other questions
        for says in (
            "# Recall@1, from picture to text, split style",
            "## from text to picture, recall@3",
            "## chance",
            "| style",
            "| test",
        ):
            assert says in study.table

    def test_what_a_model_cannot_do_is_said(self, outcome, caplog):
        recipe = load_recipe(TINY)
        ask(zoo.load(outcome.folder / "arms/clip"), shapes(), recipe)
        assert "not measured: re-ranking: this model does not read pictures and texts together; captions: this model" in caplog.text
        caplog.clear()
        ask(zoo.load(outcome.folder), shapes(), recipe)
        assert not caplog.text

    def test_a_study_before_there_were_captions_is_not_measured_again(self):
        recipe = load_recipe(TINY, "retrieve={}")
        assert _measured(Trial("x", recipe)).keys() == {"evaluate", "classify"}
        assert _measured(Trial("x", load_recipe(TINY))).keys() == {"evaluate", "classify", "retrieve"}


class TestRefusals:
    @pytest.mark.parametrize(
        "override, says",
        [
            ("retrieve.splits=[stile]", "retrieve.splits: no split named 'stile'; did you mean 'style'"),
            ("data.held_out=none", "retrieve.splits: split 'style' has no pairs of a picture and a text, and so nothing to find: name"),
            (
                "retrieve={splits: [stile, test], k: [1, 5]}",
                "did you mean 'style'? (have: style, test, train, val)\nretrieve.k: 5, but from",
            ),
            ("retrieve.splits=[]", "retrieve.splits: it names no split: write at least one, such as [test]"),
            ("retrieve.splits=[test,test]", "retrieve.splits: ['test', 'test']: write each split once"),
            ("retrieve.k=[1,5]", "retrieve.k: 5, but from picture to text split 'test' has 4 candidates"),
            ("retrieve.main.k=2", "retrieve.main.k: 2 is none of retrieve.k, [1, 3]"),
            ("retrieve.main.direction=up", "retrieve.main.direction: 'up': input should be 'image_to_text' or 'text_to_image'"),
            ("retrieve.zeroshot.templates=[a drawing]", "'a drawing' has no place for the name: write {} in it, once"),
            ("retrieve.decode={shortest: 9, longest: 5}", "retrieve.decode.shortest: 9 is more than retrieve.decode.longest, 5"),
            (
                "retrieve.decode.longest=65",
                "retrieve.decode: longest: 65 ids behind the 2 that a caption begins with are too many",
            ),
            ("retrieve.captions=some", "retrieve.captions: 'some'"),
            ("evaluate.k=[5,10]", "evaluate: the data set is of pictures with texts, of which 'retrieve' says what is measured"),
            ("classify.split=val", "classify: the data set is of pictures with texts, of which 'retrieve' says what is measured"),
            ("floor={recall@2: 0.1}", "floor.recall@2: no metric named 'recall@2'"),
            ("floor={accuracy: 0.1}", "floor: no metric named 'accuracy'"),
            ("baselines={words: bm25}", "baselines.words: bm25 searches items by words or clicks"),
            (
                "baselines={other: {data.held_out: grey}}",
                "baselines.other: its 'data' has other rows, pairs or candidates in split 'style'",
            ),
            ("baselines={other: {retrieve.rerank: 0}}", "baselines.other: it changes 'retrieve'"),
            ("data={name: planted_notes, notes: 300, users: 60, image_size: 16}", "retrieve: the data set is of pairs"),
        ],
    )
    def test_before_training(self, override, says, tmp_path):
        with pytest.raises(ZooError, match=re.escape(says)):
            zoo.run(TINY, override, out=tmp_path / "x")
        assert not (tmp_path / "x/log.jsonl").exists()

    def test_groups_that_are_not_there(self):
        recipe = load_recipe(TINY, "retrieve.zeroshot.classes=groups")
        check_questions(recipe, shapes())
        with pytest.raises(ZooError, match=r"retrieve\.zeroshot\.classes: split 'style' has no groups to tell apart: write captions"):
            check_questions(recipe, shapes(kinds=False))

    def test_a_grid_over_what_is_measured(self, tmp_path):
        with pytest.raises(ZooError, match=r"grid retrieve\.rerank: retrieve is the same for all cells"):
            compare([{**TINY, "out": "runs/tiny"}], grid={"retrieve.rerank": [0, 1]}, out=tmp_path)

    def test_only_what_is_measured_may_change_afterwards(self, outcome):
        with pytest.raises(ZooError, match="no section to evaluate by named 'optimizer'"):
            zoo.evaluate(outcome.folder, optimizer__lr=1.0)


class TestGroups:
    def test_as_classes(self, outcome):
        asked = {"retrieve.captions": 0, "retrieve.rerank": 0, "retrieve.examples": 0}
        overrides = [f"{k}={v}" for k, v in asked.items()] + ["retrieve.zeroshot={classes: groups, templates: ['a {}']}"]
        found = ask(zoo.load(outcome.folder), shapes(), load_recipe(outcome.folder / "recipe.yaml", *overrides))
        rows = {(r["split"], r["group"]): r for r in found.more["zeroshot"]}
        assert {r["classes"] for r in rows.values()} == {4}
        assert rows["style", "all"]["chance"] == pytest.approx(1 / 4)
        guessed = [r["accuracy"] for (split, name), r in rows.items() if split == "test" and name != "all"]
        assert sum(guessed) * 3 == pytest.approx(12 * rows["test", "all"]["accuracy"])

    def test_none(self, outcome):
        recipe = load_recipe(outcome.folder / "recipe.yaml", "retrieve.captions=0", "retrieve.rerank=0", "retrieve.examples=0")
        found = ask(zoo.load(outcome.folder), shapes(kinds=False), recipe)
        assert found.more["groups"] == []
        assert [r["group"] for r in found.more["zeroshot"]] == ["all", "all"]
        assert found.files == {"examples.json": []}


def test_the_headline_is_the_first_split():
    recipe = load_recipe(TINY, "retrieve.main={direction: text_to_image, k: 3}")
    assert main_key(recipe, shapes()) == Key("text_to_image", "style", "all", 3)
    assert main_key(load_recipe(TINY, "retrieve.splits=[test,style]"), shapes()).subset == "test"


def test_questions_tell_splits_and_texts_apart():
    recipe = load_recipe(TINY)
    same, other = questions(recipe, shapes()), questions(recipe, shapes(renamed="!"))
    assert same.keys() == {"image_to_text/style", "text_to_image/style", "image_to_text/test", "text_to_image/test"}
    assert same == questions(recipe, shapes(kinds=False))
    assert not set(same.values()) & set(other.values())
    assert np.unique(list(same.values())).size == 2


def test_names():
    assert place_name("text_to_image", "style", 5) == "from text to picture, style, recall@5"
    assert (subset_name("style"), input_name("reranked"), input_name("all")) == ("style", "re-ranked", "")
