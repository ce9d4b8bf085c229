"""What is exported gives the vectors of the model, for rows with and without an image, or is not written."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from zoo import export
from zoo.errors import Failure, ZooError
from zoo.export import TOLERANCE, export_onnx, prepare
from zoo.hub import save
from zoo.registry import build, names

TINY = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": {"name": "attention_pool", "num_queries": 2},
    "dim": 16,
    "language": "en",
}
_ENCODERS = {
    "text": {"name": "tiny_text", "dim": 32, "layers": 1, "heads": 2, "rows": 512},
    "vision": TINY["vision"],
    "dim": 16,
    "language": "en",
}
MODELS = {"notellm2": TINY, "dual_encoder": _ENCODERS, "meter": {**_ENCODERS, "layers": 2, "width": 32, "heads": 2}}
RED = Image.new("RGB", (20, 30), "red")
ROWS = [
    {"title": "a red cup", "content": "of coffee " * 9, "image": RED},
    {"title": "only words"},
    {"image": Image.new("RGB", (8, 8), "blue")},
    {"topic": ["one", "two"], "content": "and no title", "image": RED},
    {"title": "cup"},
]


def tiny(name="notellm2", **overrides):
    model = build(name, **{**MODELS[name], **overrides}).eval()
    model.trained = True
    return model


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and its graph, each made once."""
    made = {}

    def go(name="notellm2"):
        if name not in made:
            torch.manual_seed(0)
            model = tiny(name)
            made[name] = model, export_onnx(model, tmp_path_factory.mktemp("export") / "deep" / "items.onnx")
        return made[name]

    return go


@pytest.mark.parametrize("rows", [ROWS, ROWS[::-1], ROWS * 3, ROWS[1:3], *([row] for row in ROWS)], ids=lambda rows: f"{len(rows)} rows")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "meter")) for name in MODELS])
def test_any_rows_give_the_vectors_of_the_model(exported, name, rows):
    model, path = exported(name)
    (vectors,) = session(path).run(None, prepare(model, rows))
    assert vectors == pytest.approx(model.encode(rows), abs=1e-5)


def test_every_model_of_items_is_exported_and_no_other(tmp_path):
    assert MODELS.keys() == set(names("model")) - {
        "classifier",
        "mla",
        "nlvr2",
        "vqa",
        "albef",
        "beit_3",
        "blip",
        "clip",
        "coca",
        "vlmo",
        "visual_tokenizer",
    }
    encoder = TINY["vision"]
    with pytest.raises(ZooError, match="this model tells classes and gives no vectors of items: there is nothing to export"):
        export_onnx(build("classifier", classes=2, encoders={"left": encoder, "right": encoder}), tmp_path / "x.onnx")
    with pytest.raises(ZooError, match="this model tells pictures by visual tokens"):
        export_onnx(build("visual_tokenizer"), tmp_path / "x.onnx")
    for name in ("albef", "beit_3", "blip", "clip", "coca", "vlmo"):
        with pytest.raises(ZooError, match="this model reads pictures and texts apart, and the graph that is written here takes items"):
            export_onnx(build(name), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_the_description_is_that_of_the_graph(exported):
    model, path = exported()
    assert {p.name for p in path.parent.iterdir()} == {"items.onnx", "items.onnx.json"}
    about = json.loads((path.parent / "items.onnx.json").read_text())
    types = {"int64": "tensor(int64)", "bool": "tensor(bool)", "float32": "tensor(float)"}
    inputs = session(path).get_inputs()
    assert {i.name: i.type for i in inputs} == {name: types[said["type"]] for name, said in about["inputs"].items()}
    for i in inputs:
        said = about["inputs"][i.name]["shape"]
        assert [size if isinstance(size, int) else str for size in i.shape] == [size if isinstance(size, int) else str for size in said]
    assert about["inputs"]["text.slots"]["shape"] == ["batch", "length"]
    assert about["inputs"]["image.values"]["shape"] == ["batch", 3, 16, 16]
    assert about["output"] == {"name": "vector", "embedding": "note", "type": "float32", "shape": ["batch", 16], "length": 1}
    assert about["checked"]["largest_difference"] <= about["checked"]["tolerance"] == TOLERANCE
    assert about["spec"] == model.spec


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"connector": {"name": "qformer", "num_queries": 2, "layers": 1}},
        {"fusion": ["early", "concat"]},
        {"fusion": ["micl", "attention"]},
        {"fusion": ["text_only", "gated_late"]},
        {"fusion": ["early", "film"]},
        {"fusion": ["early", "bigated"]},
        {"fusion": ["early", "sum"]},
        {"fusion": "text_only"},
        {"dim": None},
        {"absent": "zeros"},
        {"backbone": {"name": "qwen", "size": "tiny"}},
        {"backbone": {"name": "qwen", "size": "tiny", "dtype": "bfloat16"}},
        {"vision": "timm:vit_tiny_patch16_224"},
    ],
    ids=str,
)
def test_other_parts(tmp_path, overrides):
    model = tiny(**overrides)
    rows = [row for row in ROWS if model.processor.sees(row)]
    (vectors,) = session(export_onnx(model, tmp_path / "m.onnx")).run(None, prepare(model, rows))
    assert vectors == pytest.approx(model.encode(rows), abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name, output", [("notellm2", "visual"), ("dual_encoder", "image")])
def test_another_embedding(tmp_path, name, output):
    model = tiny(name)
    path = export_onnx(model, tmp_path / "m.onnx", output=output)
    (vectors,) = session(path).run(None, prepare(model, ROWS[:1]))
    assert vectors == pytest.approx(model.encode(ROWS[:1], output=output), abs=1e-5)


def test_the_command(command, tmp_path, monkeypatch):
    save(tiny(), tmp_path / "run")
    monkeypatch.setattr(export, "export_onnx", lambda model, out, output: out if (model.dim, output) == (16, None) else None)
    assert command("export", tmp_path / "run", "--out", "items.onnx") == (0, "items.onnx\n", "")


# What is not written


def test_vectors_that_differ_are_not_left_in_place(tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_text("the one before")
    monkeypatch.setattr(export, "_program", lambda encoder, feed: Wrong())
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, providers: Wrong())
    with pytest.raises(Failure, match=r"onnxruntime differs from torch by .*, allowed is 1e-04: nothing was written"):
        export_onnx(tiny(), tmp_path / "m.onnx")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.onnx", "the one before")]


class Wrong:
    """A graph and a session that give something else, NaN for a single row."""

    def save(self, path, external_data):
        path.write_text("wrong")

    def run(self, _, feed):
        return [np.full((len(feed["text.values"]), 16), 0.5, dtype=np.float32)]


def test_a_model_that_no_graph_can_hold(tmp_path, monkeypatch):
    model = tiny(fusion="text_only")
    forward = type(model.backbone).forward
    monkeypatch.setattr(type(model.backbone), "forward", lambda self, *given: forward(self, *given) * float(given[0].sum()))
    with pytest.raises(ZooError, match=r"cannot be written as ONNX \(.*\): encode with the model itself"):
        export_onnx(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "out, output, says",
    [
        ("model", None, r"model is no name of an ONNX file: write .*model\.onnx"),
        ("model.onnx", "word", r"no embedding 'word' \(it gives: note, visual\)"),
        ("file/model.onnx", None, r"--out .*/file/model\.onnx cannot be written \(.*\): write a place that can"),
    ],
)
def test_what_is_asked_for_wrongly(tmp_path, out, output, says):
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=says):
        export_onnx(tiny(), tmp_path / out, output=output)


def test_several_images_are_refused():
    with pytest.raises(ZooError, match="a row has several images, and the graph takes one"):
        prepare(tiny(), [{"image": [RED, RED]}])


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_the_extra_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ZooError, match=rf"export needs {package}: pip install 'multimodal-zoo\[onnx\]'"):
        export_onnx(tiny(), tmp_path / "m.onnx")
