"""The diagnosis: models whose use of the image is known get exactly the numbers that it implies."""

import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.models.llama import modeling_llama

import zoo
from zoo import cli
from zoo.collate import PairCollate
from zoo.diagnose import diagnose, saliency_figure, verdict
from zoo.errors import ZooError
from zoo.evaluate._unavailable import Unavailable
from zoo.evaluate.gates import gate_shares
from zoo.evaluate.gradients import gradient_shares
from zoo.evaluate.modalities import Altered, exchange, expected_hits, modalities, nothing, shapley, subsets
from zoo.evaluate.retrieval import embedding_scorer, multi, one_target, recalls
from zoo.evaluate.saliency import batch_saliency, saliency
from zoo.examine import WHAT, Subject
from zoo.files import write_json
from zoo.hub import save
from zoo.recipe import dump, load_recipe
from zoo.registry import build, make
from zoo.train import train
from zoo.types import ModalityInputs, ModelOutput, Pair

TINY = {
    "name": "notellm2",
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 2, "heads": 2, "vocab_size": 512},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": "linear",
    "dim": 16,
    "language": "en",
    "train_vision": True,
    "content_length": 24,
}
DATA = {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}}
NOTES = [
    {"id": 0, "title": "red mug", "content": "holds tea", "image": Image.new("RGB", (16, 16), "red")},
    {"id": 1, "title": "blue mug", "image": Image.new("RGB", (16, 16), "blue")},
    {"id": 2, "title": "a hat of wool"},
    {"id": 3, "title": "green hat", "content": "for summer", "image": Image.new("RGB", (16, 16), "green")},
]


@pytest.fixture(scope="module")
def data():
    return make("data", DATA)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run of NoteLLM-2 that logged its gradients."""
    recipe = load_recipe(
        {
            "model": TINY | {"fusion": ["micl", "gated_late"]},
            "data": DATA,
            "objective": "pair_infonce",
            "run": {"steps": 4, "batch_size": 10, "device": "cpu", "log_every": 1, "log_gradients": True},
            "evaluate": {"protocols": ["multi"], "k": [3], "main": {"protocol": "multi", "k": 3}, "bootstrap": 50},
            "out": str(tmp_path_factory.mktemp("trained") / "run"),
        }
    )
    train(recipe, loaded=data)
    return recipe.out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def found(trained, data):
    return diagnose(trained, loaded=data, batches=2, permutations=2)


def tiny(fusion, **changes):
    torch.manual_seed(0)
    return build(**TINY | {"fusion": fusion} | changes).eval()


def batch_of(model, notes=NOTES):
    half = len(notes) // 2
    return PairCollate(model.processor)([Pair(notes[i], notes[i + half]) for i in range(half)])


class Sum(nn.Module):
    """A model that sees what it weighs, and nothing else: the weighted sum of the vectors that stand in a row."""

    outputs, dim = ("note",), 8

    def __init__(self, **weights):
        super().__init__()
        self.weights = weights
        self.scale = nn.Parameter(torch.ones(()))
        self.processor = SumProcessor()

    def forward(self, batch):
        some = next(iter(batch.inputs.values())).values
        x = torch.zeros(len(some), self.dim)
        for name, weight in self.weights.items():
            if (given := batch.inputs.get(name)) is not None:
                there = torch.ones(len(x)) if given.present is None else given.present.float()
                x = x + weight * there[:, None] * given.values
        return ModelOutput({"note": x * self.scale})


class SumProcessor:
    def __call__(self, row):
        given = {"text": row.get("title"), "image": row.get("image")}
        return {name: ModalityInputs(torch.as_tensor(x)) for name, x in given.items() if x is not None}

    def keys(self):
        return ("title", "image")

    def sees(self, row):
        return any(row.get(key) is not None for key in self.keys())


def known(model, tmp_path, *, notes=120, k=5, **evaluate):
    """The subject of notes in 12 groups, of which text and image each tell as much."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(12, 8))
    rows = [
        {"id": i, **{key: (centres[i % 12] + random.normal(size=8)).astype(np.float32) for key in ("title", "image")}} for i in range(notes)
    ]
    rows[7].pop("image")
    rows[8].pop("title")
    pairs = np.array([(i, i + 12) for i in range(notes - 12)])
    settings = {"k": [k], "protocols": ["multi"], "main": {"protocol": "multi", "k": k}, "bootstrap": 50} | evaluate
    recipe = load_recipe({"model": TINY, "data": DATA, "objective": "pair_infonce", "evaluate": settings})
    short = np.arange(notes) % 5 == 0
    data = SimpleNamespace(notes=rows, pairs=lambda split: pairs, pool=lambda split: np.arange(notes), short=lambda: short)
    return Subject(tmp_path, model.eval(), recipe, data, batches=2, permutations=3, seed=0)


class TestWhatIsKnown:
    def test_a_model_that_ignores_images_gains_and_loses_exactly_nothing(self, tmp_path):
        found = known(Sum(text=1.0, image=0.0), tmp_path).examine(["permutation", "shapley", "outputs"])
        assert [r["drop"] for r in found["permutation"]["records"]] == [{"mean": 0, "low": 0, "high": 0}] * 3
        values = {(r["subset"], r["modality"]): r["mean"] for r in found["shapley"]["values"]}
        assert all(values[subset, "image"] == 0 for subset in ("all", "short_query", "short_target"))
        assert values["all", "text"] > 0.1
        assert verdict(5, 108, found).startswith("No use of the image is seen: showing the image adds +0.00")

    def test_a_model_that_ignores_text_owes_the_image_everything(self, tmp_path):
        subject = known(Sum(text=0.0, image=1.0), tmp_path)
        found = subject.examine(["permutation", "shapley"])
        values = {r["modality"]: r["mean"] for r in found["shapley"]["values"] if r["subset"] == "all"}
        assert values["text"] == 0
        whole, chance = (subject._expected(frozenset(s))["all"].mean() for s in (("text", "image"), ()))
        np.testing.assert_allclose(values["image"], whole - chance, rtol=1e-12)
        permuted = found["permutation"]["records"][0]
        assert permuted["permuted"] < 3 * chance < permuted["recall"]
        np.testing.assert_allclose(permuted["drop"]["mean"], permuted["recall"] - permuted["permuted"], rtol=1e-12)
        assert permuted["between_permutations"] > 0
        assert verdict(5, 108, found).startswith("The image is used: showing the image adds +0.")

    def test_recall_of_each_subset_is_that_of_an_evaluation(self, tmp_path):
        subject = known(Sum(text=1.0, image=1.0), tmp_path)
        records = [r for r in subject.shapley()["missing"] if r["subset"] == "all"]
        assert [r["shown"] for r in records] == [["text", "image"], ["text"], ["image"], []]
        for record, key in zip(records[1:3], ("title", "image"), strict=True):
            rows = np.stack([row.get(key, np.zeros(8, np.float32)) for row in subject.data.notes])
            (hits,) = recalls(embedding_scorer(rows), [subject.tasks["all"]], [5])
            assert record["recall"] == hits.mean()
            assert record["cost"]["mean"] == pytest.approx(records[0]["recall"] - hits.mean(), abs=1e-12)
        assert records[3]["recall"] == pytest.approx(5 / 119)

    def test_without_subsets_there_is_one(self, tmp_path):
        assert list(known(Sum(text=1.0, image=1.0), tmp_path, subsets=False).tasks) == ["all"]

    def test_what_the_model_lacks_is_listed(self, tmp_path):
        found = known(Sum(text=1.0, image=1.0), tmp_path).examine(WHAT)
        assert set(found["not_available"]) == {"saliency", "gates", "gradients"}
        assert "shows its attention, and this model has 0" in found["not_available"]["saliency"]
        assert "gated_late, and this model has 0" in found["not_available"]["gates"]
        assert "does not say which of its modules" in found["not_available"]["gradients"]

    def test_data_without_images_is_refused(self, tmp_path, monkeypatch):
        model = Sum(text=1.0, image=1.0)
        subject = known(model, tmp_path)
        for row in subject.data.notes:
            row.pop("image", None)
        with pytest.raises(ZooError, match="none of the 120 notes of split 'test' shows an image"):
            Subject(tmp_path, model, subject.recipe, subject.data, batches=1, permutations=1, seed=0)
        subject.data.notes[3]["image"] = np.ones(8, np.float32)
        alone = Subject(tmp_path, model, subject.recipe, subject.data, batches=1, permutations=1, seed=0)
        assert alone.examine(["permutation"])["not_available"] == {
            "permutation": "one note alone shows an image: there is none to exchange it with"
        }

    def test_modalities_follow_from_what_a_model_reads(self):
        keys = ("title", "content", "image", "audio")
        assert modalities(keys) == {"text": ("title", "content"), "image": ("image",), "audio": ("audio",)}
        assert modalities(("image",)) == {"image": ("image",)}


class TestShapley:
    @pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
    def test_values_sum_to_all_minus_nothing_and_equal_the_mean_over_orders(self, names):
        random = np.random.default_rng(0)
        value = {some: random.random(4) for some in subsets(names)}
        assert len(value) == 2 ** len(names)
        found = shapley(value, names)
        np.testing.assert_allclose(sum(found.values()), value[frozenset(names)] - value[frozenset()], rtol=1e-12)
        orders = list(itertools.permutations(names))
        for name in names:
            before = [frozenset(order[: order.index(name)]) for order in orders]
            np.testing.assert_allclose(found[name], np.mean([value[s | {name}] - value[s] for s in before], axis=0), rtol=1e-12)

    @pytest.mark.parametrize("protocol", [multi, one_target])
    def test_without_ties_the_expected_recall_is_the_recall(self, protocol):
        random = np.random.default_rng(0)
        vectors, pairs = random.normal(size=(40, 3)), random.permutation(40).reshape(-1, 2)
        pairs = np.concatenate([pairs, np.stack([pairs[:, 0], np.roll(pairs[:, 1], 1)], 1)])
        task = protocol(pairs, np.arange(40))
        (hits,) = recalls(embedding_scorer(vectors), [task], [7])
        assert np.array_equal(expected_hits(embedding_scorer(vectors), *task, 7), hits[:, 0])

    def test_all_tied_is_chance(self):
        task = multi(np.array([[0, 1], [0, 2], [3, 4]]), np.arange(11))
        np.testing.assert_allclose(expected_hits(nothing(11), *task, 4), [4 / 10, 4 / 10], rtol=1e-15)

    def test_tied_partners_share_the_places_that_are_left(self):
        scores = np.array([9.0, 5.0, 3.0, 3.0, 3.0, 1.0], np.float32)
        task = multi(np.array([[0, 2], [0, 5]]), np.arange(6))  # above the tie of three stands note 1, below it note 5
        for k, expected in ((1, 0), (2, 1 / 6), (3, 2 / 6), (4, 3 / 6), (5, 1)):
            assert expected_hits(lambda asked: scores[None], *task, k) == pytest.approx(expected)


class TestExchange:
    def test_is_one_cycle_through_the_notes_with_an_image(self):
        having = np.array([1, 3, 4, 7, 8])
        image_of = exchange(10, having, seed=0)
        at, seen = 1, []
        for _ in having:
            at = image_of[at]
            seen.append(at)
        assert sorted(seen) == having.tolist()
        assert [image_of[i] for i in (0, 2, 5, 6, 9)] == [0, 2, 5, 6, 9]
        assert not np.array_equal(image_of, exchange(10, having, seed=1))

    def test_needs_two(self):
        with pytest.raises(ZooError, match="and 1 of them has one"):
            exchange(10, np.array([4]), seed=0)

    def test_rows_keep_all_but_the_image(self):
        rows = Altered(NOTES, (), np.array([3, 0, 2, 1]))
        assert rows[0] == NOTES[0] | {"image": NOTES[3]["image"]}
        assert rows[2] == NOTES[2]
        assert set(Altered(NOTES, ("title", "content"))[0]) == {"id", "image"}


class TestSaliency:
    @pytest.mark.parametrize("fusion", ["early", ["micl", "gated_late"]])
    def test_places_of_the_image_and_of_the_word(self, fusion):
        model = tiny(fusion)
        batch = batch_of(model)
        text, out = batch.inputs["text"], model(batch)
        more = out.tokens["image"].tokens.shape[1] - 1  # a slot becomes so many more tokens
        tags = [int(model.processor.tokenizer.roles[role] is not None) for role in ("image_start", "image_end")]
        for i, slots in enumerate(text.extra["slots"]):
            place = [int(out.aux[name][i]) for name in ("read", "image_first", "image_last")]
            if not slots.any():
                assert place == [int(text.extra["anchor.note"][i]), -1, -1]
                continue
            slot = int(slots.nonzero())
            last = slot + more + tags[1] if fusion == "early" else int(text.extra["anchor.visual"][i]) + more + 3
            assert place == [int(text.extra["anchor.note"][i]) + more, slot - tags[0], last]

    @pytest.mark.parametrize("fusion", ["early", ["micl", "gated_late"]])
    def test_equals_the_derivative_by_a_factor_of_one_on_the_attention(self, fusion, monkeypatch):
        """The definition of the released code: dL/dM for attention M * A at M = 1, here by a patched attention."""
        model = tiny(fusion).double()
        batch = batch_of(model)
        scores = batch_saliency(model, in_double(batch), scale=20.0)
        gradients, out = by_factors(model, in_double(batch), monkeypatch)
        rows = [i for i in range(len(NOTES)) if out.aux["image_first"][i] >= 0]
        assert scores.shape == (2, len(rows), 3)
        for layer, gradient in enumerate(gradients):
            for row, i in enumerate(rows):
                read, first, last = (int(out.aux[name][i]) for name in ("read", "image_first", "image_last"))
                expected = saliency(torch.ones_like(gradient[i : i + 1]), gradient[i : i + 1], read, (first, last))
                torch.testing.assert_close(
                    scores[layer, row], torch.cat(expected), rtol=1e-5, atol=1e-8
                )  # transformers' softmax is in float32
        assert (scores[0] > 0).all()
        assert (scores[-1, :, 2] == 0).all()  # of the last layer one row alone is read

    def test_the_factors_derivative_is_that_of_finite_differences(self, monkeypatch):
        model = tiny("early").double()
        batch = in_double(batch_of(model))
        gradients, _ = by_factors(model, batch, monkeypatch)
        for layer, gradient in enumerate(gradients):
            steepest = tuple(int(i) for i in np.unravel_index(int(gradient.abs().argmax()), gradient.shape))
            losses = []
            for step in (0.05, -0.05):  # the norms of the backbone compute in float32, so that smaller ones drown
                factor = torch.ones_like(gradient)
                factor[steepest] += step
                losses.append(float(by_factors(model, batch, monkeypatch, {layer: factor}, differentiate=False)))
            assert (losses[0] - losses[1]) / 0.1 == pytest.approx(float(gradient[steepest]), rel=2e-3)

    def test_leaves_the_model_as_it_was(self):
        model = tiny("early", train_vision=False)
        model.backbone.model.layers[0].requires_grad_(False)
        batch = batch_of(model)
        before = model(batch).embeddings["note"]
        flags = [p.requires_grad for p in model.parameters()]
        assert float(batch_saliency(model, batch, scale=20.0).abs().sum()) > 0
        assert [p.requires_grad for p in model.parameters()] == flags
        assert torch.equal(model(batch).embeddings["note"], before)
        assert all(p.grad is None for p in model.parameters())
        assert not model.backbone.model.layers[0].self_attn._forward_hooks
        assert model.backbone.model.config._attn_implementation != "eager"

    def test_a_frozen_backbone_has_one_too(self):
        model = tiny("early")
        model.requires_grad_(False)
        assert float(batch_saliency(model, batch_of(model), scale=20.0)[0].sum()) > 0

    def test_needs_tokens_of_an_image(self):
        model = tiny(["text_only", "gated_late"])
        with pytest.raises(Unavailable, match="no tokens of an image stand in the sequence"):
            batch_saliency(model, batch_of(model), scale=20.0)


def in_double(batch):
    return batch._replace(inputs=batch.inputs | {"image": batch.inputs["image"]._replace(values=batch.inputs["image"].values.double())})


def by_factors(model, batch, monkeypatch, given=None, *, differentiate=True):
    """dL/dM of every layer, M a factor on its attention; or the loss alone."""
    factors = {}

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
        factor = (given or {}).get(module.layer_idx, torch.ones_like(weights)).requires_grad_()
        factors[module.layer_idx] = factor
        weights = weights * factor
        return (weights @ value).transpose(1, 2).contiguous(), weights

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", attend)
        model.backbone.model.set_attn_implementation("eager")
        out = model(batch)
        x = nn.functional.normalize(out.embeddings["note"], dim=-1)
        logits = (20.0 * x @ x.T).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
        own = nn.functional.cross_entropy(logits, batch.positive)
        model.backbone.model.set_attn_implementation("sdpa")
    return (torch.autograd.grad(own, [factors[i] for i in sorted(factors)]), out) if differentiate else own.detach()


class TestGates:
    @pytest.mark.parametrize("name", ["gated_late", "attention"])
    @pytest.mark.parametrize("count", [2, 3])
    def test_shares_say_what_the_result_is_made_of(self, name, count):
        names = ["note", "image", "audio"][:count]
        combine = make("fusion", name, names, 5)
        for parameter in combine.parameters():
            nn.init.normal_(parameter)
        x = {n: torch.randn(8, 5) for n in names}
        present = {n: (torch.arange(8) >> bit) % 2 == 0 for bit, n in enumerate(names)}
        shares = combine.shares(x, present)
        blanked = {n: x[n] * present[n][:, None] for n in names}
        torch.testing.assert_close(sum(shares[n] * blanked[n] for n in names), combine(x, present))
        there = torch.stack(list(present.values())).any(0)
        torch.testing.assert_close(sum(shares.values()), there[:, None].expand(8, 5).float())
        assert all((shares[n][~present[n]] == 0).all() for n in names)

    def test_by_output_and_by_what_is_there(self):
        model = tiny(["micl", "gated_late"])
        nn.init.zeros_(model.combine.gates[0].weight)
        records = {(r["output"], tuple(r["present"]), r["modality"]): r for r in gate_shares(model, [batch_of(model)] * 2)}
        both, alone = records["note", ("note", "image"), "image"], records["note", ("note",), "note"]
        assert (both["notes"], both["mean"], both["spread"], both["between_notes"]) == (6, 0.5, 0, 0)
        assert (alone["notes"], alone["mean"]) == (2, 1)
        assert ("visual", ("note",), "note") not in records  # a note without an image has no such word
        assert not model.combine._forward_pre_hooks

    def test_spread_over_features_and_notes(self):
        model = tiny(["early", "gated_late"])
        seen = []
        share = model.combine.shares
        model.combine.shares = lambda x, present: seen.append(share(x, present)) or seen[-1]
        (record,) = [r for r in gate_shares(model, [batch_of(model)]) if (len(r["present"]), r["modality"]) == (2, "image")]
        shares = seen[0]["image"][[0, 1, 3]].double()
        assert record["mean"] == pytest.approx(float(shares.mean()))
        assert record["spread"] == pytest.approx(float(shares.std(correction=0)))
        assert record["between_notes"] == pytest.approx(float(shares.mean(1).std(correction=0)))


class TestGradients:
    def test_the_modules_norms_make_up_the_whole(self, trained):
        lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
        parts = [{k: v for k, v in line.items() if k.startswith("squared_gradient/")} for line in lines]
        modules = ("backbone", "vision", "connector", "combine", "late", "project", "objective")
        assert all(set(part) == {f"squared_gradient/{m}" for m in modules} for part in parts)
        assert [sum(part.values()) for part in parts] == pytest.approx([line["grad_norm"] ** 2 for line in lines], rel=1e-4)

    def test_shares_sum_to_one(self, found):
        shares = found.found["gradients"]["shares"]
        assert list(shares) == ["image", "text", "shared"]
        assert np.sum(list(shares.values()), axis=0) == pytest.approx(np.ones(4), abs=2e-6)  # rounded to six places
        assert sum(found.found["gradients"]["mean"].values()) == pytest.approx(1)

    def test_by_hand(self):
        model = SimpleNamespace(modality_modules={"image": ["vision", "late"], "text": ["backbone"]})
        logged = {"vision": 1.0, "late": 2.0, "backbone": 4.0, "objective": 1.0}
        log = [{"step": 1, "loss": 0.0}, {"step": 2, **{f"squared_gradient/{k}": v for k, v in logged.items()}}]
        found = gradient_shares(model, [*log, {"step": 3, "squared_gradient/vision": 0.0}])
        assert found["steps"] == [2]
        assert found["shares"] == {"image": [0.375], "text": [0.5], "shared": [0.125]}

    @pytest.mark.parametrize("log, says", [([], "run.log_gradients=true"), ([{"squared_gradient/vision": None}], "no gradient reached")])
    def test_what_there_is_not(self, log, says):
        with pytest.raises(Unavailable, match=says):
            gradient_shares(SimpleNamespace(modality_modules={"image": ["vision"]}), log)


class TestARun:
    def test_everything_is_measured_and_written(self, found, trained):
        written = json.loads((trained / "diagnosis.json").read_text())
        assert set(WHAT) <= set(written)
        assert written["not_available"] == {}
        assert written["verdict"] == found.verdict
        assert written["command"] == f"zoo diagnose {trained} --what {','.join(WHAT)} --split test --batches 2 --permutations 2 --seed 0"
        assert written["machine"]["device"] == "cpu"
        assert set(written["seconds"]) == set(WHAT)
        for layer in written["saliency"]["layers"]:
            assert sum(layer["shares"].values()) == pytest.approx(1)
            assert all(v >= 0 for v in layer["spread"].values())
        assert [r["output"] for r in written["outputs"]["records"]] == ["note", "visual"]

    def test_the_scale_is_the_trained_one(self, found, trained):
        last = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
        assert found.found["saliency"]["scale"] == last["scale"] != pytest.approx(np.exp(3), abs=1e-9)

    def test_it_stands_in_the_report(self, found, trained):
        page = (trained / "report.html").read_text()
        for says in (
            found.verdict,
            "Is the image used?",
            "Shapley values on recall@3",
            "Images exchanged",
            "Saliency",
            "Gates",
            "Gradient over",
        ):
            assert says.replace("+", "&#43;") in page or says in page
        assert {"saliency.png", "modalities.png", "gradients.png"} <= {p.name for p in (trained / "plots").iterdir()}

    def test_the_same_seed_gives_the_same_and_a_part_alone_the_same_as_among_all(self, found, run, data):
        again = diagnose(run, what=["saliency", "permutation"], loaded=data, batches=2, permutations=2).found
        assert again["saliency"] == found.found["saliency"]
        assert again["permutation"] == found.found["permutation"]
        assert "shapley" not in json.loads((run / "diagnosis.json").read_text())

    def test_recall_is_that_of_the_evaluation(self, found, trained, data):
        (metric,) = [m for m in zoo.evaluate(trained, loaded=data) if (m.subset, m.input) == ("all", "both")]
        record = found.found["shapley"]["missing"][0]
        assert (record["subset"], record["recall"]) == ("all", pytest.approx(metric.recall, abs=1e-12))

    def test_another_split(self, run, data):
        assert zoo.diagnose(run, what=["outputs"], split="val", loaded=data).found["split"] == "val"
        with pytest.raises(ZooError, match="no split named 'vall'"):
            diagnose(run, split="vall", loaded=data)

    def test_saliency_figure_of_several_runs(self, found, trained, run, data, tmp_path):
        (run / "diagnosis.json").unlink(missing_ok=True)
        with pytest.raises(ZooError, match=r"diagnosis.json is not there: zoo diagnose .* --what saliency writes it"):
            saliency_figure([trained, run], tmp_path / "figure.png")
        diagnose(run, what=["saliency"], loaded=data, batches=1)
        with Image.open(saliency_figure([trained, run], tmp_path / "figure.png")) as png:
            assert png.size[0] > 1000
        diagnose(run, what=["gradients"], loaded=data)
        with pytest.raises(ZooError, match="holds no saliency: it was not asked for"):
            saliency_figure([trained, run], tmp_path / "figure.png")

    def test_verdict_without_recall_and_of_few_queries(self):
        assert verdict(3, 50, {}).startswith("Recall was not asked for")
        drop = {"mean": -0.1, "low": -0.2, "high": -0.05}
        found = {"permutation": {"records": [{"drop": drop}]}}
        assert verdict(3, 50, found) == "The image misleads: permuting images costs -0.100 [-0.200, -0.050] recall@3."
        assert verdict(3, 19, found).startswith("19 queries are too few to tell: ")


class TestRefusals:
    def test_no_such_run(self, tmp_path):
        with pytest.raises(ZooError, match=r"no model in .*gone, which does not exist"):
            diagnose(tmp_path / "gone")

    def test_faults_of_the_arguments_all_at_once(self, tmp_path):
        with pytest.raises(ZooError) as error:
            diagnose(tmp_path, what=["salience", "gates"], batches=0)
        says = str(error.value)
        assert "no part of the diagnosis named 'salience'; did you mean 'saliency'?" in says
        assert "batches: 0 measures nothing: write 1 or more" in says
        with pytest.raises(ZooError, match="nothing to measure: name any of saliency"):
            diagnose(tmp_path, what=[])

    def test_a_model_without_eyes(self, trained, tmp_path, data):
        save(tiny("text_only"), tmp_path / "blind")
        (tmp_path / "blind/recipe.yaml").write_text(dump(load_recipe(trained / "recipe.yaml")))
        with pytest.raises(ZooError, match="does not look at images, only at title, topic, content: there is nothing to diagnose"):
            diagnose(tmp_path / "blind", loaded=data)

    def test_a_log_without_gradients(self, run, data):
        write_json(run / "log.jsonl", {})
        (run / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        found = diagnose(run, what=["gradients"], loaded=data).found
        assert "train with run.log_gradients=true" in found["not_available"]["gradients"]
        assert "Not available" in (run / "report.html").read_text()


class TestCommand:
    @pytest.fixture
    def call(self, monkeypatch, capsys):
        def call(*arguments):
            monkeypatch.setattr(sys, "argv", ["zoo", "diagnose", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            return stop.value.code, *capsys.readouterr()

        return call

    def test_table_verdict_and_figure(self, call, run, tmp_path):
        code, out, _ = call(run, "--batches", "1", "--permutations", "1", "--saliency-figure", tmp_path / "s.png")
        assert code == 0
        lines = out.splitlines()
        for start in ("recall@3, all", "Shapley value, all", "image-only recall@3", "gate of note", "saliency, layer 1", "gradient share"):
            assert any(line.startswith(start) for line in lines), start
        assert "recall@3." in lines[-2]
        assert lines[-1] == str(tmp_path / "s.png")
        assert (tmp_path / "s.png").is_file()

    def test_json(self, call, run):
        code, out, _ = call(run, "--what", "outputs,gradients", "--json")
        assert code == 0
        assert set(json.loads(out)) & set(WHAT) == {"outputs", "gradients"}

    def test_a_wrong_name_is_two(self, call, run):
        code, out, err = call(run, "--what", "outputs,gradient")
        assert (code, out) == (2, "")
        assert "did you mean 'gradients'?" in err


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/diagnose.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    said = re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == said
    assert all(f"`{part}`" in page for part in WHAT)
