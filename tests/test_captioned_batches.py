"""Pictures with texts on their way into training: batches and their ids, chains of shared texts, what fits what, made-up rows."""

import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.batches import CaptionedRows, batches_of, check_fit, lengths_of, shown_of, training_rows
from zoo.data._captioned import Captioned, Pictures, each_once, linked
from zoo.errors import Failure, ZooError
from zoo.feature_cache import feature_cache
from zoo.opened import open_rows
from zoo.recipe import load_recipe
from zoo.registry import build, make, register
from zoo.shown import check_shown, draw_shown
from zoo.train import make_accelerator, make_order, train
from zoo.types import CaptionedData
from zoo.validate import validate

COLOURS = ("red", "green", "blue", "black")
SMALL = {"dim": 16, "layers": 1, "heads": 2}
TINY = {"name": "tiny_image", **SMALL, "image_size": 16}
WORDS = {"name": "tiny_text", **SMALL}
NOTES = {"name": "planted_notes", "notes": 100, "users": 60, "image_size": 16}
RECIPE = {
    "model": {"name": "clip", "vision": TINY, "dim": 16},
    "data": "colours",
    "objective": {"name": "infonce", "on": ["image", "text"]},
    "optimizer": {"lr": 1e-3},
    "run": {"steps": 2, "batch_size": 4, "log_every": 1, "device": "cpu"},
}


def png(colour):
    file = BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def colours(train=12):
    """Picture i is of colour i modulo 4; texts 0..3 name a colour, text 4 + i is picture i's own; train has both of each picture."""
    pictures = Pictures([png(COLOURS[i % 4]) for i in range(train + 8)])
    captions = [f"a {c} square" for c in COLOURS] + [f"number {i} of the squares, which is {COLOURS[i % 4]}" for i in range(train + 8)]
    both = np.array([[i, c] for i in range(train) for c in (i % 4, 4 + i)])
    pairs = {"train": both, "val": np.array([[i, 4 + i] for i in range(train, train + 4)])}
    pairs["test"] = np.array([[i, 4 + i] for i in range(train + 4, train + 8)])
    ids = [f"picture {i}" for i in range(train + 8)]
    return Captioned(pictures, ids, captions, pairs, kinds=None, statistics={}, fingerprint=f"colours {train}")


@pytest.fixture(autouse=True)
def _registered(own_registry):
    @register("data", "colours")
    def made(root, *, train: int = 12) -> CaptionedData:
        """Of this test."""
        return colours(train)


@pytest.fixture(scope="module")
def model():
    return build("clip", vision=TINY, dim=16)


class TestSubjects:
    def test_by_hand(self):
        pairs = np.array([[0, 0], [1, 0], [1, 1], [2, 1], [3, 2], [4, 3], [5, 3]])
        assert linked(pairs, 7).tolist() == [0, 0, 0, 1, 2, 2, 3]  # 0 and 2 through 1; the last has no text

    def test_the_order_of_pairs_means_nothing(self):
        draw = np.random.default_rng(0)
        pairs = np.stack([draw.integers(0, 60, 70), draw.integers(0, 50, 70)], 1)
        expected = linked(pairs, 60)
        assert len(set(expected.tolist())) > 5
        for _ in range(5):
            assert (linked(draw.permutation(pairs), 60) == expected).all()

    def test_equal_to_the_components_of_scipy(self):
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        draw = np.random.default_rng(1)
        pairs = np.stack([draw.integers(0, 200, 230), draw.integers(0, 180, 230)], 1)
        graph = coo_array((np.ones(230), (pairs[:, 0], 200 + pairs[:, 1])), shape=(380, 380))
        theirs, ours = connected_components(graph, directed=False)[1][:200], linked(pairs, 200)
        assert ((theirs[:, None] == theirs) == (ours[:, None] == ours)).all()

    def test_no_text_is_in_two_subjects(self):
        data = colours()
        of = {c: {int(data.subject[p]) for p, k in data.pairs("train").tolist() if k == c} for c in range(4)}
        assert all(len(found) == 1 for found in of.values())
        assert len(set().union(*of.values())) == 4

    def test_each_once(self):
        assert each_once(["a", "b", "a", "c", "b"])[0] == ["a", "b", "c"]
        assert each_once(["a", "b", "a", "c", "b"])[1].tolist() == [0, 1, 0, 2, 1]


class TestBatches:
    def test_what_a_batch_holds(self, model):
        data = colours()
        batch = batches_of(data, 0, model.processor, 8)[np.array([[0, 1, 5, 22]])]
        pairs = data.pairs("train")[[0, 1, 5, 22]]
        assert set(batch.inputs) == {"image", "text"}
        assert batch.ids.tolist() == data.subject[pairs[:, 0]].tolist()
        assert batch.ids.dtype == torch.int64
        assert batch.positive is batch.targets is batch.known is None
        for i, (picture, caption) in enumerate(pairs.tolist()):
            image, text = (
                model.processor({"image": data.pictures[picture]["image"], "text": data.captions[caption]})[k] for k in batch.inputs
            )
            assert torch.equal(batch.inputs["image"].values[i], image.values)
            assert batch.inputs["text"].values[i][batch.inputs["text"].mask[i]].tolist() == text.values.tolist()

    def test_each_process_gets_its_own(self, model):
        data, shares = colours(), np.array([[0, 1, 5], [7, 8, 9]])
        for process in (0, 1):
            batch = batches_of(data, process, model.processor, 0)[shares]
            assert batch.ids.tolist() == data.subject[data.pairs("train")[shares[process], 0]].tolist()

    def test_one_text_of_several_subjects(self, model):
        data = colours()
        data.subject = np.arange(len(data.pictures))  # as where a captioner wrote the texts
        shares = np.array([[0, 8, 2, 1], [16, 3, 10, 5]])  # the first text, a red square, thrice; that of 2 and 10 is green
        known = [batches_of(data, process, model.processor, 0)[shares].known.tolist() for process in (0, 1)]
        assert known == [[[0, 1], [0, 4], [1, 0], [1, 4], [2, 6]], [[0, -4], [0, -3], [2, -2]]]
        batch = batches_of(data, 0, model.processor, 0)[shares[:1]]
        assert batch.known.tolist() == [[0, 1], [1, 0]]
        itm = make("objective", "itm")
        assert not itm._allowed(batch, torch.ones(4).bool(), torch.ones(4).bool())[[0, 1], [1, 0]].any()

    def test_kept_rows_are_those_of_pairs_and_not_of_pictures(self, model):
        batches = batches_of(colours(), 0, model.processor, 100)
        first = batches[np.array([[0, 1]])].inputs["text"].mask.sum(1).tolist()  # one picture, two texts
        assert first == batches[np.array([[0, 1]])].inputs["text"].mask.sum(1).tolist()
        assert first[0] != first[1]

    def test_lengths_are_of_the_texts_of_pairs(self):
        data = colours()
        assert lengths_of(data).tolist() == [len(data.captions[c]) for _, c in data.pairs("train")]

    def test_training_rows(self):
        rows = list(training_rows(colours()))
        assert len(rows) == 24
        assert rows[1]["text"] == "number 0 of the squares, which is red"
        assert rows[0].keys() == {"id", "image", "text"}

    def test_rows_of_a_split(self):
        data = colours()
        rows = CaptionedRows(data, "test")
        assert len(rows) == 4
        assert rows[0]["text"] == "number 16 of the squares, which is red"
        assert rows[-1]["id"] == data.subject[19]
        with pytest.raises(IndexError):
            rows[4]

    def test_a_picture_that_went_bad(self, model):
        data = colours()
        data.pictures.files[0] = b"gone"
        with pytest.raises(Failure, match=r"picture 0: was decoded when the data set was loaded, and cannot be any more \(of no"):
            batches_of(data, 0, model.processor, 0)[np.array([[1]])]

    def test_too_few_pairs_for_a_batch(self):
        recipe = load_recipe(RECIPE, run__batch_size=64)
        with pytest.raises(ZooError, match="24 training pairs do not fill one batch of 64"):
            make_order(recipe, colours(), make_accelerator(recipe))


class TestCaptioned:
    def test_splits(self):
        with pytest.raises(ZooError, match="no split named 'dev'"):
            colours().pairs("dev")
        with pytest.raises(ZooError, match="no split named 'dev'"):
            colours().groups("dev")
        bare = {"kinds": None, "statistics": {}, "fingerprint": ""}
        assert Captioned(Pictures([b""]), [0], ["a"], {"test": np.zeros((1, 2), int)}, **bare).pairs("train").shape == (0, 2)
        with pytest.raises(ZooError, match=r"no split has a pair of a picture and a text \(splits: train\)"):
            Captioned(Pictures([b""]), [0], ["a"], {"train": np.zeros((0, 2), int)}, **bare)

    def test_what_is_given_out_can_be_changed(self):
        data = colours()
        data.pairs("train")[:] = 0
        assert data.pairs("train").any()

    def test_without_kinds_there_are_no_groups_and_nothing_is_planted(self):
        assert colours().groups("test") == {}
        assert colours().planted("test").tolist() == [False] * 4


class TestFit:
    def test_it_fits(self, model):
        check_fit(model, colours())

    @pytest.mark.parametrize(
        ("spec", "data", "says"),
        [
            ("clip", "notes", "this model learns from pictures with texts, and the data are pairs of items"),
            ("dual", "colours", "this model learns from pairs of items, and the data are pictures with texts"),
            ("classes", "colours", "this model learns from rows of known class, and the data are pictures with texts"),
        ],
    )
    def test_it_does_not(self, spec, data, says, model):
        models = {
            "clip": lambda: model,
            "dual": lambda: build("dual_encoder", text=WORDS, vision=TINY, dim=16),
            "classes": lambda: build("classifier", classes=2, encoders={"image": TINY, "text": WORDS}),
        }
        made = colours() if data == "colours" else make("data", NOTES, None)
        with pytest.raises(ZooError, match=re.escape(says)):
            check_fit(models[spec](), made)

    def test_no_feature_cache(self, model, tmp_path):
        recipe = load_recipe(RECIPE)
        recipe = replace(recipe, run=replace(recipe.run, feature_cache=tmp_path))
        frozen = model.requires_grad_(False)
        with (
            pytest.raises(ZooError, match=r"run\.feature_cache: it keeps the images of pairs of items, and these data are none"),
            feature_cache(recipe, colours(), frozen, make_accelerator(recipe)),
        ):
            pass
        model.requires_grad_(True)


class TestOpened:
    def test_of_the_data(self, model):
        notes = []
        opened = open_rows(load_recipe(RECIPE), None, colours(), 6, model, notes)
        assert opened.number == len(opened.rows) == 6
        assert opened.source == "20 pictures, 24 texts, 24 training pairs"
        assert notes == []
        batch = opened.batch(8)
        assert batch.ids.tolist() == [r["id"] for r in (*opened.rows, *opened.rows[:2])]

    def test_fewer_than_wanted(self, model):
        notes = []
        assert open_rows(load_recipe(RECIPE), None, colours(), 64, model, notes).number == 24
        assert notes == ["the data has 24 training pairs, fewer than 64"]

    def test_made_up(self, model):
        notes = []
        opened = open_rows(load_recipe(RECIPE, data="emoji_zh_en"), "/nowhere", None, 16, model, notes)
        assert opened.source == "made up"
        assert "MADE UP" in notes[0]
        same = [(a, b) for a in range(16) for b in range(a) if opened.rows[a]["id"] == opened.rows[b]["id"]]
        assert same == [(8, 0)]
        assert opened.rows[8]["text"] == opened.rows[0]["text"]


def test_validate_counts_negatives():
    report = validate(load_recipe(RECIPE), loaded=colours(), rows=8)
    ids = [row["id"] for row in open_rows(load_recipe(RECIPE), None, colours(), 8, build("clip", vision=TINY, dim=16), []).rows]
    negatives = [sum(a != b for b in ids) for a in ids]
    assert report.contrast.positives == 8
    assert report.contrast.negatives == pytest.approx(np.mean(negatives))
    assert report.contrast.fewest == min(negatives)


def test_it_trains(tmp_path):
    model = zoo.train(RECIPE, out=tmp_path / "run")
    assert model.trained


class TestShown:
    """Training on one half of pairs."""

    def batch(self, model, shares, seed=0):
        data = colours()
        return batches_of(data, 0, model.processor, 8, shown_of(data, shares, seed))[np.arange(24)[None]]

    @pytest.mark.parametrize("kind", ["image", "text"])
    def test_one_half_alone(self, model, kind, monkeypatch):
        if kind == "text":
            monkeypatch.setattr(Pictures, "__getitem__", None)  # no picture is decoded that is not shown
        batch = self.batch(model, {kind: 1.0})
        assert [*batch.inputs] == [kind]
        assert batch.inputs[kind].present is None
        assert len(batch.ids) == 24

    def test_shares_are_exact_and_of_the_seed(self, model):
        found = [self.batch(model, {"pair": 2.0, "image": 1.0, "text": 1.0}, seed) for seed in (0, 0, 1)]
        there = [torch.stack([b.inputs[kind].present for kind in ("image", "text")], 1).int() for b in found]
        for each in there:
            assert sorted(each.tolist()) == [[0, 1]] * 6 + [[1, 0]] * 6 + [[1, 1]] * 12
        assert torch.equal(there[0], there[1])
        assert not torch.equal(there[0], there[2])

    def test_of_pairs_alone_nothing_changes(self, model):
        plain, shown = self.batch(model, {}), self.batch(model, {"pair": 3.0})
        assert torch.equal(plain.inputs["image"].values, shown.inputs["image"].values)
        assert torch.equal(plain.inputs["text"].values, shown.inputs["text"].values)
        assert shown.inputs["text"].present is None

    def test_what_is_measured_shows_both(self):
        rows = CaptionedRows(colours(), "test")
        assert all(row.keys() == {"id", "image", "text"} for row in rows)

    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_few_pairs(self, count):
        kinds = draw_shown(count, {"image": 1.0, "text": 1.0, "pair": 1.0}, 3)
        assert kinds.shape == (count, 2)
        assert kinds.any(1).all()

    def test_other_data_have_no_halves(self):
        data = make("data", NOTES, None)
        with pytest.raises(ZooError, match=r"run\.shows: it is of pictures with texts, and the data are pairs of items: leave it out"):
            shown_of(data, {"image": 1.0}, 0)
        assert shown_of(data, {}, 0) is None

    @pytest.mark.parametrize("shows, said", [("{image: 0}", "greater than 0"), ("{picture: 1}", "'pair', 'image' or 'text'")])
    def test_shares_that_are_none(self, shows, said):
        with pytest.raises(ZooError, match=f"run.shows.*{said}"):
            load_recipe(RECIPE, f"run.shows={shows}")

    @pytest.mark.parametrize("objective", ["infonce", "siglip", "itc", "itm", "lm", "mlm"])
    def test_objectives_of_pairs(self, objective):
        made = make("objective", objective)
        for shows in ({}, {"pair": 1.0}, {"pair": 0.1, "text": 1.0}):
            check_shown(made, shows)
        for shows, said in (({"text": 1.0}, "text"), ({"image": 1.0, "text": 1.0}, "image and text")):
            wrong = rf"run\.shows: training shows {said} alone, of which {objective} learns nothing: add pair: 1, or leave {objective} out"
            with pytest.raises(ZooError, match=wrong):
                check_shown(made, shows)

    def test_objectives_that_hide(self):
        texts = {"name": "mdm", "image": 0, "pair_text": 0, "pair_image": 0}
        check_shown(make("objective", texts), {"text": 1.0})
        with pytest.raises(ZooError, match=r"shows image and pair alone, of which mdm learns nothing: add text: 1"):
            check_shown(make("objective", texts), {"image": 1.0, "pair": 1.0})
        together = make("objective", {"name": "together", "of": [texts, "itc", "itm"]})
        check_shown(together, {"text": 1.0, "pair": 1.0})
        with pytest.raises(ZooError, match=r"shows text alone, of which itc learns nothing"):
            check_shown(together, {"text": 1.0})

    def test_what_teaches_nothing_is_refused_before_the_first_step(self, tmp_path):
        with pytest.raises(ZooError, match=r"run\.shows: training shows text alone, of which infonce learns nothing"):
            train(load_recipe(RECIPE, "run.shows={text: 1}", out=str(tmp_path / "a")))
        blind = {**RECIPE, "model": {"name": "visual_tokenizer", "codes": 5, "teacher": TINY, "image_size": 16}, "objective": "vq_kd"}
        with pytest.raises(ZooError, match=r"this model looks at image, and no training row shows any of it: .* or run\.shows"):
            train(load_recipe(blind, "run.shows={text: 1}", out=str(tmp_path / "b")))

    @pytest.mark.parametrize("here", [True, False])
    def test_validation_looks_at_what_is_shown(self, here):
        recipe = load_recipe(RECIPE, "run.shows={text: 1}", **({} if here else {"data": "emoji_zh_en"}))
        opened = open_rows(recipe, "/nowhere", colours() if here else None, 4, build("clip", vision=TINY, dim=16), [])
        assert [*opened.batch(4).inputs] == ["text"]
