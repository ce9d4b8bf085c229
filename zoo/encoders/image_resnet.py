"""A residual network over pictures: for small ones such as digits, and the one that the papers on modality balance train on large ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from torch import nn

from zoo.config import Positive
from zoo.encoders._image import HALF, ImageProcessor
from zoo.encoders._residual import places, stages, start
from zoo.registry import register
from zoo.types import ModalityInputs, Tokens


class Size(NamedTuple):
    """Of a network."""

    layers: tuple[int, ...]
    width: int
    image_size: int
    quarters: bool  # whether the stem leaves a quarter of the side


SIZES = {"resnet18": Size((2, 2, 2, 2), 64, 224, quarters=True), "tiny": Size((1, 1, 1), 16, 28, quarters=False)}


@register(
    "encoder", "image_resnet", paper="He et al., Deep residual learning for image recognition, 2015, https://arxiv.org/abs/1512.03385"
)
class ImageResNet(nn.Module):
    """A ResNet of basic blocks; ``pooled`` is the mean over the picture.

    ``image_resnet:resnet18`` is the network of OGM-GE (Peng et al., 2022, https://arxiv.org/abs/2203.15332) and MLA (Zhang et al., 2024,
    https://arxiv.org/abs/2311.10707), 512 wide, drawn and not pretrained; `timm:resnet18` has weights. The others have the stem of the
    network for CIFAR in the first paper, one 3 x 3 convolution that keeps the size. Batch norm: in training a row's features depend on
    the other rows of its batch that have a picture, and gradients of parts of a batch are not those of the whole; in ``eval()`` on none.

    Args:
        arch: A size by name.
        layers: Blocks of each stage; None: those of ``arch``. Each stage but the first halves the side.
        width: Of the first stage; each further one has twice that of the one before, and ``dim`` is the last's. None: that of ``arch``.
        image_size: Side of the input, to which pictures are resized; None: that of ``arch``, 28 or 224.
    """

    def __init__(
        self,
        *,
        arch: Literal["resnet18", "tiny"] = "tiny",
        layers: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None,
        width: Positive | None = None,
        image_size: Positive | None = None,
    ) -> None:
        super().__init__()
        size = SIZES[arch]
        layers, width = layers or size.layers, width or size.width
        self.dim = width * 2 ** (len(layers) - 1)
        self.processor = ImageProcessor(image_size or size.image_size, mean=HALF, std=HALF)
        self.first = nn.Conv2d(3, width, 7, 2, 3, bias=False) if size.quarters else nn.Conv2d(3, width, 3, 1, 1, bias=False)
        pool = [nn.MaxPool2d(3, stride=2, padding=1)] if size.quarters else []
        self.stem = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), *pool)
        self.stages = stages(layers, width)
        start(self)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Pixels (B, 3, H, W) to Tokens."""
        return places(self.stages(self.stem(self.first(x.values.to(self.first.weight.dtype)))))

    def portable(self) -> dict[str, Any]:
        """Nothing: it is always built from its settings alone."""
        return {}
