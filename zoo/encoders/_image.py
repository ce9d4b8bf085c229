"""Any image a user hands over to the normalised pixels that a vision encoder was trained on, the same on every machine."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.errors import ZooError
from zoo.pictures import MOST_PIXELS, TOO_LARGE, UNDECODABLE, check_size, in_colours
from zoo.types import ModalityInputs

Colour = tuple[float, float, float]

CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
HALF: Colour = (0.5, 0.5, 0.5)
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class ImageProcessor:
    """PIL image, bytes or path to (3, size, size) float32: resize, centre crop, normalise. Nothing in it is random.

    What is transparent is white, as in data sets.

    Args:
        size: Height and width of the result.
        mean: Of each colour, in [0, 1].
        std: Of each colour.
        shorter: The shorter side after resizing, at least ``size``; None: ``size``.
        squash: Resize to a square whatever the aspect ratio, and crop nothing, as SigLIP does.
        interpolation: The filter of the resizing.
    """

    def __init__(
        self,
        size: int,
        *,
        mean: Colour = CLIP_MEAN,
        std: Colour = CLIP_STD,
        shorter: int | None = None,
        squash: bool = False,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        if interpolation not in _FILTERS:
            raise ZooError(f"interpolation {interpolation!r} is none of {', '.join(_FILTERS)}")
        self.size, self.squash, self.interpolation = size, squash, interpolation
        self.shorter = size if shorter is None else shorter
        if self.shorter < size:
            raise ZooError(f"the shorter side is resized to {self.shorter}, less than the crop of {size}: write shorter={size} or more")
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, thing: Any) -> ModalityInputs:
        """One image.

        Raises:
            ZooError: If it cannot be decoded, or has more than `zoo.pictures.MOST_PIXELS` pixels.
        """
        picture = self._crop(_open(thing))
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)  # (3, S, S)
        return ModalityInputs((values - _column(self.mean)) / _column(self.std))

    def _crop(self, picture: Image.Image) -> Image.Image:
        filter_ = _FILTERS[self.interpolation]
        if self.squash:
            return picture.resize((self.size, self.size), filter_)
        short = min(picture.size)
        width, height = (self.shorter if side == short else self.shorter * side // short for side in picture.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return picture.resize((width, height), filter_).crop((left, top, left + self.size, top + self.size))

    def config(self) -> dict[str, Any]:
        """The arguments that make an equal processor."""
        return {
            "size": self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "shorter": self.shorter,
            "squash": self.squash,
            "interpolation": self.interpolation,
        }


def _column(colour: tuple[float, ...]) -> Tensor:
    return torch.tensor(colour).view(3, 1, 1)


def _open(thing: Any) -> Image.Image:
    source: Any
    if isinstance(thing, Image.Image):
        name, source = f"a PIL image of mode {thing.mode}", None
    elif isinstance(thing, bytes):
        name, source = f"{len(thing)} bytes that start with {thing[:8]!r}", BytesIO(thing)
    elif isinstance(thing, str | Path):
        name, source = str(thing), thing
    else:
        raise ZooError(f"{type(thing).__name__} is no image: give a PIL image, the bytes of a file, or a path")
    try:
        if source is None:
            check_size(thing)
            return in_colours(thing)
        with Image.open(source) as picture:
            check_size(picture)
            return in_colours(picture)
    except TOO_LARGE as e:
        raise ZooError(f"{name}: more than {MOST_PIXELS} pixels: make the image smaller ({e})") from e
    except UNDECODABLE as e:
        raise ZooError(f"{name}: no image that can be decoded ({e})") from e
