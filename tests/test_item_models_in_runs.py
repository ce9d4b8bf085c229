"""The item models go the ways that runs offer: gradients in chunks, features from a cache, and a diagnosis."""

import json

import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.recipe import load_recipe
from zoo.registry import make
from zoo.train import train

ENCODERS = {
    "text": {"name": "tiny_text", "dim": 16, "layers": 1, "heads": 2, "rows": 512},
    "vision": {"name": "tiny_image", "dim": 16, "layers": 1, "heads": 2, "image_size": 16},
    "dim": 8,
    "language": "en",
}
MODELS = [{"name": "dual_encoder", **ENCODERS}, {"name": "meter", **ENCODERS, "layers": 1, "width": 16, "heads": 2}]
DATA = {"name": "planted_notes", "notes": 100, "users": 600, "image_size": 16, "mine": {"top": 1}}
every = pytest.mark.parametrize("model", MODELS, ids=[m["name"] for m in MODELS])


@pytest.fixture(scope="module")
def data():
    return make("data", DATA)


@pytest.fixture
def trained(tmp_path, data):
    """The folder of a short run."""

    def go(model, out, **overrides):
        plain = {
            "model": model,
            "data": DATA,
            "objective": {"name": "infonce", "on": ["item"]},
            "optimizer": {"lr": 1e-3},
            "run": {"steps": 3, "batch_size": 8, "device": "cpu", "log_every": 1},
            "out": str(tmp_path / out),
        }
        recipe = load_recipe(plain, **overrides)
        train(recipe, loaded=data)
        return recipe.out

    return go


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@every
def test_gradients_in_chunks_are_those_of_the_batch(trained, model):
    whole, chunks = trained(model, "whole"), trained(model, "chunks", run__gradcache=6)
    assert losses(chunks) == pytest.approx(losses(whole), rel=1e-5)  # float32 sums in another order
    assert losses(whole)[0] != losses(whole)[-1]


@every
def test_features_from_a_cache_change_no_weight(trained, model, tmp_path):
    frozen = {"freeze": ["vision"]}
    without = trained(model, "without", **frozen)
    cached = trained(model, "cached", run__feature_cache=str(tmp_path / "cache"), **frozen)
    assert list((tmp_path / "cache").glob("[!.]*"))
    one, other = (load_file(folder / "model.safetensors") for folder in (without, cached))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@every
def test_a_diagnosis(trained, model):
    found = zoo.diagnose(trained(model, "run", run__log_gradients=True), batches=2, permutations=2)
    assert found.verdict
    assert not any("gradients" in what for what in found.found["not_available"])
