"""The schema for editors agrees with the checks that it is made from."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from zoo.errors import ZooError
from zoo.recipe import Recipe, dump, load_recipe
from zoo.registry import HOMES, names
from zoo.schema import schema

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    made = schema()
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(json.loads(json.dumps(made)))


@pytest.fixture
def recipe():
    return {
        "model": {"name": "notellm2", "backbone": "tiny_lm", "vision": {"name": "tiny_image"}, "fusion": ["micl", {"name": "gated_late"}]},
        "data": {"name": "planted_notes"},
        "objective": "pair_infonce",
        "optimizer": {"lr": 1e-3, "groups": [{"prefix": "model.vision", "lr": 0}]},
        "run": None,
        "evaluate": {"main": {"k": 10}},
        "baselines": {"BM25": "bm25", "late": {"model.fusion": "gated_late"}},
    }


def test_recipes_were_found():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid_as_written_and_written_out(validator, path):
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    validator.validate(yaml.safe_load(dump(load_recipe(path))))


def test_what_loads_is_valid(validator, recipe):
    load_recipe(recipe)
    validator.validate(recipe)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("model", "backbon", "qwen"),
        ("model", "backbone", "qwem"),
        ("model", "backbone", {"name": "tiny_lm", "sise": 3}),
        ("model", "fusion", ["micl", "gated_lat"]),
        ("model", "vision", "timm:"),
        ("model", "vision", "timm"),
        ("model", "name", "notelm2"),
        ("model", "dim", 0),
        ("optimizer", "learning_rate", 1e-3),
        ("optimizer", "lr", -1),
        ("optimizer", "groups", [{"lr": 1}]),
        ("optimizer", "decay", "stepwise"),
        ("evaluate", "main", {"kk": 10}),
        ("baselines", "BM25", "bm52"),
    ],
)
def test_what_does_not_load_is_not_valid(validator, recipe, section, key, value):
    recipe[section] = {**recipe[section], key: value}
    with pytest.raises(ZooError):
        load_recipe(recipe)
    assert not validator.is_valid(recipe)


@pytest.mark.parametrize("section", ["model", "data", "objective"])
def test_required_sections(validator, recipe, section):
    del recipe[section]
    assert not validator.is_valid(recipe)


def test_a_list_of_objectives(validator, recipe):
    recipe["objective"] = {"name": "together", "of": [{"name": "itc", "queue": 8}, "itm"], "weights": [1, 2], "momentum": 0.995}
    load_recipe(recipe)
    validator.validate(recipe)
    for wrong in ({"of": [{"name": "itc", "queu": 8}]}, {"of": "itc"}, {}):
        recipe["objective"] = {"name": "together", **wrong}
        with pytest.raises(ZooError):
            load_recipe(recipe)
        assert not validator.is_valid(recipe)


def test_names_with_a_prefix(validator, recipe):
    recipe["model"]["vision"] = "timm:vit_tiny_patch16_224"
    assert validator.is_valid(recipe)


def test_every_registered_name_and_every_field_is_there(validator):
    made = validator.schema
    assert set(made["properties"]) == set(Recipe.__dataclass_fields__)
    for kind in HOMES:
        said = {way["properties"]["name"].get("const") for way in made["$defs"][kind]["anyOf"] if "properties" in way}
        assert set(names(kind)) <= said, kind


def test_it_helps(validator):
    lr = validator.schema["properties"]["optimizer"]["anyOf"][0]["properties"]["lr"]
    assert lr["description"] == "Peak, after warm-up."
    assert lr["default"] == 1e-4
