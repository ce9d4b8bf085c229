"""The small vision encoder of NoteLLM-2's Base models: OpenAI's CLIP ViT-B/16, 768 wide, 197 tokens, QuickGELU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig

from zoo.encoders._hf_vision import HfVisionEncoder, family_processor, vision_model
from zoo.encoders._read import WEIGHTS as FILES
from zoo.registry import register
from zoo.types import Remote

WEIGHTS = "openai/clip-vit-base-patch16"


def _source(pretrained: bool | str) -> str | None:
    return pretrained if isinstance(pretrained, str) else WEIGHTS if pretrained else None


def _remote(settings: Mapping[str, Any]) -> list[Remote]:
    source = _source(settings["pretrained"])
    return [] if source is None else [Remote("weights", source, FILES)]


@register(
    "encoder",
    "clip_vit_b16",
    paper="Radford et al., Learning transferable visual models from natural language supervision, 2021, https://arxiv.org/abs/2103.00020",
    licence="MIT",
    remote=_remote,
)
def make_clip_vit_b16(
    *, pretrained: bool | str = False, layer: int = -1, keep_cls: bool = True, final_norm: bool = False
) -> HfVisionEncoder:
    """CLIP ViT-B/16 as NoteLLM-2 reads it: the last layer before the post-norm, class token kept.

    Args:
        pretrained: Load OpenAI's weights; or the repository or folder to load them from.
        layer: The block that is read, from 0, or from the end: -1 the last of 12.
        keep_cls: Keep the class token among the tokens; it is ``pooled`` either way.
        final_norm: Apply CLIP's post-norm to every token that is read.

    Raises:
        ZooError: If there is no such layer, or the weights cannot be had.
    """
    config = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        hidden_act="quick_gelu",
    )
    model = vision_model(config, _source(pretrained), layer, "clip_vit_b16")
    return HfVisionEncoder(model, family_processor(config), keep_cls=keep_cls, final_norm=final_norm, portable={"pretrained": False})
