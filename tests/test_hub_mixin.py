"""One format, three doors: a folder, huggingface_hub's mixin and the zoo's own function read and write the same model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from huggingface_hub.hub_mixin import ModelHubMixin as Mixin
from PIL import Image

import zoo
from zoo.card import card
from zoo.errors import Failure, ZooError
from zoo.hub import from_pretrained, load, save
from zoo.models.notellm2 import NoteLLM2
from zoo.registry import build

TINY = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": {"name": "attention_pool", "num_queries": 2},
    "dim": 16,
    "language": "en",
}
ROWS = [{"title": "a red cup", "image": Image.new("RGB", (20, 30), "red")}, {"title": "only words"}]
RECORD = {"protocol": "multi", "subset": "all", "input": "both", "k": 10, "recall": 0.51239, "low": 0.4, "high": 0.6, "queries": 100}
METRICS = {
    "arms": {"shop": {"records": [RECORD, RECORD | {"input": "text", "recall": 0.3}]}, "bm25": {"records": [RECORD | {"recall": 0.1}]}},
    "main": {"arm": "shop"},
    "verdict": "VERDICT: WIN | recall@10=0.512",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model():
    made = build("notellm2", **TINY).eval()
    made.trained = True
    return made


@pytest.fixture
def run(tmp_path):
    """What a run folder tells of its model."""
    folder = tmp_path / "shop"
    folder.mkdir()
    folder.joinpath("recipe.yaml").write_text("data:\n  name: planted_notes\nevaluate:\n  split: test\n")
    folder.joinpath("metrics.json").write_text(json.dumps(METRICS))
    return folder


def cached(folder, cache, repo="shop/items", revision="main"):
    """The folder as the hub's cache holds a repository that was fetched once."""
    home = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / revision).write_text(COMMIT)
    return cache


def metadata(page):
    return yaml.safe_load(page.split("---\n")[1])


# The mixin


def test_a_model_is_what_the_mixin_says(model):
    assert isinstance(model, ModelHubMixin)
    assert ModelHubMixin is Mixin


def test_saved_pretrained_is_what_save_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "mixin")
    save(model, tmp_path / "own")
    assert {p.name for p in (tmp_path / "mixin").iterdir()} == {"model.json", "model.safetensors", "README.md"}
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "mixin" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


@pytest.mark.parametrize("door", [load, from_pretrained, zoo.from_pretrained, NoteLLM2.from_pretrained])
def test_every_door_opens_a_folder(model, tmp_path, door):
    model.save_pretrained(tmp_path / "model")
    again = door(tmp_path / "model")
    assert not again.training
    assert np.array_equal(again.encode(ROWS), model.encode(ROWS))


@pytest.mark.parametrize("door", [from_pretrained, NoteLLM2.from_pretrained])
def test_a_fetched_repository_needs_no_network(model, tmp_path, door):
    cache = cached(save(model, tmp_path / "model"), tmp_path / "cache")
    assert np.array_equal(door("shop/items", cache_dir=cache).encode(ROWS), model.encode(ROWS))
    assert np.array_equal(door("shop/items", cache_dir=cache, local_files_only=True).encode(ROWS), model.encode(ROWS))


def test_a_revision_is_the_one_asked_for(model, tmp_path):
    cache = cached(save(model, tmp_path / "model"), tmp_path / "cache", revision="v1")
    assert from_pretrained("shop/items", cache_dir=cache, revision="v1").dim == 16
    with pytest.raises(ZooError, match="'shop/items': it is no folder, and from the hub it could not be had"):
        from_pretrained("shop/items", cache_dir=cache, revision="v2")


@pytest.mark.parametrize("name", ["shop/nothing", "no name of anything/at/all"])
def test_what_cannot_be_had_says_how_it_can(tmp_path, name):
    with pytest.raises(ZooError, match=r"check the name, fetch it once with a network, or name a folder"):
        from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


def test_a_repository_of_something_else(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    cache = cached(tmp_path / "other", tmp_path / "cache")
    with pytest.raises(ZooError, match=r"no model in .*holds config\.json"):
        from_pretrained("shop/items", cache_dir=cache)


def test_a_model_of_another_class(model, tmp_path):
    class Other(NoteLLM2):
        pass

    with pytest.raises(ZooError, match=r"holds a NoteLLM2, not a Other: write zoo\.from_pretrained"):
        Other.from_pretrained(save(model, tmp_path / "model"))


class Uploads:
    """What huggingface_hub would have sent."""

    def __init__(self, monkeypatch):
        self.made, self.files, self.sent = {}, {}, {}
        monkeypatch.setattr(HfApi, "create_repo", self.create)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)

    def create(self, **asked):
        self.made = asked
        return type("Url", (), {"repo_id": asked["repo_id"]})

    def upload(self, *, folder_path, **asked):
        self.sent = asked
        self.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        return "https://hub/commit/1"


def test_pushed_is_what_is_loaded(model, run, tmp_path, monkeypatch):
    hub = Uploads(monkeypatch)
    asked = {"run": run, "repo": "shop/items", "licence": "apache-2.0"}
    assert model.push_to_hub("shop/items", private=True, model_card_kwargs=asked) == "https://hub/commit/1"
    assert (hub.made["repo_id"], hub.made["private"], hub.sent["repo_id"]) == ("shop/items", True, "shop/items")
    assert set(hub.files) == {"model.json", "model.safetensors", "README.md"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert np.array_equal(load(tmp_path).encode(ROWS), model.encode(ROWS))
    assert ModelCard(hub.files["README.md"].decode()).data.license == "apache-2.0"


# The page


def test_the_page_of_a_run(model, run):
    page = card(model, run, repo="shop/items", licence="mit")
    says = metadata(page)
    assert (says["library_name"], says["pipeline_tag"], says["license"]) == ("multimodal-zoo", "feature-extraction", "mit")
    assert says["tags"] == ["multimodal-zoo", "notellm2", "item-embeddings", "retrieval", "text", "image"]
    (result,) = says["model-index"][0]["results"]  # all pairs, both modalities; not the text alone, not the baseline
    assert result["metrics"] == [{"type": "recall_at_10", "value": 0.5124, "name": "Recall@10 (multi)"}]
    assert (result["dataset"]["name"], result["dataset"]["split"], result["task"]["type"]) == ("planted_notes", "test", "retrieval")
    assert 'zoo.from_pretrained("shop/items")' in page
    assert "`title`, `topic`, `content`, `image`" in page
    assert "| multi | all | text | 10 | 0.300 | 0.400 to 0.600 | 100 |" in page
    assert "VERDICT: WIN | recall@10=0.512" in page
    assert "- model `notellm2`; Zhang et al., NoteLLM-2, 2024" in page
    assert "- fusion `gated_late`;" in page  # a default of the model
    assert "## Recipe\n\n```yaml\ndata:\n  name: planted_notes" in page
    assert "random" not in page


def test_the_page_of_a_model_alone(model):
    model.trained = False
    page = card(model)
    assert not {"license", "model-index"} & set(metadata(page))
    assert "**Its weights are random" in page
    assert "## Measured" not in page
    assert "## Recipe" not in page


@pytest.mark.parametrize("repo, of_run, title", [("shop/items", True, "items"), (None, True, "shop"), (None, False, "notellm2")])
def test_the_title_is_the_nearest_name(model, run, repo, of_run, title):
    page = card(model, run if of_run else None, repo=repo)
    assert f"\n# {title}\n" in page
    assert f'zoo.from_pretrained("{repo or f"org/{title}"}")' in page


def test_the_page_before_anything_was_measured(model, run):
    (run / "metrics.json").unlink()
    page = card(model, run)
    assert "model-index" not in metadata(page)
    assert "## Recipe" in page


def test_a_model_that_sees_text_alone():
    page = card(build("notellm2", **{**TINY, "fusion": "text_only"}))
    assert metadata(page)["tags"][-2:] == ["retrieval", "text"]


def test_the_page_names_the_licences_of_what_is_loaded():
    model = build("notellm2", **{**TINY, "backbone": {"name": "qwen", "size": "tiny"}})
    assert "- backbone `qwen`; Qwen Team" in card(model)
    assert "; licence of the weights: Apache-2.0" in card(model)


def test_a_folder_that_is_no_run(model, tmp_path):
    with pytest.raises(ZooError, match=r"no recipe\.yaml in .*: name the run folder that the model comes from"):
        card(model, tmp_path)


def test_damaged_numbers(model, run):
    (run / "metrics.json").write_text("{")
    with pytest.raises(Failure, match=r"metrics\.json is damaged .*: measure the run again with: zoo run"):
        card(model, run)
