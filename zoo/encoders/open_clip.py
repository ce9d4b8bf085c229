"""Every vision tower of open_clip as an encoder: ``open_clip:ViT-B-32``, or ``open_clip:ViT-B-32/laion2b_s34b_b79k`` with weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.encoders._image import ImageProcessor
from zoo.encoders._open_clip import OpenClipEncoder, processor_of, remotes, tower
from zoo.registry import register
from zoo.types import Remote


def _remote(settings: Mapping[str, Any]) -> list[Remote]:
    name, _, tag = settings["arch"].partition("/")
    return remotes(name, tag if settings["pretrained"] and tag else None)


@register(
    "encoder",
    "open_clip",
    paper="Ilharco et al., OpenCLIP, 2021, https://github.com/mlfoundations/open_clip",
    licence="MIT for the code; of the weights that are loaded: see their card",
    remote=_remote,
)
def make_open_clip(
    *,
    arch: str,
    pretrained: bool = True,
    layer: int = -1,
    keep_cls: bool = True,
    final_norm: bool = False,
    image_size: int | None = None,
    processor: dict[str, Any] | None = None,
) -> OpenClipEncoder:
    """The vision tower of an open_clip model, read at one layer.

    Args:
        arch: The model, and after a slash the tag or the file of its weights; without a slash they are random.
        pretrained: False leaves out the weights that ``arch`` names.
        layer: The block that is read, from 0, or from the end: -1 the last.
        keep_cls: Keep the class token among the tokens; it is ``pooled`` either way.
        final_norm: Apply the last norm to what is read.
        image_size: Side of the input; None: the model's own.
        processor: The arguments of its image processor, instead of those that come with the weights.

    Raises:
        ZooError: If open_clip has no such model, weights or layer, or they cannot be had.
    """
    name, _, tag = arch.partition("/")
    visual = tower(name, tag if pretrained and tag else None, image_size)
    pixels = ImageProcessor(**processor) if processor else processor_of(visual)
    kept = {"pretrained": False, "processor": pixels.config()}  # without its weights a tag brings no preprocessing
    return OpenClipEncoder(visual, f"open_clip:{arch}", pixels, layer=layer, keep_cls=keep_cls, final_norm=final_norm, portable=kept)
