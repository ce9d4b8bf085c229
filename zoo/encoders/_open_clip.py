"""The vision towers of open_clip, for the encoders that are one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from zoo.encoders._image import ImageProcessor
from zoo.encoders._read import depth_of, fetching, read
from zoo.errors import ZooError, unknown
from zoo.types import ModalityInputs, Remote, Tokens


class OpenClipEncoder(nn.Module):
    """A vision transformer of open_clip read at one layer; the layers after it and the projection are cut off.

    Args:
        visual: The tower.
        name: For messages.
        processor: Of its pixels.
        layer: The block that is read.
        keep_cls: Keep the class token.
        final_norm: Apply the last norm to what is read.
        portable: What `portable` gives.
    """

    by_block = True  # activations can be recomputed so

    def __init__(
        self,
        visual: open_clip.transformer.VisionTransformer,
        name: str,
        processor: ImageProcessor,
        *,
        layer: int,
        keep_cls: bool,
        final_norm: bool,
        portable: dict[str, Any],
    ) -> None:
        super().__init__()
        last = depth_of(layer, len(visual.transformer.resblocks), name) - 1
        visual.prune_intermediate_layers([last], prune_norm=not final_norm, prune_head=True)
        visual.attn_pool = None  # CoCa's; it comes after what we read
        self.model, self._layer, self._keep_cls, self._norm = visual, last, keep_cls, final_norm
        self.dim: int = visual.conv1.out_channels
        self.processor, self._portable = processor, portable

    def forward(self, x: ModalityInputs) -> Tokens:
        """Pixels (B, 3, H, W) to Tokens."""
        found = self.model.forward_intermediates(
            x.values.to(self.model.conv1.weight.dtype),
            indices=[self._layer],
            stop_early=True,
            normalize_intermediates=self._norm,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        (patches,), (prefix,) = found["image_intermediates"], found["image_intermediates_prefix"]
        return read(prefix, patches, has_cls=True, keep_cls=self._keep_cls)

    def checkpoint_gradients(self) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        self.model.set_grad_checkpointing()

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network, for weights that come from elsewhere."""
        return dict(self._portable)


def tower(name: str, weights: str | None, image_size: int | None, device: str = "cpu") -> open_clip.transformer.VisionTransformer:
    """The vision tower of an open_clip model; the text tower is dropped.

    Args:
        name: A name of ``open_clip.list_models()``.
        weights: Their tag or file; None: random.
        image_size: Side of the input; None: the model's own.
        device: ``"meta"`` allocates nothing.

    Raises:
        ZooError: If there is no such model or weights, they cannot be had, or the tower is no vision transformer of open_clip's own.
    """
    if name not in open_clip.list_models():
        raise ZooError(unknown("open_clip model", name, open_clip.list_models()))
    with fetching(f"weights {weights!r} of open_clip:{name}"), torch.device(device):
        clip = open_clip.create_model(name, pretrained=weights, force_image_size=image_size, device=device)
    if not isinstance(clip.visual, open_clip.transformer.VisionTransformer):
        raise ZooError(f"the vision tower of open_clip:{name} is a {type(clip.visual).__name__}: take it from timm, as timm:<arch>")
    return clip.visual


def remotes(name: str, weights: str | None) -> list[Remote]:
    """Where open_clip finds the weights of a tag; nothing for a file and for random ones.

    Raises:
        ZooError: If there is neither such a tag nor such a file.
    """
    if weights is None or Path(weights).is_file():
        return []
    if not (cfg := open_clip.get_pretrained_cfg(name, weights)):
        raise ZooError(unknown(f"weights of open_clip:{name}", weights, open_clip.list_pretrained_tags_by_model(name)))
    repository, _, file = cfg["hf_hub"].rpartition("/")
    default = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return [Remote("weights", repository, (f"{Path(file).stem}.safetensors", file) if file else default)]


def processor_of(visual: open_clip.transformer.VisionTransformer) -> ImageProcessor:
    """The preprocessing that came with the weights.

    Raises:
        ZooError: If it pads images.
    """
    cfg: dict[str, Any] = visual.preprocess_cfg
    size = cfg["size"][0] if isinstance(cfg["size"], tuple | list) else cfg["size"]
    if cfg["resize_mode"] == "longest":
        raise ZooError("this model pads its images to a square, which the zoo's image processor does not do")
    return ImageProcessor(size, mean=cfg["mean"], std=cfg["std"], squash=cfg["resize_mode"] == "squash", interpolation=cfg["interpolation"])
