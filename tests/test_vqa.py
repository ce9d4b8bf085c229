"""Answers from a closed list: what the head reads, whom it learns from, and what a file of it rebuilds."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from zoo.collate import stack
from zoo.errors import ZooError
from zoo.hub import load, save
from zoo.init_from import take_parts
from zoo.positions import resampled
from zoo.recipe import load_recipe
from zoo.registry import build, make
from zoo.relative_positions import resized
from zoo.stages import Stage
from zoo.types import Batch, Classifying
from zoo.validate import validate

LOOKS = {"name": "tiny_image", "dim": 24, "heads": 2, "layers": 1, "image_size": 16}
BASES = {name: {"name": name, "vision": LOOKS, "layers": 2, "dim": 8} for name in ("albef", "blip")}
BASES |= {name: {"name": name, "layers": 2, "image_size": 16} for name in ("vlmo", "beit_3")}
COLOURS = ("red", "green", "blue")


def tiny(base="albef", classes=3, **settings):
    return build("vqa", base={**BASES[base], **settings}, classes=classes)


def row(colour, question="which colour"):
    return {"image": Image.new("RGB", (16, 16), colour), "text": question}


def batch_of(model, *rows, **more):
    return Batch(stack([model.processor(r) for r in rows]), **more)


@pytest.mark.parametrize("base", BASES)
def test_the_answer_hears_picture_and_question(base):
    model = tiny(base).eval()
    assert isinstance(model, Classifying)
    with torch.no_grad():
        said = model(batch_of(model, row("red"), row("blue"), row("red", "what is it"), {"text": "which colour"}, row("red")))
    logits = said.logits["fused"]
    assert said.present["fused"].all()
    torch.testing.assert_close(logits[4], logits[0], rtol=0, atol=1e-6)
    assert all((logits[i] - logits[0]).abs().max() > 1e-5 for i in (1, 2, 3))


@pytest.mark.parametrize("base", BASES)
def test_it_is_the_models_own_reading(base):
    model = tiny(base).eval()
    inside = model._inside[0].model
    batch = batch_of(model, row("red"), row("green", "what is it"))
    with torch.no_grad():
        asked = inside.ask(batch.inputs["text"], inside.see(batch.inputs["image"]))
        assert torch.equal(model(batch).logits["fused"], model.answers(asked.pooled))
    first = model.embed.words.weight
    assert first is inside.embed.words.weight


@pytest.mark.parametrize("base", BASES)
def test_rows_without_a_question_or_a_picture(base):
    model = tiny(base).eval()
    red = row("red")
    with torch.no_grad():
        alone = model(batch_of(model, {"image": red["image"]})).logits["fused"]
        beside = model(batch_of(model, red, {"image": red["image"]})).logits["fused"]
        said = model(batch_of(model, {"text": "which colour"})).logits["fused"]
        both = model(batch_of(model, red, {"text": "which colour"})).logits["fused"]
        none = model(Batch({}, targets=torch.zeros(2, dtype=torch.int64)))
    torch.testing.assert_close(beside[1], alone[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(both[1], said[0], rtol=0, atol=1e-6)
    assert none.logits["fused"].shape == (2, 3)
    assert not none.present["fused"].any()


@pytest.mark.parametrize("base", BASES)
def test_it_learns_what_only_both_tell(base):
    """The answer is the colour, or whether anything is there, as is asked."""
    torch.manual_seed(0)
    model = tiny(base, classes=4).train()
    rows = [row(colour) for colour in COLOURS] + [row(colour, "is it there") for colour in COLOURS]
    batch = batch_of(model, *rows, targets=torch.tensor([0, 1, 2, 3, 3, 3]))
    objective, optimizer = make("objective", "cross_entropy"), torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(40):
        loss = objective(model, batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    chances = model.classify(rows)
    assert chances.argmax(1).tolist() == [0, 1, 2, 3, 3, 3]
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)


def test_blips_self_attention_for_writing_is_left_alone():
    model = tiny("blip")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".decode." in name for name in frozen)
    assert all(p.requires_grad for p in tiny("albef").parameters())


@pytest.mark.parametrize("base", BASES)
def test_it_begins_where_the_model_inside_ended(base, tmp_path):
    trained = build(**BASES[base])
    save(trained, tmp_path)
    model = tiny(base)
    parts = tuple(name for name, _ in model.named_children() if name not in ("answers", "schedule"))
    take_parts(model, [Stage(recipe="pretrain", parts=parts)], [tmp_path])
    theirs = trained.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in model.state_dict().items() if not name.startswith("answers."))


@pytest.mark.parametrize("base", BASES)
def test_a_file_rebuilds_it(base, tmp_path):
    model = tiny(base, vocabulary={"name": "small"})
    model.trained = True
    again = load(save(model, tmp_path))
    np.testing.assert_array_equal(again.classify([row("red")]), model.classify([row("red")]))


def test_a_file_needs_no_weights_of_its_picture_encoder(tmp_path):
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), str(weights))
    model = build(
        "vqa", base={"name": "albef", "vision": {"name": "timm:test_vit", "final_norm": True, "pretrained": str(weights)}}, classes=2
    )
    save(model, tmp_path / "run")
    weights.unlink()
    again = load(tmp_path / "run")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize("base", ["clip", {"name": "coca"}])
def test_a_model_that_reads_no_questions_is_refused(base):
    with pytest.raises(ZooError, match=r"vqa\.base: '(clip|coca)' reads no text beside a picture: write albef, blip, vlmo or beit_3"):
        build("vqa", base=base, classes=2)


def test_positions_move_to_larger_pictures(tmp_path):
    """By the functions that are held against BEiT's and timm's elsewhere."""
    for base, name in (("vlmo", "positions.table"), ("beit_3", "vision.places.weight")):
        trained = build(base, layers=2, image_size=24)
        nn.init.normal_(trained.get_parameter(name))
        save(trained, tmp_path / base)
        model = build("vqa", base={"name": base, "layers": 2, "image_size": 32}, classes=3)
        take_parts(model, [Stage(recipe="pretrain", parts=(name.split(".")[0],))], [tmp_path / base])
        old = trained.get_parameter(name).detach()
        wanted = resized(old, (3, 3), (4, 4)) if base == "vlmo" else resampled(old, 17, antialias=False)
        assert torch.equal(model.get_parameter(name), wanted)
        assert len(wanted) > len(old)


def test_relative_positions_of_smaller_pictures_or_other_texts_are_refused(tmp_path):
    save(build("vlmo", layers=2, image_size=32), tmp_path)
    stage = Stage(recipe="pretrain", parts=("positions",))
    for settings, says in (
        ({"image_size": 24}, "of 4 x 4 patches cannot be made those of 3 x 3"),
        ({"length": 30}, "does not fit this model's"),
        ({"length": 36}, "of texts of 24 cannot be made those of texts of 36"),
    ):
        model = build("vqa", base={"name": "vlmo", "layers": 2, "image_size": 32, **settings}, classes=3)
        with pytest.raises(ZooError, match=says):
            take_parts(model, [stage], [tmp_path])


def test_a_folder_of_another_model_is_named(tmp_path):
    save(build("beit_3", layers=2), tmp_path)
    stage = Stage(folder=tmp_path, parts=("trunk",))
    with pytest.raises(
        ZooError, match=r"trunk\.\S+ is not there; \d+ more differ\): it holds a beit_3, and this recipe's model is a vlmo: name"
    ):
        take_parts(build("vlmo", layers=2), [stage], [tmp_path])
    with pytest.raises(ZooError, match=r"'trunk' does not fit this model's \(trunk\.\S+ is not there.*\): write the settings of its model"):
        take_parts(build("beit_3", layers=3), [stage], [tmp_path])
    stage = Stage(folder=tmp_path, parts=("embed",))
    with pytest.raises(ZooError, match=r"\(embed\.words\.weight is \(5000, 64\), and here \(6000, 64\)\)"):
        take_parts(build("beit_3", layers=2, vocab_size=6000), [stage], [tmp_path])


@pytest.mark.parametrize("base", BASES)
def test_recomputed_activations_give_the_same_gradients(base):
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = tiny(base).train()
        if recomputed:
            model.checkpoint_gradients()
        batch = batch_of(model, row("red"), row("blue"), targets=torch.tensor([0, 2]))
        make("objective", "cross_entropy")(model, batch).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_parameters_are_as_many_as_published(tmp_path):
    """The authors say 228 million of BEiT-3 base at 480 pixels with 3,129 answers."""
    report = validate(load_recipe("beit_3/vqa", "model.classes=3129"), rows=2, cache=tmp_path)
    counted = sum(part.parameters for part in report.parts if part.name != "objective")
    assert counted == pytest.approx(228.1e6, rel=2e-4)
