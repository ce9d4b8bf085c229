"""VLMo's three stages as its recipes say them, at a few steps each: what one hands to the next, and what none of them touches."""

from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.captioned_shapes import shapes
from zoo.errors import ZooError
from zoo.hub import save
from zoo.recipe import load_recipe, values
from zoo.registry import build, register
from zoo.train import train
from zoo.types import CaptionedData
from zoo.validate import validate

SHORT = {"epochs": None, "steps": 2, "batch_size": 12, "threads": 0, "device": "cpu"}
STAGES = ("vlmo/stage_image", "vlmo/stage_text", "vlmo/emoji_en_staged")


@pytest.fixture
def of_shapes(tmp_path, own_registry):
    """The three recipes on a few shapes, each of which names the one before it; by name."""

    @register("data", "shapes")
    def made(root) -> CaptionedData:
        """Of this test."""
        return shapes()

    tokenizer = build("visual_tokenizer", codes=64, taught=5)
    tokenizer.trained = True
    folder = save(tokenizer, tmp_path / "tokenizer")
    files: dict[str, str] = {}
    for name in STAGES:
        tree = values(load_recipe(name))
        tree |= {"data": "shapes", "run": tree["run"] | SHORT, "out": str(tmp_path / "runs" / name)}
        if "tokenizer" in tree["objective"]:
            tree["objective"] = tree["objective"] | {"tokenizer": str(folder)}
        tree["init_from"] = [stage | {"recipe": files[stage["recipe"]], "cache": str(tmp_path / "stages")} for stage in tree["init_from"]]
        file = tmp_path / f"{name.partition('/')[2]}.yaml"
        file.write_text(yaml.safe_dump(tree))
        files[name] = str(file)
    return files


def test_the_shipped_recipes_follow_one_another():
    image, text, pairs = map(load_recipe, STAGES)
    assert [stage.recipe for stage in text.init_from] == ["vlmo/stage_image"]
    assert [stage.recipe for stage in pairs.init_from] == ["vlmo/stage_text"]
    assert (image.run.shows, text.run.shows, pairs.run.shows) == ({"image": 1.0}, {"text": 1.0}, {})
    assert image.data == text.data == pairs.data
    assert (image.train_only, pairs.train_only) == ((), ())
    plain = load_recipe("vlmo/emoji_en")
    assert (pairs.objective, pairs.model, pairs.optimizer, pairs.run) == (plain.objective, plain.model, plain.optimizer, plain.run)


def test_pictures_then_texts_then_pairs(of_shapes, tmp_path):
    model = train(of_shapes["vlmo/emoji_en_staged"])
    folders = {kind: next((tmp_path / "stages").glob(f"stage_{kind}-*")) for kind in ("image", "text")}
    image, text = (load_file(folder / "model.safetensors") for folder in folders.values())
    given = {name for name in text if name.startswith(("vision.", "trunk.", "positions."))}
    learned = {n for n in given if ".norm2.text." in n or ".ffn.text." in n or n.startswith(("trunk.norm.", "positions."))}
    assert {name for name in given if not torch.equal(image[name], text[name])} == learned
    assert {name.split(".")[3] for name in given - learned if name.startswith("trunk.")} >= {"qkv", "out", "norm1", "scale1", "scale2"}
    after = model.state_dict()
    assert any(name.startswith("trunk.blocks.0.qkv") and not torch.equal(after[name], text[name]) for name in given)
    begun = train(of_shapes["vlmo/emoji_en_staged"], "run.steps=0", f"out={tmp_path / 'begun'}").state_dict()
    parts = tuple(f"{part}." for part in load_recipe("vlmo/emoji_en_staged").init_from[0].parts)
    taken = [name for name in begun if name.startswith(parts)]
    assert len(taken) > len(given)
    assert all(torch.equal(begun[name], text[name]) for name in taken)


def test_another_tokenizer_in_the_same_folder_is_another_stage(of_shapes, tmp_path):
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        tokenizer = build("visual_tokenizer", codes=64, taught=5)
        tokenizer.trained = True
        save(tokenizer, tmp_path / "tokenizer")
        train(of_shapes["vlmo/stage_text"], "run.steps=0", f"out={tmp_path / f'text_{seed}'}", fresh=True)
        assert len([*(tmp_path / "stages").glob("stage_image-*")]) == 1 + seed


@pytest.mark.parametrize("name, whose", [("heads", "this model"), ("codes_head", "its model")])
def test_parts_that_are_not_there_are_told_before_a_stage_is_trained(of_shapes, tmp_path, name, whose):
    changed = load_recipe(of_shapes["vlmo/emoji_en_staged"], "model.codes=64")
    (stage,) = changed.init_from
    changed = replace(changed, init_from=(replace(stage, parts=("vision", name)),))
    for does in (train, validate):
        with pytest.raises(ZooError, match=f"no part of {whose} named '{name}'"):
            does(changed)
    assert not (tmp_path / "stages").exists()


def test_pictures_alone_teach_no_text_expert(of_shapes):
    recipe = load_recipe(of_shapes["vlmo/stage_image"])
    torch.manual_seed(recipe.seed)
    model = train(recipe)
    fresh = train(load_recipe(of_shapes["vlmo/stage_image"], "run.steps=0", f"out={recipe.out}_untrained")).state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, fresh[name])}
    assert any(".ffn.image." in name for name in moved)
    assert not [name for name in moved if ".text." in name or ".vl." in name or name.startswith(("embed.", "head."))]
