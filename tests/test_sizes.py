"""Encoders in the sizes of the papers: as large as published, and equal to other libraries' networks of the same weights."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from transformers import BertTokenizerFast

import zoo
from zoo.collate import stack
from zoo.errors import ZooError
from zoo.registry import entry, make
from zoo.types import ModalityInputs, Remote


@pytest.mark.parametrize("name, channels, shape", [("audio_resnet", 1, (17, 33)), ("image_resnet", 3, (32, 40))])
@pytest.mark.parametrize("training", [False, True])
def test_resnet18_is_torchvisions_with_its_gradients(name, channels, shape, training):
    """The same weights, in order; in training the statistics of batch norm move alike too."""
    ours, theirs = make("encoder", f"{name}:resnet18").double(), resnet18(num_classes=1).double()
    theirs.fc = nn.Identity()
    theirs.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False).double()
    values, names = list(ours.state_dict().values()), list(theirs.state_dict())
    assert len(values) == len(names)
    theirs.load_state_dict({k: v.clone() for k, v in zip(names, values, strict=True)})
    x = torch.randn(3, channels, *shape, dtype=torch.float64)
    found = ours.train(training)(ModalityInputs(x if channels == 3 else x[:, 0])).pooled
    expected = theirs.train(training)(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)  # float64
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-7, atol=1e-9)  # float64, sums in another order
    for own, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other)


VIT = 12 * (12 * 768**2 + 13 * 768) + 2 * 768  # blocks of four and eight widths squared, their biases and norms, and the last norm
RESNET18 = 11_689_512 - 513_000  # torchvision's, without its head


@pytest.mark.parametrize(
    "spec, count, dim",
    [
        ("image_resnet:resnet18", RESNET18, 512),
        ("audio_resnet:resnet18", RESNET18 - 2 * 49 * 64, 512),  # one channel in the place of three
        ({"name": "frames", "image": "image_resnet:resnet18"}, RESNET18, 512),
        ("image_transformer:base", VIT + 3 * 256 * 768 + 768 + (1 + 16 * 16) * 768 + 768, 768),  # patches, positions, class token
        ("audio_transformer:cav_mae", VIT + 256 * 768 + 768 + 8 * 64 * 768, 768),
        ("text_transformer:base", VIT + (30_522 + 256) * 768, 768),
    ],
)
def test_as_large_as_published(spec, count, dim):
    with torch.device("meta"):
        built = make("encoder", spec)
    assert sum(p.numel() for p in built.parameters()) == count
    assert all(p.is_meta for p in built.parameters())
    assert built.dim == dim


def test_a_picture_of_the_papers_size():
    built = make("encoder", "image_resnet:resnet18", layers=[1, 1, 1, 1], width=4).eval()
    x = built.processor(Image.fromarray(np.random.randint(0, 255, (240, 320, 3), np.uint8)))
    assert x.values.shape == (3, 224, 224)
    assert built(ModalityInputs(x.values[None])).tokens.shape == (1, 49, 32)
    assert make("encoder", "image_resnet", image_size=40).processor.config()["size"] == 40


@pytest.mark.parametrize(
    "name, count", [("frames", RESNET18), ("image_transformer", 85_844_736), ("audio_resnet", RESNET18 - 6272), ("image_resnet", 77_392)]
)
def test_the_defaults_are_counted(name, count):
    assert zoo.info(name)["parameters"] == count


def test_convolutions_start_as_in_the_paper():
    """Kaiming-normal by the outputs: variance 2 / (channels * 9) of a 3 x 3 convolution."""
    built = make("encoder", "image_resnet:resnet18")
    last = [part for part in built.modules() if isinstance(part, nn.Conv2d)][-1]
    assert last.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_the_spectrogram_of_the_papers():
    """128 bands, 1024 frames of 10 ms, patches of 16: 8 x 64 tokens."""
    with torch.device("meta"):
        built = make("encoder", "audio_transformer:cav_mae")
        out = built(ModalityInputs(torch.zeros(2, 128, 1024)))
    assert built.processor(np.random.uniform(-1, 1, 16_000)).values.shape == (128, 1024)
    assert out.tokens.shape == (2, 512, 768)
    assert out.pooled.shape == (2, 768)


def test_a_vit_that_pools_all_its_tokens_is_timms():
    ours = make("encoder", "image_transformer:tiny").double().eval()
    theirs = timm.create_model("test_vit", img_size=32, num_classes=0, global_pool="").double().eval()
    theirs.load_state_dict(ours.model.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out, expected = ours(ModalityInputs(x)), theirs(x)  # (2, 5, 64), normed, the class token first
    torch.testing.assert_close(out.tokens, expected, rtol=0, atol=1e-12)  # float64
    torch.testing.assert_close(out.pooled, expected.mean(1), rtol=0, atol=1e-12)
    assert make("encoder", "image_transformer:tiny", image_size=48).processor.config()["size"] == 48
    assert ours.portable() == {}


def bert(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "shoes", "blue", "hat"]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


def test_words_of_a_tokenizer_from_a_folder(tmp_path):
    built = make("encoder", "text_transformer:tiny", tokenizer=bert(tmp_path), max_length=6).eval()
    assert built.words.num_embeddings == 9
    assert built.processor("red shoes").values.tolist() == [2, 5, 6, 3]  # [CLS] red shoes [SEP]
    assert built.processor("red [CLS] " * 9).values.tolist()[1:3] != [5, 2], "a special token that a user writes is text"
    assert len(built.processor("red " * 9).values) == 6
    x = stack([{"text": built.processor(text)} for text in ("red shoes", "blue", "")])["text"]
    out = built(x)
    torch.testing.assert_close(out.pooled[1], out.tokens[1, :3].mean(0))
    alone = built(ModalityInputs(built.processor("blue").values[None]))
    torch.testing.assert_close(out.pooled[1], alone.pooled[0], rtol=1e-4, atol=1e-5)  # float32, another length
    again = make("encoder", "text_transformer:tiny", max_length=6, **built.portable()).eval()
    again.load_state_dict(built.state_dict())
    assert torch.equal(again(x).pooled, out.pooled)
    assert again.processor.config() == built.processor.config()


def test_hashed_words_are_those_of_tiny_text():
    ours, other = (make("encoder", name).processor for name in ("text_transformer:tiny", "tiny_text"))
    assert ours.config() == other.config()
    assert make("encoder", "text_transformer:tiny").portable() == {}


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"dim": 30}, "dim 30 must be a multiple of heads 4"),
        ({"rows": 2}, "2 rows hold no words: write 3 or more"),
        ({"tokenizer": "not/there"}, "the tokenizer of not/there could not be loaded"),
        ({"tokenizer": "x", "rows": 9}, "rows 9 goes with hashed words; the tokenizer says how many it has"),
    ],
)
def test_texts_that_cannot_be_read(settings, says):
    with pytest.raises(ZooError, match=says):
        make("encoder", "text_transformer:tiny", **settings)


def test_what_a_tokenizer_is_read_from_is_known_before():
    remote = entry("encoder", "text_transformer").remote
    assert remote({"tokenizer": "org/name"}) == [Remote("tokenizer", "org/name", ("tokenizer.json",))]
    assert remote({"tokenizer": None}) == remote({"tokenizer": {"serialized": "{}"}}) == []
