"""Sentences about two pictures: the folder of NLVR2 in small, what the head reads, how consistent verdicts are, and a run to its report."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import zoo
from zoo.card import card
from zoo.cli import app
from zoo.collate import stack
from zoo.errors import Absent, ZooError
from zoo.evaluate.classification import consistency, every_subset
from zoo.hub import load, save
from zoo.init_from import take_parts
from zoo.labelled import Stated
from zoo.recipe import load_recipe
from zoo.registry import build, make
from zoo.stages import Stage
from zoo.types import Batch, Classifying, LabelledData
from zoo.validate import validate

LOOKS = {"name": "tiny_image", "dim": 24, "heads": 2, "layers": 1, "image_size": 16}
BASES = {name: {"name": name, "vision": LOOKS, "layers": 2, "dim": 8} for name in ("albef", "blip")}
BASES |= {name: {"name": name, "layers": 2, "image_size": 16} for name in ("vlmo", "beit_3")}
SENTENCES = {"the left is red": lambda left, right: left == "red", "both are one colour": lambda left, right: left == right}
PAIRS = [(left, right) for left in ("red", "blue") for right in ("red", "blue")]
PARTS = {"train": 9, "dev": 3, "test1": 4}  # sets of four pairs
TINY = {
    "model": {"name": "nlvr2", "base": BASES["albef"]},
    "data": {"name": "nlvr2"},
    "objective": "cross_entropy",
    "optimizer": {"lr": 4e-3},
    "run": {"steps": 3, "batch_size": 16, "log_every": 1, "log_gradients": True, "device": "cpu"},
    "classify": {"bootstrap": 20, "missing": [0.5]},
}


def miniature(place):
    """Each set has the four pairs of two colours, and two sentences about each; pictures of train lie in numbered folders."""
    (place / "data").mkdir(parents=True)
    for part, sets in PARTS.items():
        lines = []
        for number in range(sets):
            folder = {"directory": number % 2} if part == "train" else {}
            at = place / (f"images/train/{number % 2}" if folder else part)
            at.mkdir(parents=True, exist_ok=True)
            for pair, colours in enumerate(PAIRS):
                for side, colour in enumerate(colours):
                    Image.new("RGB", (16, 16), colour).save(at / f"{part}-{number}-{pair}-img{side}.png")
                for k, (sentence, true) in enumerate(SENTENCES.items()):
                    about = {"identifier": f"{part}-{number}-{pair}-{k}", "sentence": f"{sentence} ", "label": str(true(*colours))}
                    lines.append({**about, **folder, "validation": {}, "left_url": "", "right_url": "", "synset": "x", "query": "x0"})
        (place / f"data/{part}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of data folders."""
    place = tmp_path_factory.mktemp("data")
    miniature(place / "nlvr2")
    return place


@pytest.fixture
def copied(root, tmp_path):
    """The same, to be broken."""
    return shutil.copytree(root, tmp_path / "copy")


@pytest.fixture(scope="module")
def data(root):
    return make("data", "nlvr2", root)


@pytest.fixture(scope="module")
def outcome(root, tmp_path_factory):
    arms = {"blip": {"model.base": {**BASES["blip"], "layers": 1}}}
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return zoo.run(TINY, baselines=arms, out=out, floor={"accuracy": 1.0}, data_root=root)


def tiny(base="albef", **settings):
    return build("nlvr2", base=BASES[base], **settings)


def row(left="red", right="blue", text="the left is red"):
    made = {"image": left and Image.new("RGB", (16, 16), left), "image_2": right and Image.new("RGB", (16, 16), right), "text": text}
    return {key: thing for key, thing in made.items() if thing}


def batch_of(model, *rows, **more):
    return Batch(stack([model.processor(r) for r in rows]), **more)


def invoke(*words):
    return CliRunner().invoke(app, list(map(str, words)))


class TestData:
    def test_rows(self, data):
        assert isinstance(data, LabelledData)
        assert data.modalities == ("image", "image_2", "text")
        assert {name: len(data.split(name)) for name in ("train", "val", "test")} == {"train": 72, "val": 24, "test": 32}
        i = data.row_ids.index("train-3-1-0")
        found = data.rows[i]
        assert found.keys() == {"id", "image", "image_2", "text"}
        assert (found["image"].getpixel((0, 0)), found["image_2"].getpixel((0, 0))) == ((255, 0, 0), (0, 0, 255))
        assert found["text"] == "the left is red"
        assert data.classes[data.labels[i]] == "true"
        assert data.classes[data.labels[data.row_ids.index("train-3-1-1")]] == "false"
        assert data.statistics["splits"] == "as published"
        assert data.statistics["sentences"] == {"train": 18, "val": 6, "test": 8}
        assert data.lengths()[i] == len("the left is red")

    def test_rows_of_one_sentence(self, data):
        assert isinstance(data, Stated)
        for number in np.unique(data.statements):
            names = [data.row_ids[i].split("-") for i in np.flatnonzero(data.statements == number)]
            assert len(names) == 4
            assert len({(part, of, sentence) for part, of, _, sentence in names}) == 1
        assert len(np.unique(data.statements)) == 2 * sum(PARTS.values())

    def test_pictures_may_lie_elsewhere(self, copied, data):
        for name in ("images", "dev", "test1"):
            shutil.move(copied / "nlvr2" / name, copied / "pictures" / name)
        found = make("data", {"name": "nlvr2", "images": str(copied / "pictures")}, copied)
        assert found.row_ids == data.row_ids
        assert found.fingerprint == data.fingerprint

    def test_a_picture_that_is_not_there(self, copied, data):
        (copied / "nlvr2/test1/test1-0-0-img1.png").unlink()
        found = make("data", "nlvr2", copied)
        assert found.broken == ["test1-0-0-0", "test1-0-0-1"]
        assert found.rows[found.row_ids.index("test1-0-0-0")].keys() == {"id", "image", "text"}
        assert found.fingerprint != data.fingerprint

    def test_a_picture_that_is_not_there_elsewhere(self, copied, data):
        for name in ("images", "dev", "test1"):
            shutil.move(copied / "nlvr2" / name, copied / "pictures" / name)
        (copied / "pictures/test1/test1-0-0-img1.png").unlink()
        (copied / "pictures/dev/dev-0-0-img0.png").write_bytes(b"no picture")
        found = make("data", {"name": "nlvr2", "images": str(copied / "pictures")}, copied)
        assert found.broken == ["dev-0-0-0", "dev-0-0-1", "test1-0-0-0", "test1-0-0-1"]
        assert f"{copied / 'pictures/test1/test1-0-0-img1.png'} there is no such file" in found.statistics["faults"]
        says = rf"not one of 128 rows has image that can be used, such as: {re.escape(str(copied / 'wrong'))}/images/train/0/"
        with pytest.raises(ZooError, match=says):
            make("data", {"name": "nlvr2", "images": str(copied / "wrong")}, copied)

    def test_modalities_are_lost_as_asked(self, root):
        found = make("data", {"name": "nlvr2", "missing_test": {"image_2": 0.5}}, root)
        lost = ["image_2" not in found.rows[int(i)] for i in found.split("test")]
        assert sum(lost) == 16
        assert all("image_2" in found.rows[int(i)] for i in found.split("train"))

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("[", r"dev\.json, line 1: no JSON"),
            ("[]", "line 1: there is no identifier, or no sentence"),
            ({"identifier": "dev-1-0-0"}, "line 1: there is no identifier, or no sentence"),
            ({"identifier": "dev-1-0", "sentence": "a"}, "the identifier 'dev-1-0' is not dev-<set>-<pair>-<sentence>"),
            ({"identifier": "test1-1-0-0", "sentence": "a"}, "the identifier 'test1-1-0-0' is not dev-"),
            ({"identifier": "dev-1-0-0", "sentence": "a", "label": "yes"}, "the label of dev-1-0-0 is 'yes', and neither True nor False"),
        ],
    )
    def test_files_that_are_wrong(self, copied, line, says):
        (copied / "nlvr2/data/dev.json").write_text(line if isinstance(line, str) else json.dumps(line))
        with pytest.raises(ZooError, match=says):
            make("data", "nlvr2", copied)

    def test_folders_that_are_wrong(self, copied, tmp_path):
        with pytest.raises(Absent, match=r"no folder .*\nnlvr2 is a folder with"):
            make("data", "nlvr2", tmp_path / "nowhere")
        (copied / "nlvr2/data/dev.json").unlink()
        with pytest.raises(ZooError, match=r"there is no data/dev\.json"):
            make("data", "nlvr2", copied)


class TestModel:
    @pytest.mark.parametrize("base", BASES)
    def test_the_verdict_hears_sentence_and_pictures_in_their_order(self, base):
        model = tiny(base).eval()
        assert isinstance(model, Classifying)
        lacking = [row(left=None), row(right=None), row(text="")]
        rows = [row(), row("blue"), row(right="red"), row("blue", "red"), row(text="both"), *lacking, row()]
        with torch.no_grad():
            said = model(batch_of(model, *rows))
        logits = said.logits["fused"]
        assert said.present["fused"].all()
        torch.testing.assert_close(logits[-1], logits[0], rtol=0, atol=1e-6)
        assert all((logits[i] - logits[j]).abs().max() > 1e-5 for i in range(len(rows) - 1) for j in range(i))

    @pytest.mark.parametrize("base", BASES)
    def test_it_is_the_models_own_reading_beside_each_picture(self, base):
        model = tiny(base).eval()
        batch = batch_of(model, row(), row("blue", "red", "both"))
        with torch.no_grad():
            text, inside = batch.inputs["text"], model.inside
            seen = [inside.see(batch.inputs[key], place) for place, key in enumerate(("image", "image_2"))]
            if base == "beit_3":  # the first states of picture and sentence
                expected = inside.compare(text, seen)
            else:
                expected = torch.cat([inside.ask(text, picture).pooled for picture in seen], 1)
            torch.testing.assert_close(model(batch).embeddings["fused"], expected, rtol=0, atol=0)

    def test_a_model_that_compares_does_so(self, monkeypatch):
        """Which stands for any: its width is the head's, and the second picture is known to be the second."""
        plain = tiny().eval()
        places, kind = [], type(plain.inside)
        see = kind.see
        monkeypatch.setattr(kind, "compared_dim", 5, raising=False)
        compare = lambda self, question, seen: torch.stack([x.tokens[:, 0, 0] for x in seen] * 3, 1)[:, :5]  # noqa: E731
        monkeypatch.setattr(kind, "compare", compare, raising=False)
        monkeypatch.setattr(kind, "see", lambda self, image, place=0: places.append(place) or see(self, image, place))
        model = tiny().eval()
        assert model.answers[0].in_features == model.dim == 5
        batch = batch_of(model, row())
        with torch.no_grad():
            x = model(batch).embeddings["fused"]
        assert places == [0, 1]
        assert x[0, 0] == x[0, 2] == x[0, 4] != x[0, 1]

    def test_vlmo_is_told_which_picture_is_the_second(self):
        model = tiny("vlmo").eval()
        one, two = batch_of(model, row(right=None)), batch_of(model, row(left=None))
        with torch.no_grad():
            before = [model(batch).logits["fused"] for batch in (one, two)]
            model.kinds.weight[2] += torch.linspace(-1, 1, 64)  # a shift of all alike a norm would take away
            after = [model(batch).logits["fused"] for batch in (one, two)]
        assert torch.equal(before[0], after[0])
        assert (before[1] - after[1]).abs().max() > 1e-4

    @pytest.mark.parametrize("base", BASES)
    def test_rows_that_lack_something(self, base):
        model = tiny(base).eval()
        lacking = [row(left=None), row(right=None), row(text=""), row(left=None, right=None)]
        with torch.no_grad():
            together = model(batch_of(model, row(), *lacking)).logits["fused"]
            for i, one in enumerate(lacking, 1):
                torch.testing.assert_close(model(batch_of(model, one)).logits["fused"][0], together[i], rtol=0, atol=1e-6)
            none = model(Batch({}, targets=torch.zeros(2, dtype=torch.int64)))
        assert none.logits["fused"].shape == (2, 2)
        assert not none.present["fused"].any()

    def test_the_norm_before_the_head(self):
        assert not isinstance(tiny().answers[0], nn.LayerNorm)
        model = tiny(normed=True).eval()
        norm, first = model.answers[:2]
        assert isinstance(norm, nn.LayerNorm)
        assert (first.in_features, first.out_features) == (128, 128)
        assert norm.normalized_shape == (128,)
        assert tiny("beit_3", normed=True).answers[0].normalized_shape == (256,)

    @pytest.mark.parametrize("base", [pytest.param(base, marks=[pytest.mark.slow] * (base != "vlmo")) for base in BASES])
    def test_it_learns_what_only_all_three_tell(self, base):
        torch.manual_seed(0)
        model = tiny(base).train()
        rows = [row(*pair, text) for pair in PAIRS for text in SENTENCES]
        targets = torch.tensor([int(true(*pair)) for pair in PAIRS for true in SENTENCES.values()])
        batch = batch_of(model, *rows, targets=targets)
        objective, optimizer = make("objective", "cross_entropy"), torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(60):
            loss = objective(model, batch).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.2
        assert model.classify(rows).argmax(1).tolist() == targets.tolist()

    @pytest.mark.parametrize("base", BASES)
    def test_it_begins_where_the_model_inside_ended(self, base, tmp_path):
        trained = build(**BASES[base])
        save(trained, tmp_path)
        model = tiny(base)
        parts = tuple(name for name, _ in model.named_children() if name not in ("answers", "schedule"))
        take_parts(model, [Stage(recipe="pretrain", parts=parts)], [tmp_path])
        theirs = trained.state_dict()
        assert all(torch.equal(x, theirs[name]) for name, x in model.state_dict().items() if not name.startswith("answers."))

    @pytest.mark.parametrize("base", BASES)
    def test_a_file_rebuilds_it(self, base, tmp_path):
        model = tiny(base, normed=True)
        model.trained = True
        again = load(save(model, tmp_path))
        np.testing.assert_array_equal(again.classify([row()]), model.classify([row()]))

    def test_a_model_that_reads_no_text_beside_a_picture_is_refused(self):
        with pytest.raises(ZooError, match=r"nlvr2\.base: 'coca' reads no text beside a picture: write albef, blip, vlmo or beit_3"):
            build("nlvr2", base={"name": "coca", "vision": LOOKS, "dim": 8, "queries": 3})


class TestConsistency:
    def test_a_sentence_counts_when_all_of_its_rows_are_right(self):
        right, of = np.array([1.0, 1, 1, 0, 1, 0]), np.array([7, 7, 3, 3, 5, 4])
        assert consistency(right, of) == 0.5  # 7 and 5 of four

    def test_half_right_is_not_right(self):
        assert consistency(np.array([0.9, 1.0]), np.array([0, 1])) == 0.5


class TestRun:
    def test_metrics(self, outcome):
        arm = json.loads((outcome.folder / "metrics.json").read_text())["arms"]["tiny"]
        keys = [(r["protocol"], r["subset"], r["input"], r["queries"]) for r in arm["records"]]
        shown = ["all", "image+image_2", "image+text", "image_2+text", "image", "image_2", "text"]
        assert sorted(keys) == sorted([*(("classes", "all", name, 32) for name in shown), ("classes", "missing_50", "all", 32)])
        assert {"macro_f1", "shapley", "gradient_share"} < arm.keys()
        assert arm["consistency"].keys() == {*shown}
        assert arm["shapley"].keys() == {"image", "image_2", "text"}

    def test_consistency_is_the_authors(self, outcome, data):
        """By another way: what `classify` says of each row, and a dictionary of sentences that one wrong row spoils."""
        rows = data.split("test")
        guesses = zoo.load(outcome.folder).classify([data.rows[int(i)] for i in rows]).argmax(1)
        fine = {}
        for guess, i in zip(guesses, rows, strict=True):
            part, of, _, sentence = data.row_ids[i].split("-")
            fine[part, of, sentence] = fine.get((part, of, sentence), True) and guess == data.labels[i]
        arm = outcome.metrics["arms"]["tiny"]
        assert arm["consistency"]["all"] == pytest.approx(sum(fine.values()) / len(fine))
        assert outcome.recall == pytest.approx((guesses == data.labels[rows]).mean())

    def test_verdict_and_report(self, outcome):
        assert re.match(r"VERDICT: \w+ \| accuracy=0\.\d{3} \| baseline blip=", outcome.verdict)
        assert outcome.missed
        page = (outcome.folder / "report.html").read_text()
        for says in ("Accuracy", "Consistency", "image+image_2 only", "50 % missing", "Macro f1"):
            assert says in page, says
        written = card(zoo.load(outcome.folder), outcome.folder)
        assert "`image`, `image_2`, `text`" in written
        assert "Suhr et al." in written

    def test_validate_says_what_is_cut(self, root):
        recipe = load_recipe({**TINY, "model": {"name": "nlvr2", "base": {**BASES["albef"], "length": 5}}})
        report = validate(recipe, data_root=root, rows=8)
        assert (report.faults, report.texts.limit, report.texts.longest) == ([], 5, 5)
        assert report.texts.cut == 8

    @pytest.mark.slow
    def test_the_commands(self, root, outcome, tmp_path):
        recipe = tmp_path / "tiny.yaml"
        recipe.write_text(json.dumps({**TINY, "out": str(tmp_path / "run")}))
        said = invoke("validate", recipe, "--data", root)
        assert said.exit_code == 0, said.output
        said = invoke("validate", recipe)  # rows are made up
        assert said.exit_code == 0, said.output
        said = invoke("eval", outcome.folder, "--data", root)
        assert said.exit_code == 3, said.output  # the floor
        assert said.stdout.splitlines()[0].split() == ["subset", "input", "accuracy", "interval", "rows"]


@pytest.mark.slow
def test_it_learns_to_tell(root, data, tmp_path):
    outcome = zoo.run(TINY, out=tmp_path / "x", run__steps=150, classify__missing=[], data_root=root)
    arm = outcome.metrics["arms"]["x"]
    records = {r["input"]: r["recall"] for r in arm["records"]}
    assert records["all"] > 0.9
    assert arm["consistency"]["all"] > 0.75
    assert records["all"] > max(records[name] for name in records if name != "all") + 0.1
    assert len(every_subset(zoo.load(outcome.folder), data, data.split("test"))) == 7
