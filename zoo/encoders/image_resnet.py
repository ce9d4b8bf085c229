"""A residual network for small pictures, such as digits; ResNets of the usual sizes are timm's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from zoo.config import Positive
from zoo.encoders._image import HALF, ImageProcessor
from zoo.encoders._residual import places, stages, start
from zoo.registry import register
from zoo.types import ModalityInputs, Tokens


@register(
    "encoder", "image_resnet", paper="He et al., Deep residual learning for image recognition, 2015, https://arxiv.org/abs/1512.03385"
)
class ImageResNet(nn.Module):
    """The paper's network for CIFAR: a 3 x 3 stem that keeps the size, then basic blocks; ``pooled`` is the mean over the picture.

    Batch norm: in training a row's features depend on the other rows of its batch that have a picture, and gradients of parts of a
    batch are not those of the whole; in ``eval()`` on none. `timm:resnet18` is the network of the papers on large pictures.

    Args:
        layers: Blocks of each stage; the paper's ResNet-20 has (3, 3, 3). Each stage but the first halves the side.
        width: Of the first stage; each further one has twice that of the one before, and ``dim`` is the last's.
        image_size: Side of the input; pictures are resized to it.
    """

    def __init__(
        self,
        *,
        layers: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 1, 1),
        width: Positive = 16,
        image_size: Positive = 28,
    ) -> None:
        super().__init__()
        self.dim = width * 2 ** (len(layers) - 1)
        self.processor = ImageProcessor(image_size, mean=HALF, std=HALF)
        self.first = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.stem = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        self.stages = stages(layers, width)
        start(self)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Pixels (B, 3, H, W) to Tokens."""
        return places(self.stages(self.stem(self.first(x.values.to(self.first.weight.dtype)))))

    def portable(self) -> dict[str, Any]:
        """Nothing: it is always built from its settings alone."""
        return {}
