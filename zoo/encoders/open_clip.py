"""Every vision tower of open_clip as an encoder: ``open_clip:ViT-B-32``, or ``open_clip:ViT-B-32/laion2b_s34b_b79k`` with weights."""

from __future__ import annotations

from zoo.encoders._open_clip import OpenClipEncoder, tower
from zoo.registry import register


@register("encoder", "open_clip", paper="Ilharco et al., OpenCLIP, 2021, https://github.com/mlfoundations/open_clip")
def make_open_clip(
    *,
    arch: str,
    pretrained: bool = True,
    layer: int = -1,
    keep_cls: bool = True,
    final_norm: bool = False,
    image_size: int | None = None,
) -> OpenClipEncoder:
    """The vision tower of an open_clip model, read at one layer.

    Args:
        arch: The model, and after a slash the tag or the file of its weights; without a slash they are random.
        pretrained: False leaves out the weights that ``arch`` names.
        layer: The block that is read, from 0, or from the end: -1 the last.
        keep_cls: Keep the class token among the tokens; it is ``pooled`` either way.
        final_norm: Apply the last norm to what is read.
        image_size: Side of the input; None: the model's own.

    Raises:
        ZooError: If open_clip has no such model, weights or layer, or they cannot be had.
    """
    name, _, tag = arch.partition("/")
    visual = tower(name, tag if pretrained and tag else None, image_size)
    return OpenClipEncoder(visual, f"open_clip:{arch}", layer=layer, keep_cls=keep_cls, final_norm=final_norm)
