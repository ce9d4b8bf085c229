"""A residual network over log-mel spectrograms: the audio encoder of the papers on modality balance, and a tiny one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from torch import nn

from zoo.config import Positive
from zoo.encoders._audio import LogMel
from zoo.encoders._residual import places, stages, start
from zoo.registry import register
from zoo.types import ModalityInputs, Tokens


class Size(NamedTuple):
    """Of a network."""

    layers: tuple[int, ...]
    width: int


SIZES = {"resnet18": Size((2, 2, 2, 2), 64), "tiny": Size((1, 1), 16)}


@register(
    "encoder", "audio_resnet", paper="He et al., Deep residual learning for image recognition, 2015, https://arxiv.org/abs/1512.03385"
)
class AudioResNet(nn.Module):
    """A ResNet of basic blocks over one channel; ``pooled`` is the mean over time and frequency.

    ``audio_resnet:resnet18`` is the network of OGM-GE (Peng et al., 2022, https://arxiv.org/abs/2203.15332) and MLA (Zhang et al., 2024,
    https://arxiv.org/abs/2311.10707), 512 wide, drawn and not pretrained. Batch norm: in training a row's features depend on the
    other rows of its batch that have audio, and gradients of parts of a batch are not those of the whole; in ``eval()`` on none.

    Args:
        arch: A size by name.
        layers: Blocks of each stage; None: those of ``arch``. Each stage but the first halves time and frequency.
        width: Of the first stage; each further one has twice that of the one before, and ``dim`` is the last's. None: that of ``arch``.
        sample_rate: In Hz; that of the recordings.
        n_fft: Samples of a window.
        hop: Samples from one frame to the next.
        mels: Bands.
        seconds: What is longer is cut, what is shorter is padded.
    """

    def __init__(
        self,
        *,
        arch: Literal["resnet18", "tiny"] = "resnet18",
        layers: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None,
        width: Positive | None = None,
        sample_rate: Positive = 8000,
        n_fft: Positive = 256,
        hop: Positive = 128,
        mels: Positive = 32,
        seconds: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__()
        layers, width = layers or SIZES[arch].layers, width or SIZES[arch].width
        self.dim = width * 2 ** (len(layers) - 1)
        self.processor = LogMel(sample_rate=sample_rate, n_fft=n_fft, hop=hop, mels=mels, seconds=seconds)
        self.first = nn.Conv2d(1, width, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        self.stages = stages(layers, width)
        start(self)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Log-mel (B, F, T) to Tokens."""
        values = x.values[:, None].to(self.first.weight.dtype)  # (B, 1, F, T)
        return places(self.stages(self.stem(self.first(values))))  # (B, D, F / 32, T / 32) with four stages

    def portable(self) -> dict[str, Any]:
        """Nothing: it is always built from its settings alone."""
        return {}
