"""A vision transformer for pictures, in the base size of the papers on modality balance and in a tiny one."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from zoo.config import Positive
from zoo.registry import make, register


class Size(NamedTuple):
    """Of a transformer."""

    arch: str  # timm's name
    image_size: int


SIZES = {"base": Size("vit_base_patch16_224", 256), "tiny": Size("test_vit", 32)}


@register(
    "encoder",
    "image_transformer",
    paper="Dosovitskiy et al., An image is worth 16x16 words, 2020, https://arxiv.org/abs/2010.11929",
)
def make_image_transformer(*, arch: Literal["base", "tiny"] = "base", image_size: Positive | None = None) -> Any:
    """A ViT of timm, drawn and not pretrained; ``pooled`` is the mean of all tokens, the class token among them, after the last norm.

    ``image_transformer:base`` is ViT-B/16 at 256 pixels, 768 wide, 12 blocks: as large as the picture's side of M3AE (Geng et al., 2022,
    https://arxiv.org/abs/2205.14204) that MLA (Zhang et al., 2024, https://arxiv.org/abs/2311.10707) trains on pictures and texts, without
    its weights. For timm's write ``timm:vit_base_patch16_224``, ``pretrained: true``, ``image_size: 256``, ``final_norm: true`` and
    ``pool: mean``.

    Args:
        arch: A size by name.
        image_size: Side of the input, to which pictures are resized; None: that of ``arch``, 256 or 32.
    """
    size = SIZES[arch]
    return make("encoder", f"timm:{size.arch}", image_size=image_size or size.image_size, final_norm=True, pool="mean")
