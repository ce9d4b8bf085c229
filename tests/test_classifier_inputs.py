"""Any encoder in a classifier: rows that lack its modality, rows that cannot be read, and encoders that cannot serve."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizerFast

import zoo
from zoo.batches import LabelledBatches
from zoo.collate import RowCollate
from zoo.errors import ZooError
from zoo.hub import load, save
from zoo.registry import register
from zoo.types import Tokens

SMALL = {"dim": 16, "layers": 1, "heads": 2}
ENCODERS = {
    "audio": {"name": "audio_resnet", "arch": "tiny", "width": 8},
    "image": {"name": "image_resnet", "width": 4},
    "video": {"name": "frames", "image": {"name": "image_resnet", "width": 4}},
    "text": {"name": "tiny_text", **SMALL},
    "vector": {"name": "features", "dim": 16},
}


def picture():
    return Image.fromarray(np.random.randint(0, 255, (28, 28, 3), np.uint8))


def row(number, *keys):
    whole = {
        "audio": np.random.uniform(-1, 1, 4000),
        "image": picture(),
        "video": [picture() for _ in range(1 + number % 4)],
        "text": f"words of row {number}",
        "vector": np.random.randn(1 + number, 16),
    }
    return {"id": number} | {key: whole[key] for key in (keys or whole)}


def classifier(**settings):
    return zoo.build("classifier", encoders=ENCODERS, classes=3, fusion="late", **settings)


def test_a_row_is_the_same_alone_and_between_others_that_lack_something():
    torch.manual_seed(0)
    model = classifier().eval()
    rows = [row(0), row(1, "audio", "video"), row(2, "text"), row(3, "image", "video", "vector"), row(4)]
    collate = RowCollate(model.processor)
    with torch.no_grad():
        together = model(collate(rows))
        for i, one in enumerate(rows):
            alone = model(collate([one]))
            torch.testing.assert_close(together.logits["fused"][i], alone.logits["fused"][0], rtol=1e-4, atol=1e-5)  # float32
            assert {m for m in ENCODERS if together.present[m][i]} == one.keys() - {"id"}
            assert all((together.embeddings[m][i] == 0).all() for m in ENCODERS.keys() - one.keys())


@pytest.mark.parametrize("key", [key for key in ENCODERS if key != "vector"])
def test_the_gradient_of_one_modality_reaches_its_encoder_and_no_other(key):
    model = classifier()
    out = model(RowCollate(model.processor)([row(i, key) for i in range(3)]))
    out.logits["fused"].pow(2).sum().backward()
    moved = {name.split(".")[1] for name, p in model.named_parameters() if name.startswith("encoders.") and p.grad is not None}
    assert moved == {key}


def test_a_batch_in_bfloat16():
    model = classifier().bfloat16().eval()
    assert model(RowCollate(model.processor)([row(0), row(1, "video")])).logits["fused"].isfinite().all()


def test_processors_say_all_that_decides_their_result():
    config = classifier().processor.config()
    assert config["video"] == {"kind": "frames", "frames": 3, "image": config["image"]}
    other = zoo.build("classifier", encoders={**ENCODERS, "video": {**ENCODERS["video"], "frames": 4}}, classes=3).processor.config()
    assert {key for key in config if config[key] != other[key]} == {"video"}


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"audio": np.array([0.0, np.nan])}, r"row 2: an array of shape \(2,\) of float64: 1 of 2 samples are NaN or infinite"),
        ({"audio": np.zeros(0)}, r"row 2: an array of shape \(0,\) of float64: no samples"),
        ({"video": []}, "row 2: a list of 0: no frames"),
        ({"video": [b"oops"]}, "row 2: frame 1 of 1: 4 bytes that start with b'oops': no image that can be decoded"),
        ({"image": b"oops"}, "row 2: 4 bytes that start with b'oops': no image that can be decoded"),
        ({"vector": np.full((2, 16), np.inf)}, r"row 2: encoder 'features': 32 of 32 values of an array of shape \(2, 16\) are NaN or inf"),
        ({"vector": np.zeros((0, 16))}, r"row 2: encoder 'features': an array of shape \(0, 16\) holds no vector: leave the key out"),
        ({"vector": np.zeros((2, 3))}, r"row 2: encoder 'features' reads arrays \(tokens, 16\), this is an array of shape \(2, 3\)"),
    ],
)
def test_what_training_cannot_read_is_named_with_its_row(wrong, says):
    model = classifier()
    rows = [row(0), row(1), {"id": 2, **wrong}, row(3)]
    data = SimpleNamespace(rows=rows, labels=np.zeros(4, np.int64), split=lambda name: np.arange(4))
    with pytest.raises(ZooError, match=says):
        LabelledBatches(data, 0, model.processor, keep=0)[np.array([[1, 2]])]


def test_a_row_that_shows_nothing_is_named():
    with pytest.raises(ZooError, match="this model sees nothing of row 1: give it at least one of audio, image, video, text, vector"):
        classifier().classify([row(0, "text"), {"id": 1, "title": "not looked at"}])


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"encoders": {"audio": ENCODERS["audio"]}}, "classifier: encoders has audio: write two modalities or more"),
        ({"encoders": {}}, "classifier: encoders has no modality: write two modalities or more"),
        (
            {"encoders": {"audio": ENCODERS["audio"], "vector": {"name": "features", "dim": 7}}},
            r"the encoders have unequal widths \(audio 16, vector 7\): write dim, to which each is mapped, or make them equal",
        ),
        ({"fusion": "concat", "shared_head": False}, "shared_head: false goes with fusions of logits; 'concat' combines features"),
    ],
)
def test_encoders_that_make_no_classifier(settings, says):
    with pytest.raises(ZooError, match=says):
        zoo.build("classifier", **{"encoders": ENCODERS, "classes": 3, "fusion": "late", **settings})


def test_encoders_of_unequal_widths_are_mapped_to_one():
    vectors = {name: {"name": "features", "dim": dim} for name, dim in (("left", 5), ("middle", 8), ("right", 11))}
    model = zoo.build("classifier", encoders=vectors, classes=3, fusion="late", dim=8)
    assert {name: tuple(part.weight.shape) for name, part in model.widen.items()} == {"left": (8, 5), "right": (8, 11)}
    given = {name: np.random.randn(1, vector["dim"]) for name, vector in vectors.items()}
    out = model(RowCollate(model.processor)([{"id": 0, **given}]))
    left = model.widen["left"](torch.from_numpy(given["left"][0]).float())
    torch.testing.assert_close(out.embeddings["left"][0], left, rtol=0, atol=1e-5)  # float32
    assert {x.shape for x in out.embeddings.values()} == {(1, 8)}


def test_an_encoder_that_does_not_pool(own_registry):
    class Bare(torch.nn.Module):
        """Pools nothing."""

        def __init__(self):
            super().__init__()
            self.dim, self.processor = 16, classifier().processor.processors["vector"]

        def forward(self, x):
            return Tokens(x.values, x.mask, None, torch.ones(len(x.values)).bool())

    register("encoder", "fake_bare")(Bare)
    model = zoo.build("classifier", encoders={"text": ENCODERS["text"], "vector": "fake_bare"}, classes=3)
    with pytest.raises(ZooError, match="classifier: the encoder of 'vector', Bare, does not pool: name one that does"):
        model(RowCollate(model.processor)([row(0, "text", "vector")]))


def test_a_saved_classifier_needs_no_tokenizer_and_no_weights_of_others(tmp_path):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "words", "of", "row"])}
    BertTokenizerFast(vocab=words).save_pretrained(tmp_path / "words")
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "w.safetensors")
    image = {"name": "timm:test_vit", "image_size": 32, "pretrained": str(tmp_path / "w.safetensors")}
    encoders = {
        "video": {"name": "frames", "image": image, "frames": 2},
        "text": {"name": "text_transformer", "arch": "tiny", "tokenizer": str(tmp_path / "words")},
    }
    model = zoo.build("classifier", encoders=encoders, classes=3, fusion="late").eval()
    save(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "words")
    (tmp_path / "w.safetensors").unlink()
    again = load(tmp_path / "model")
    batch = RowCollate(model.processor)([row(0), row(2)])
    assert torch.equal(again(batch).logits["fused"], model(batch).logits["fused"])
