"""Runs and comparisons on labelled rows: what is measured, what the report shows, what is refused before anything is trained."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import zoo
from zoo import registry
from zoo.cli import app
from zoo.compare import Cell, compare
from zoo.compare import _metric as metric
from zoo.errors import Failure, ZooError
from zoo.evaluate.classification import by_modality, every_subset, measure
from zoo.metric import Key, Metric, missing, subset_name
from zoo.questions import check_questions, questions
from zoo.recipe import load_recipe
from zoo.registry import make, register
from zoo.sections import Classify
from zoo.study import Result
from zoo.types import LabelledData

ENCODER = {"name": "tiny_image", "dim": 8, "layers": 1, "heads": 2, "image_size": 8}
TINY = {
    "model": {"name": "classifier", "classes": 3, "encoders": {"left": ENCODER, "right": ENCODER}, "fusion": "mla"},
    "data": "shades",
    "objective": "cross_entropy",
    "optimizer": {"lr": 1e-2},
    "run": {"steps": 4, "batch_size": 8, "log_every": 1, "log_gradients": True, "device": "cpu"},
    "classify": {"bootstrap": 20, "missing": [0.5, {"right": 0.5}]},
}
WHOLE = Key("classes", "all", "all", 1)


class Shades:
    """Rows of which a class is a level of grey, on the left a clear one."""

    modalities, classes, broken, statistics = ("left", "right"), ("dark", "grey", "light"), [], {"rows": 90}

    def __init__(self, turn=0, bare=(), lost=None, counts=(60, 12, 18), shift=0):
        draw = np.random.default_rng(turn)
        self.labels = np.arange(sum(counts)) % 3
        self.row_ids = [f"row {turn} {i}" for i in range(len(self.labels))]
        self.fingerprint = f"shades {turn} {bare} {lost} {counts} {shift}"
        self.places = np.split(np.roll(np.arange(len(self.labels)), -shift), np.cumsum(counts)[:-1])
        if lost is not None:
            self.places[0] = self.places[0][self.labels[self.places[0]] != lost]
        self.rows = []
        for i, label in enumerate(self.labels):
            level = {"left": 100 * label + draw.integers(20), "right": 60 * label + draw.integers(120)}
            shown = {m: Image.new("RGB", (8, 8), (int(v),) * 3) for m, v in level.items() if i not in bare}
            self.rows.append({"id": i} | shown)

    def split(self, name):
        return dict(zip(("train", "val", "test", "none"), [*self.places, np.zeros(0, np.int64)], strict=True))[name]

    def lengths(self):
        return np.ones(len(self.labels), np.int64)


@pytest.fixture(scope="module", autouse=True)
def _shades():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry._known, "entries", dict(registry._known.entries))

        @register("data", "shades")
        def shades(root, *, turn: int = 0, lost: int | None = None, shift: int = 0) -> LabelledData:
            """Of this test."""
            return Shades(turn, lost=lost, shift=shift)

        yield


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, _shades):
    arms = {"concat": {"model.fusion": "concat"}, "late": {"model.fusion": "late"}}
    return zoo.run(TINY, baselines=arms, out=tmp_path_factory.mktemp("runs") / "tiny", floor={"accuracy": 1.0})


@pytest.fixture
def trained(outcome):
    return zoo.load(outcome.folder)


class TestRun:
    def test_metrics(self, outcome):
        arm = json.loads((outcome.folder / "metrics.json").read_text())["arms"]["tiny"]
        keys = [(r["subset"], r["input"]) for r in arm["records"]]
        assert keys == [("all", "all"), ("all", "left"), ("all", "right"), ("missing_50", "all"), ("missing_right:50", "all")]
        assert {r["queries"] for r in arm["records"]} == {18}
        assert arm["macro_f1"].keys() == arm["calibration_error"].keys() == {"all", "left", "right"}
        assert sum(arm["shapley"].values()) == pytest.approx(outcome.recall - arm["nothing"])
        assert len(arm["entropy"]["left"]) == 10
        assert sum(arm["gradient_share"].values()) == pytest.approx(1)
        assert arm["gradients"]["steps"] == [1, 2, 3, 4]

    def test_the_verdict_and_the_floor_speak_of_accuracy(self, outcome):
        assert re.match(r"VERDICT: UNDECIDED \| accuracy=0\.\d{3} \| baseline (concat|late)=", outcome.verdict)
        assert outcome.missed == [f"accuracy is {outcome.recall:.3f}, below the floor 1.0"]

    def test_the_report(self, outcome):
        page = (outcome.folder / "report.html").read_text()
        for says in ("<h2>Classes</h2>", "right 50 % missing", "50 % missing", "Macro f1", "Shapley", "left only", "Error against entropy"):
            assert says in page
        assert "of two modalities 50 % at most" in page
        assert "Recall@" not in page
        assert "queries" not in page.partition("<h2>How to read this</h2>")[2]
        assert {p.name for p in (outcome.folder / "plots").iterdir()} == {"recall.png", "loss.png", "reliability.png", "gradients.png"}

    def test_without_baselines(self, tmp_path):
        assert zoo.run(TINY, run__steps=1, out=tmp_path / "x").verdict.startswith("ACCURACY: accuracy=")

    def test_eval_gives_what_run_gave(self, outcome):
        said = CliRunner().invoke(app, ["eval", str(outcome.folder), "--json"])
        assert said.exit_code == 3, said.output  # the floor
        assert json.loads(said.stdout) == outcome.metrics["arms"]["tiny"]["records"]
        table = CliRunner().invoke(app, ["eval", str(outcome.folder), "floor={}"]).stdout
        assert table.split("\n")[0].split() == ["subset", "input", "accuracy", "interval", "rows"]

    def test_rows_that_were_trained_on_are_not_evaluated(self, outcome):
        # Shades of another shift have the same rows, of which others train.
        says = "under these settings, 12 of the 18 rows of split 'test' are among those that .* was trained on: leave out what deals"
        with pytest.raises(ZooError, match=says):
            zoo.evaluate(outcome.folder, data__shift=12)
        said = CliRunner().invoke(app, ["eval", str(outcome.folder), "data.shift=12", "floor={}"])
        assert re.search(says, str(said.exception))
        assert zoo.evaluate(outcome.folder, data__shift=0)
        assert zoo.evaluate(outcome.folder, data__turn=1)
        assert zoo.evaluate(outcome.folder, data__shift=12, classify__split="train")

    def test_the_card(self, trained, outcome, tmp_path):
        page = str(trained.generate_model_card(outcome.folder))
        assert "multimodal classification" in page
        assert "model.classify(" in page
        assert "model.encode(" not in page

    def test_diagnose_is_of_items(self, outcome):
        with pytest.raises(ZooError, match="a diagnosis is for models of items, and this run's data are labelled rows"):
            zoo.diagnose(outcome.folder)


class TestMeasured:
    def test_a_subset_is_what_its_rows_alone_give(self, trained):
        data = Shades()
        rows = data.split("test")
        found = every_subset(trained, data, rows, batch_size=5)
        chances = trained.classify([{"left": data.rows[i]["left"]} for i in rows])
        np.testing.assert_allclose(
            np.exp(found[frozenset({"left"})].logits), chances * np.exp(found[frozenset({"left"})].logits).sum(1)[:, None], rtol=1e-4
        )

    def test_no_rows_have_no_classes(self, trained):
        assert trained.classify([]).shape == (0, 3)

    def test_a_row_that_shows_nothing_is_the_commonest_class(self, trained):
        data = Shades(bare=(72, 73, 74), lost=None)
        data.places[0] = np.array([1, 4, 7, 0, 2])  # grey is the commonest
        found = every_subset(trained, data, np.array([72, 73, 74]))[frozenset({"left", "right"})]
        assert found.right(prior=1).tolist() == [0, 1, 0]
        metrics, _, _ = measure(trained, data, Classify(bootstrap=0), seed=0)
        hits = next(m.hits for m in metrics if m.key == WHOLE)
        assert hits[:3].tolist() == [0, 1, 0]

    def test_missing_cells_are_answered_from_what_is_left(self, trained):
        metrics, _, _ = measure(trained, Shades(), Classify(missing=(0.0, 0.5, {"left": 1.0}), bootstrap=0), seed=0)
        by = {(m.subset, m.input): m.hits for m in metrics}
        np.testing.assert_array_equal(by["missing_0", "all"], by["all", "all"])
        np.testing.assert_array_equal(by["missing_left:100", "all"], by["all", "right"])
        half = by["missing_50", "all"]
        assert ((half == by["all", "left"]) | (half == by["all", "right"])).all()

    def test_each_modality_by_itself(self, trained):
        data = Shades(bare=(72,))
        seen = by_modality(trained, data, data.split("test"), batch_size=4)
        assert len(seen.labels) == 17
        assert {k: tuple(x.shape) for k, x in seen.logits.items()} == {"left": (17, 3), "right": (17, 3)}

    def test_logits_that_are_not_finite_are_no_missing_row(self, trained):
        trained.heads["shared"].bias.data[1] = float("nan")
        with pytest.raises(Failure, match="row 72: from all, the model gives logits that are NaN or infinite: its weights are at fault"):
            measure(trained, Shades(), Classify(bootstrap=0), seed=0)

    def test_another_number_of_classes(self, trained):
        data = Shades()
        data.classes = ("a", "b")
        with pytest.raises(ZooError, match=r"logits of 3 classes, and the data have 2: write model\.classes=2"):
            measure(trained, data, Classify(), seed=0)


class TestRefusals:
    @pytest.mark.parametrize(
        "override, says",
        [
            ("data.lost=2", "classes without a training row: light"),
            ("classify.split=none", "split 'none' has no rows"),
            ("evaluate.k=[5,10]", "evaluate: the data set is of labelled rows"),
            ("floor={recall@10: 0.1}", "floor: no metric named 'recall@10'"),
            ("baselines={words: bm25}", "baselines.words: bm25 searches items by words or clicks"),
            ("baselines={other: {data.turn: 1}}", "baselines.other: its 'data' has other rows"),
            ("baselines={other: {classify.missing: []}}", "baselines.other: it changes 'classify'"),
            ("run.calibrate=none", "run.calibrate: split 'none' has no rows"),
            ("run.calibrate=test", "run.calibrate: what is fitted is fitted on neither training nor test rows, not on 'test': write val"),
            ("classify.missing=[{rihgt: 0.5}]", "classify.missing: no modality to lose named 'rihgt'; did you mean 'right'?"),
            ("classify.missing=[{left: 0.9, right: 0.9}]", "classify.missing: missing modalities: the rates left 0.9, right 0.9 leave"),
            ("classify.missing=[0.5, 0.25, 0.5]", "classify.missing: missing_50 stands there twice: write each rate once"),
            ("model.classes=4", "model.classes: 4, and the data have 3 classes: write 3"),
            (
                "model.encoders.up={name: tiny_image, dim: 8, layers: 1, heads: 2, image_size: 8}",
                "model.encoders: no row shows up (the data show: left, right)",
            ),
            ("data={name: planted_notes, notes: 300, users: 60, image_size: 16}", "this model learns from rows of known class"),
        ],
    )
    def test_before_training(self, override, says, tmp_path):
        with pytest.raises(ZooError, match=re.escape(says)):
            zoo.run(TINY if "planted" not in override else {k: v for k, v in TINY.items() if k != "classify"}, override, out=tmp_path / "x")
        assert not (tmp_path / "x/log.jsonl").exists()

    def test_nothing_to_calibrate(self, tmp_path):
        with pytest.raises(ZooError, match=r"run\.calibrate: this model combines no logits of modalities"):
            zoo.train(TINY, run__calibrate="val", model__fusion="concat", out=tmp_path / "x")

    def test_pairs_are_not_classified(self):
        recipe = load_recipe({**TINY, "data": "planted_notes"})
        with pytest.raises(ZooError, match="classify: the data set is of pairs"):
            check_questions(recipe, make("data", {"name": "planted_notes", "notes": 100, "users": 60, "image_size": 16}, None))

    def test_one_modality(self):
        data = Shades()
        data.modalities = ("left",)
        with pytest.raises(ZooError, match="the data have one modality, left"):
            check_questions(load_recipe(TINY), data)


class TestCalibration:
    def test_it_changes_temperatures_and_no_weight(self, tmp_path):
        plain, fitted = (zoo.train(TINY, run__calibrate=split, out=tmp_path / str(split)) for split in (None, "val"))
        a, b = plain.state_dict(), fitted.state_dict()
        changed = {name for name in a if not np.array_equal(a[name].numpy(), b[name].numpy())}
        assert changed
        assert all(name.startswith("combine.") for name in changed)
        assert {n: x.tolist() for n, x in zoo.load(tmp_path / "val").state_dict().items() if n in changed} == {
            n: b[n].tolist() for n in changed
        }

    def test_what_is_trained_already_is_calibrated_the_same(self, tmp_path):
        first = zoo.train(TINY, run__calibrate="val", out=tmp_path / "x").state_dict()
        again = zoo.train(TINY, run__calibrate="val", out=tmp_path / "x").state_dict()
        assert all(np.array_equal(first[name].numpy(), again[name].numpy()) for name in first)


class TestSeeded:
    def test_the_data_follow_the_seed(self):
        recipe = load_recipe({**TINY, "seeded": ["data.turn"]}, "seed=3")
        assert recipe.data["turn"] == 3
        assert load_recipe(recipe, "seed=5").data["turn"] == 5

    def test_only_the_data(self):
        with pytest.raises(ZooError, match=r"seeded: 'optimizer\.lr' is no setting of the data"):
            load_recipe({**TINY, "seeded": ["optimizer.lr"]})

    @pytest.mark.parametrize("override", ["data.turn=2", "data={name: shades, turn: 2}"])
    def test_another_value_is_refused(self, override):
        says = f"override '{override}': data.turn: it follows the seed, which is 0: write seed=2, or seeded=[]"
        with pytest.raises(ZooError, match=re.escape(says)):
            load_recipe({**TINY, "seeded": ["data.turn"]}, override)
        assert load_recipe({**TINY, "seeded": ["data.turn"]}, override, "seed=2").data["turn"] == 2
        assert load_recipe({**TINY, "seeded": ["data.turn"]}, override, "seeded=[]").data["turn"] == 2

    def test_nor_of_an_arm_or_a_grid(self, tmp_path):
        recipe = {**TINY, "seeded": ["data.turn"], "out": "runs/tiny"}
        with pytest.raises(ZooError, match=r"baselines\.other\.data\.turn: it follows the seed, which is 0"):
            load_recipe(recipe, baselines={"other": {"data.turn": 1}})
        with pytest.raises(ZooError, match=r"data\.turn: it follows the seed, which is 0: write seed=1"):
            compare([recipe], grid={"data.turn": [0, 1]}, seeds=2, out=tmp_path)

    def test_every_seed_of_a_study_has_its_rows(self, tmp_path):
        study = compare([{**TINY, "seeded": ["data.turn"], "out": "runs/tiny"}], "run.steps=1", seeds=2, out=tmp_path, arms=[])
        recipes = [load_recipe(path) for path in sorted(tmp_path.glob("tiny/seed_*/recipe.yaml"))]
        assert [r.data["turn"] for r in recipes] == [0, 1]
        (cell,) = study.numbers["cells"]
        assert set(cell["more"]["macro_f1"]["left"]) == {"mean", "std"}
        assert "paired over rows" in study.table
        assert "50 % is the most that two modalities can lose" in study.table
        for says in ("# Accuracy, split test", "## macro f1", "## shapley", "right 50 % missing"):
            assert says in study.table


def hits(values):
    values = np.array(values, dtype=float)
    return Metric("classes", "all", "all", 1, float(values.mean()), 0.0, 1.0, np.arange(len(values)), values)


def cell(name, by_seed):
    return Cell(
        name, "", {s: Result("done", "", [found], 1.0, 1, "", "", {"classes/all": asked}, {}, {}) for s, (found, asked) in by_seed.items()}
    )


class TestDifference:
    def test_rows_of_all_seeds_where_each_asks_others(self):
        mine = cell("a", {0: (hits([1, 1, 1]), "x"), 1: (hits([1, 0]), "y")})
        other = cell("b", {0: (hits([0, 1, 1]), "x"), 1: (hits([0, 1]), "y")})
        found = metric(WHOLE, mine, other)["difference"]
        assert found["mean"] == pytest.approx(1 / 5)
        assert found["by_seed"] == pytest.approx({0: 1 / 3, 1: 0})

    def test_a_row_that_two_seeds_ask_is_drawn_with_both_answers(self):
        draw = np.random.default_rng(0)
        mine, other = hits(draw.integers(2, size=50)), hits(draw.integers(2, size=50))
        once = metric(WHOLE, cell("a", {0: (mine, "x")}), cell("b", {0: (other, "x")}))["difference"]
        twice = metric(WHOLE, cell("a", {0: (mine, "x"), 1: (mine, "y")}), cell("b", {0: (other, "x"), 1: (other, "y")}))["difference"]
        assert [twice[part] for part in ("mean", "low", "high")] == pytest.approx([once[part] for part in ("mean", "low", "high")])

    def test_none_where_a_seed_asks_two_things(self):
        mine, other = cell("a", {0: (hits([1, 1]), "x"), 1: (hits([1]), "y")}), cell("b", {0: (hits([0, 1]), "x"), 1: (hits([0]), "z")})
        assert metric(WHOLE, mine, other)["difference"] is None


def test_questions_tell_splits_and_classes_apart():
    recipe = load_recipe(TINY)
    same, other = questions(recipe, Shades()), questions(recipe, Shades(turn=1))
    assert same.keys() == {"classes/all", "classes/missing_50", "classes/missing_right:50"}
    assert same == questions(recipe, Shades()) != other


@pytest.mark.parametrize(
    "rates, name, says",
    [(0.25, "missing_25", "25 % missing"), ({"a2": 0.5, "b": 0.125}, "missing_a2:50,b:12.5", "a2 50 %, b 12.5 % missing")],
)
def test_names_of_subsets(rates, name, says):
    assert missing(rates) == name
    assert subset_name(name) == says
