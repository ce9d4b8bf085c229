"""Encoders in the sizes of the papers: as large as published, and equal to other libraries' networks of the same weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18

import zoo
from zoo.registry import make
from zoo.types import ModalityInputs


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


RESNET18 = 11_689_512 - 513_000  # torchvision's, without its head


@pytest.mark.parametrize(
    "spec, count, dim",
    [
        ("image_resnet:resnet18", RESNET18, 512),
        ("audio_resnet:resnet18", RESNET18 - 2 * 49 * 64, 512),  # one channel in the place of three
        ({"name": "frames", "image": "image_resnet:resnet18"}, RESNET18, 512),
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


@pytest.mark.parametrize("name, count", [("frames", RESNET18), ("audio_resnet", RESNET18 - 6272), ("image_resnet", 77_392)])
def test_the_defaults_are_counted(name, count):
    assert zoo.info(name)["parameters"] == count


def test_convolutions_start_as_in_the_paper():
    """Kaiming-normal by the outputs: variance 2 / (channels * 9) of a 3 x 3 convolution."""
    built = make("encoder", "image_resnet:resnet18")
    last = [part for part in built.modules() if isinstance(part, nn.Conv2d)][-1]
    assert last.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
