"""The large vision encoder of NoteLLM-2's MQwen-bigG: ViT-bigG/14 of OpenCLIP, 1664 wide, 257 tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from zoo.encoders._open_clip import OpenClipEncoder, processor_of, remotes, tower
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Remote

ARCHITECTURE = "ViT-bigG-14"
WEIGHTS = "laion2b_s39b_b160k"
PARAMETERS = 1_844_907_264  # of the tower with its last norm and projection
log = logging.getLogger("zoo")


def _weights(pretrained: bool | str) -> str | None:
    return pretrained if isinstance(pretrained, str) else WEIGHTS if pretrained else None


def _remote(settings: Mapping[str, Any]) -> list[Remote]:
    return remotes(ARCHITECTURE, _weights(settings["pretrained"]))


@register(
    "encoder",
    "open_clip_vit_bigg_14",
    paper="Cherti et al., Reproducible scaling laws for contrastive language-image learning, 2023, https://arxiv.org/abs/2212.07143",
    licence="MIT",
    remote=_remote,
)
def make_open_clip_vit_bigg_14(
    *,
    pretrained: bool | str = False,
    layer: int = -1,
    keep_cls: bool = True,
    final_norm: bool = False,
    device: Literal["cpu", "meta"] = "cpu",
) -> OpenClipEncoder:
    """ViT-bigG/14, trained on LAION-2B.

    Args:
        pretrained: Load the published weights; or the file to load them from.
        layer: The block that is read, from 0, or from the end: -1 the last of 48.
        keep_cls: Keep the class token among the tokens; it is ``pooled`` either way.
        final_norm: Apply the last norm to what is read; NoteLLM-2 does not.
        device: ``"meta"`` allocates nothing, for counting and for weights that come from elsewhere.

    Raises:
        ZooError: If it would fill 7 GB with random numbers, or the weights cannot be had.
    """
    size = f"open_clip_vit_bigg_14: {PARAMETERS / 1e9:.2f} G parameters, {PARAMETERS * 4 / 1e9:.1f} GB in float32"
    weights = _weights(pretrained)
    if device == "cpu":
        if weights is None:
            raise ZooError(f"{size}, all random: write pretrained: true, device: meta, or a smaller encoder such as clip_vit_b16")
        log.warning(size)
    elif weights is not None:
        raise ZooError("device: meta holds no weights: write pretrained: false with it")
    visual = tower(ARCHITECTURE, weights, None, device)
    return OpenClipEncoder(
        visual,
        "open_clip_vit_bigg_14",
        processor_of(visual),
        layer=layer,
        keep_cls=keep_cls,
        final_norm=final_norm,
        portable={"pretrained": False, "device": "meta"},
    )
