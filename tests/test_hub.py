"""A folder is a model: what is loaded gives what was saved, or says why it cannot."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from zoo.checkpoint import unshared
from zoo.errors import Failure, ZooError
from zoo.hub import load, model_hash, save
from zoo.registry import build

TINY = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": {"name": "attention_pool", "num_queries": 2},
    "dim": 16,
    "language": "en",
}
ROWS = [
    {"title": "a red cup", "content": "of coffee", "image": Image.new("RGB", (20, 30), "red")},
    {"title": "only words"},
    {"image": Image.new("RGB", (8, 8), "blue")},
]


def tiny(**overrides):
    model = build("notellm2", **{**TINY, **overrides}).eval()
    model.trained = True
    return model


@pytest.fixture
def folder(tmp_path):
    return save(tiny(), tmp_path / "model")


def edit(folder, change):
    about = json.loads((folder / "model.json").read_text())
    change(about)
    (folder / "model.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"fusion": "text_only"}, {"fusion": ["text_only", "gated_late"]}, {"dim": None}, {"absent": "zeros", "content_length": 5}],
    ids=["whole", "no vision", "late alone", "no projection", "other preprocessing"],
)
def test_loaded_equals_saved(tmp_path, overrides):
    model = tiny(**overrides)
    again = load(save(model, tmp_path / "deep" / "model"))
    assert not again.training
    assert again.spec == model.spec
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    rows = ROWS if "fusion" not in overrides or overrides["fusion"] != "text_only" else ROWS[:2]
    assert np.array_equal(model.encode(rows), again.encode(rows))


def test_what_a_killed_save_left_behind_goes(tmp_path):
    (tmp_path / "model.safetensors.1.tmp").touch()
    save(tiny(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.json", "model.safetensors"}


def test_the_folder_holds_two_files(folder):
    assert {p.name for p in folder.iterdir()} == {"model.json", "model.safetensors"}


@pytest.mark.parametrize("trained", [True, False])
def test_remembers_whether_it_was_trained(tmp_path, trained):
    model = tiny()
    model.trained = trained
    again = load(save(model, tmp_path))
    assert again.trained is trained
    if not trained:
        with pytest.warns(UserWarning, match="random weights"):
            again.encode(ROWS)


def test_saving_over_a_model(folder):
    other = tiny(dim=8)
    save(other, folder)
    assert np.array_equal(load(folder).encode(ROWS), other.encode(ROWS))


def test_a_save_that_is_cut_short_leaves_no_model(folder, monkeypatch):
    """Between the new weights and the new description the folder must not pass for a model."""

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("zoo.hub.write_json", fails)
    with pytest.raises(Failure, match="disk full"):
        save(tiny(dim=8), folder)
    with pytest.raises(ZooError, match="no model in"):
        load(folder)


@pytest.mark.parametrize(
    "error",
    [SafetensorError("Error while serializing: I/O error: No space left on device"), OSError(errno.ENOSPC, "No space left on device")],
)
def test_a_full_disk_leaves_the_model_that_was_there(folder, monkeypatch, error):
    before = load(folder).encode(ROWS)

    def full(state, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("zoo.hub.save_file", full)
    says = r"could not be written \(.*No space left on device\); the disk has \d+\.\d GiB left: make room, and do the same again$"
    with pytest.raises(Failure, match=rf"^model {folder} {says}"):
        save(tiny(dim=8), folder)
    assert {p.name for p in folder.iterdir()} == {"model.json", "model.safetensors"}
    assert np.array_equal(load(folder).encode(ROWS), before)


def test_weights_are_on_the_disk_before_they_have_their_name(folder, monkeypatch):
    synced = []
    monkeypatch.setattr("zoo.hub.sync", lambda path: synced.append((path.name, path.is_file())))
    save(tiny(), folder)
    assert synced == [(f"model.safetensors.{os.getpid()}.tmp", True)]


def test_a_part_from_elsewhere_is_not_needed_any_more(tmp_path):
    source = tmp_path / "source"
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(source)
    (source / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": true, "resample": 3,'
        ' "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    model = tiny(vision=f"hf:{source}")
    vectors = model.encode(ROWS)
    save(model, tmp_path / "model")
    shutil.rmtree(source)
    again = load(tmp_path / "model")
    assert np.array_equal(again.encode(ROWS), vectors)
    second = load(save(again, tmp_path / "again"))  # what was loaded can be saved
    assert np.array_equal(second.encode(ROWS), vectors)


def test_the_hash_is_that_of_settings_and_weights(folder, tmp_path):
    first = model_hash(folder)
    assert model_hash(shutil.copytree(folder, tmp_path / "copy")) == first
    for name in ("model.json", "model.safetensors"):
        other = shutil.copytree(folder, tmp_path / name)
        (other / name).write_bytes((other / name).read_bytes() + b" ")
        assert model_hash(other) != first
    with pytest.raises(ZooError, match="no model in"):
        model_hash(tmp_path)


# What cannot be loaded


def test_no_folder(tmp_path):
    with pytest.raises(ZooError, match=r"which does not exist: a run folder has model\.json and model\.safetensors"):
        load(tmp_path / "nothing")


def test_a_folder_without_a_model_is_listed(tmp_path):
    with pytest.raises(ZooError, match="which holds nothing"):
        load(tmp_path)
    (tmp_path / "log.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ZooError, match=r"which holds checkpoints, log\.jsonl: .* once its training is finished"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ZooError, match=f"no model in {folder}"):
        load(folder)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 20, -20])
def test_a_damaged_file(folder, name, keep):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:keep])
    with pytest.raises(ZooError, match=f"{folder / name} is damaged .*copy the folder again"):
        load(folder)


def test_a_description_that_lacks_something(folder):
    edit(folder, lambda about: (about.pop("spec"), about.pop("trained")))
    with pytest.raises(ZooError, match=r"model\.json lacks spec, trained"):
        load(folder)


def test_weights_of_another_shape(folder):
    edit(folder, lambda about: about["spec"].update(dim=8))
    with pytest.raises(ZooError, match=r"(?s)does not fit the model that model\.json describes.*project\.weight"):
        load(folder)


def test_weights_too_many_and_too_few(folder):
    state = load_file(folder / "model.safetensors")
    state["extra"] = state.pop("project.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ZooError, match=r"(?s)does not fit.*project\.weight.*extra"):
        load(folder)


def test_inputs_that_would_be_prepared_in_another_way(folder):
    edit(folder, lambda about: about["preprocessing"]["note"].update(title_length=99))
    with pytest.raises(ZooError, match=r"prepare inputs in another way than training did: note: .*99.* then, .*20.* now"):
        load(folder)


def test_a_part_that_is_gone(folder):
    edit(folder, lambda about: about["spec"].update(connector="bridge_of_mine"))
    with pytest.raises(ZooError, match="bridge_of_mine"):
        load(folder)


# Tied weights


def test_tied_weights_are_written_once_each():
    tied = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    tied["other"].weight = tied["one"].weight
    state = unshared(tied.state_dict())
    assert torch.equal(state["one.weight"], state["other.weight"])
    assert state["one.weight"].data_ptr() != state["other.weight"].data_ptr()


def test_views_of_one_memory_keep_their_own_values():
    memory = torch.arange(6.0)
    state = unshared({"head": memory[:2], "tail": memory[2:], "across": memory.view(2, 3).T})
    assert state["head"].tolist() == [0, 1]
    assert state["tail"].tolist() == [2, 3, 4, 5]
    assert state["across"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert all(v.is_contiguous() for v in state.values())
