"""The baselines of two encoders: what their item vector sees, what is absent weighs nothing, and what they are trained with."""

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.collate import PairCollate, RowCollate
from zoo.errors import ZooError
from zoo.evaluate.gates import gate_shares
from zoo.freeze import freeze
from zoo.hub import load, save
from zoo.recipe import arm, load_recipe
from zoo.registry import make
from zoo.train import make_step
from zoo.types import Divided, Pair, Seeing

TEXT = {"name": "tiny_text", "dim": 16, "heads": 2, "layers": 1, "rows": 200}
VISION = {"name": "tiny_image", "dim": 12, "heads": 2, "layers": 1, "image_size": 16}
TINY = {
    "dual_encoder": {"text": TEXT, "vision": VISION, "dim": 8, "language": "en"},
    "meter": {"text": TEXT, "vision": VISION, "dim": 8, "language": "en", "layers": 2, "width": 16, "heads": 2},
}
every = pytest.mark.parametrize("name", TINY)
RED, BLUE = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
ROWS = [
    {"title": "red shoes", "topic": ["walk"], "content": "soft #run#", "image": RED},
    {"title": "a"},
    {"image": BLUE},
    {"content": "b c d e f g", "image": [RED, BLUE]},
]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # another batch or padding reorders sums of float32


def build(name, **given):
    model = zoo.build(name, **{**TINY[name], **given})
    model.trained = True
    return model.eval()


def item(model, rows):
    out = model(RowCollate(model.processor)(rows))
    return out.embeddings["item"], out.present["item"]


def pairs_of(model):
    rows = [{**row, "id": i} for i, row in enumerate(ROWS)]
    return PairCollate(model.processor)([Pair(rows[0], rows[1]), Pair(rows[2], rows[3])])


class TestRows:
    def test_the_fields_stand_one_after_the_other(self):
        processor = build("meter").processor
        text = processor(ROWS[0])["text"]
        assert torch.equal(text.values, processor.text("red shoes. walk, run. soft").values)
        assert text.extra["has_text"]
        assert processor({"title": "a", "content": "b"})["text"].values.tolist() == processor.text("a. b").values.tolist()

    @every
    @pytest.mark.parametrize("rows", [ROWS, ROWS[::-1], ROWS[:2]], ids=["forth", "back", "some"])
    def test_neither_padding_nor_neighbours_change_a_vector(self, name, rows):
        model = build(name)
        together = item(model, rows)[0]
        alone = torch.cat([item(model, [row])[0] for row in rows])
        torch.testing.assert_close(together, alone, **CLOSE)

    @every
    def test_who_shows_nothing_has_no_vector(self, name):
        vectors, present = item(build(name), [ROWS[0], {}, ROWS[2]])
        assert present.tolist() == [True, False, True]
        assert item(build(name), [{}, {}])[1].tolist() == [False, False]
        assert torch.isfinite(vectors).all()

    @every
    def test_text_and_image_both_count(self, name):
        model = build(name)
        both, text, image = (item(model, [row])[0] for row in (ROWS[0], {**ROWS[0], "image": None}, {"image": RED}))
        other = item(model, [{**ROWS[0], "image": BLUE}])[0]
        assert not any(torch.allclose(both, x, **CLOSE) for x in (text, image, other))

    @every
    def test_an_absent_modality_has_no_influence(self, name):
        """Whatever stands where an image is absent, or a text: NaN would show."""
        model = build(name)
        batch = RowCollate(model.processor)(ROWS)
        image = batch.inputs["image"]
        spoiled = image.values.clone()
        spoiled[1] = torch.nan
        again = model(batch._replace(inputs={**batch.inputs, "image": image._replace(values=spoiled)}))
        torch.testing.assert_close(again.embeddings["item"], model(batch).embeddings["item"], rtol=0, atol=0)

    def test_an_image_less_item_does_not_look(self):
        """Of an item without an image, nothing of METER's image stack enters its vector."""
        model = build("meter")
        before = item(model, [ROWS[1]])[0]
        with torch.no_grad():
            model.image_stack.start.add_(1)
        assert torch.equal(item(model, [ROWS[1]])[0], before)
        assert not torch.equal(item(model, [ROWS[0]])[0], before)


class TestDualEncoder:
    def test_its_vectors_have_length_one_and_are_combined(self):
        model = build("dual_encoder", fusion="sum")
        out = model(RowCollate(model.processor)(ROWS))
        text, image = out.embeddings["text"], out.embeddings["image"]
        torch.testing.assert_close(text.norm(dim=1), torch.tensor([1.0, 1, 0, 1]))
        torch.testing.assert_close(image.norm(dim=1), torch.tensor([1.0, 0, 1, 1]))
        torch.testing.assert_close(out.embeddings["item"], text + image)
        assert out.present["text"].tolist() == [True, True, False, True]
        assert out.present["image"].tolist() == [True, False, True, True]

    @pytest.mark.parametrize("on", [["item"], ["text", "image"]])
    @pytest.mark.parametrize("objective", ["infonce", "siglip"])
    def test_objectives(self, objective, on):
        model = build("dual_encoder").train()
        made = make("objective", {"name": objective, "on": on})
        made.bind(model)
        made(model, pairs_of(model)).total.backward()
        assert model.text_projection.weight.grad.abs().sum() > 0
        assert model.image_projection.weight.grad.abs().sum() > 0

    def test_a_gate_tells_its_shares(self):
        model = build("dual_encoder", fusion="gated_late")
        records = gate_shares(model, [RowCollate(model.processor)(ROWS)])
        assert {r["output"] for r in records} == {"item"}
        assert sum(r["mean"] for r in records if r["present"] == ["text", "image"]) == pytest.approx(1)


class TestMeter:
    def test_each_layer_looks_at_the_other_from_before_the_layer(self):
        """Two layers by hand."""
        model = build("meter")
        batch = RowCollate(model.processor)(ROWS[:1])
        words = model.text_stack.enter(model.read(batch.inputs["text"]))
        seen = model.image_stack.enter(model.look(batch.inputs["image"], words.present))
        first = model.text_stack.layers[0](words, seen), model.image_stack.layers[0](seen, words)
        second = model.text_stack.layers[1](first[0], first[1]), model.image_stack.layers[1](first[1], first[0])
        vectors = {"text": model.text_stack.leave(second[0]), "image": model.image_stack.leave(second[1])}
        expected = model.combine(vectors, {"text": words.present, "image": seen.present})
        torch.testing.assert_close(model(batch).embeddings["item"], expected)

    def test_heads_divide_the_width(self):
        with pytest.raises(ZooError, match="meter: width 16 is no multiple of heads 3"):
            build("meter", heads=3)


class TestModel:
    @every
    def test_recomputed_gradients_are_equal(self, name):
        def gradients(model):
            model.zero_grad()
            make("objective", "pair_infonce")(model.train(), pairs_of(model)).total.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        model = build(name)
        plain = gradients(model)
        model.checkpoint_gradients()
        again = gradients(model)
        assert plain.keys() == again.keys()
        for key, gradient in plain.items():
            torch.testing.assert_close(again[key], gradient, **CLOSE)

    @every
    def test_a_frozen_encoder_gets_no_gradient(self, name):
        model = build(name)
        freeze(model.vision)
        make("objective", "pair_infonce")(model.train(), pairs_of(model)).total.backward()
        assert not model.vision.training
        assert all(p.grad is None for p in model.vision.parameters())
        assert all(p.grad is not None for p in model.text.parameters())

    @every
    def test_protocols(self, name):
        model = build(name)
        assert isinstance(model, Divided)
        assert isinstance(model, Seeing)
        children = dict(model.named_children())
        assert {module for modules in model.modality_modules.values() for module in modules} <= children.keys()
        assert model.parts().keys() == {"text", "vision"}

    @every
    def test_saved_and_loaded(self, name, tmp_path):
        model = build(name)
        again = load(save(model, tmp_path))
        np.testing.assert_array_equal(again.encode(ROWS), model.encode(ROWS))

    @every
    def test_untrained_weights_warn_once(self, name):
        model = zoo.build(name, **TINY[name])
        with pytest.warns(UserWarning, match="nothing was trained in this model"):
            vector = model.encode("a red shoe")
        assert vector.shape == (8,)
        assert model.similarity(vector, model.encode(ROWS)).shape == (1, 4)
        np.testing.assert_allclose(model.similarity_pairwise(vector, vector), 1, rtol=1e-6)

    @every
    def test_fusions_of_other_joints_are_refused(self, name):
        with pytest.raises(ZooError, match=f"which model {name!r} does not have"):
            build(name, fusion="micl")


class TestTable:
    """The recipe that sets all of them side by side."""

    @pytest.mark.parametrize("name", ["wide vision", "pre-aligned connector", "prompt embedding", "dual CLIP", "dual SigLIP", "METER"])
    def test_every_row_is_a_model_with_its_objective(self, name):
        recipe = arm(load_recipe("notellm2/table"), name)
        step = make_step(recipe)
        step(pairs_of(step.model)).total.backward()
        assert step.model.outputs[0] in ("note", "item")
        assert recipe.run.steps == (0 if name == "prompt embedding" else 350)

    def test_its_rows(self):
        assert "bm25" in load_recipe("notellm2/table").baselines
