"""The same picture for two encoders: pixels that were prepared for one, as another wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import ZooError


class Pixels(NamedTuple):
    """What an encoder's processor makes of a picture."""

    size: int  # the side
    mean: tuple[float, ...]  # of each colour, in [0, 1]
    std: tuple[float, ...]


def pixels_of(config: Mapping[str, Any], whose: str) -> Pixels:
    """From a processor's ``config()``.

    Args:
        config: Of the processor.
        whose: It is, for the message.

    Raises:
        ZooError: If it does not say the side and the colours, as where it makes no square of pixels.
    """
    if lacks := [key for key in ("size", "mean", "std") if key not in config]:
        raise ZooError(f"{whose}: its pixels cannot be made into those of another encoder, as its processor says no {', '.join(lacks)}")
    return Pixels(int(config["size"]), tuple(config["mean"]), tuple(config["std"]))


def repainted(pixels: Tensor, given: Pixels, wanted: Pixels) -> Tensor:
    """(B, 3, S, S) that are normalised as ``given`` says to (B, 3, S', S') as ``wanted`` does; the same tensor where both say the same.

    Pictures of another side are resized, bicubic, after what another size would have cropped: both see the same part of a picture.
    """
    if (given.mean, given.std) != (wanted.mean, wanted.std):
        old, new = (_columns(which, pixels) for which in (given, wanted))
        pixels = (pixels * old[1] + old[0] - new[0]) / new[1]
    if pixels.shape[-1] != wanted.size:
        pixels = F.interpolate(pixels, size=(wanted.size, wanted.size), mode="bicubic", antialias=True)
    return pixels


def _columns(which: Pixels, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (3, 1, 1) each."""
    mean, std = (torch.tensor(colour, dtype=like.dtype, device=like.device).view(-1, 1, 1) for colour in (which.mean, which.std))
    return mean, std
