"""Every image model of timm as an encoder: ``timm:vit_base_patch16_224``, with a tag for its weights after a dot."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import timm
from torch import nn

from zoo.encoders._image import CLIP_MEAN, CLIP_STD, ImageProcessor
from zoo.encoders._read import Pool, depth_of, fetching, read
from zoo.errors import ZooError, unknown
from zoo.registry import register
from zoo.types import ModalityInputs, Remote, Tokens


class TimmEncoder(nn.Module):
    """A timm model read at one layer; the layers after it and the head are cut off.

    Args:
        model: Made with ``num_classes=0``.
        name: For messages.
        processor: Of its pixels.
        layer: Which block of a transformer, or stage of a convolutional net, is read.
        keep_cls: Keep class and register tokens.
        final_norm: Apply the model's last norm to what is read.
        pool: What ``pooled`` is.
        portable: What `portable` gives.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        processor: ImageProcessor,
        *,
        layer: int,
        keep_cls: bool,
        final_norm: bool,
        pool: Pool,
        portable: dict[str, Any],
    ) -> None:
        super().__init__()
        takes = signature(model.forward_intermediates).parameters
        self._is_vit = "return_prefix_tokens" in takes
        self._layer = depth_of(layer, len(model.feature_info), name) - 1
        self._norm, self._keep_cls, self._pool, self._portable = final_norm, keep_cls, pool, portable
        self._has_cls = self._is_vit and model.cls_token is not None
        model.prune_intermediate_layers([self._layer], prune_norm=not final_norm, prune_head=True)
        self.model, self.processor = model, processor
        self.dim: int = _width(model, self._layer)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Pixels (B, 3, H, W) to Tokens."""
        how = {"indices": [self._layer], "norm": self._norm, "stop_early": True, "intermediates_only": True}
        pixels = x.values.to(next(self.model.parameters()).dtype)
        if not self._is_vit:
            (grid,) = self.model.forward_intermediates(pixels, output_fmt="NCHW", **how)  # (B, D, H', W')
            return read(None, grid.flatten(2).transpose(1, 2), has_cls=False, keep_cls=False, pool=self._pool)
        (found,) = self.model.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True, **how)
        patches, prefix = found if isinstance(found, tuple) else (found, None)
        return read(prefix, patches, has_cls=self._has_cls, keep_cls=self._keep_cls, pool=self._pool)

    @property
    def by_block(self) -> bool:
        """Whether the activations of one block at a time can be recomputed."""
        return self._is_vit and "grad_checkpointing" in vars(self.model)

    def checkpoint_gradients(self) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them, where that can be."""
        if self.by_block:
            self.model.set_grad_checkpointing()

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network, for weights that come from elsewhere."""
        return dict(self._portable)


def _width(model: Any, layer: int) -> int:
    return int(model.feature_info[layer]["num_chs"])


def _check_name(arch: str) -> None:
    if not timm.is_model(arch):
        raise ZooError(unknown("timm model", arch, timm.list_models(f"*{arch.partition('.')[0].partition('_')[0]}*")))


def _remote(settings: Mapping[str, Any]) -> list[Remote]:
    _check_name(settings["arch"])
    if settings["pretrained"] is not True:
        return []
    cfg: Any = timm.get_pretrained_cfg(settings["arch"])
    file = cfg.hf_hub_filename or "pytorch_model.bin"
    safe = "model.safetensors" if file == "pytorch_model.bin" else f"{Path(file).stem}.safetensors"
    return [Remote("weights", (cfg.hf_hub_id or cfg.url or "").rstrip("/"), (safe, file))]


@register(
    "encoder",
    "timm",
    paper="Wightman, PyTorch Image Models, 2019, https://github.com/huggingface/pytorch-image-models",
    licence="of the weights that are loaded: see their card",
    remote=_remote,
)
def make_timm(
    *,
    arch: str,
    pretrained: bool | str = False,
    layer: int = -1,
    keep_cls: bool = True,
    final_norm: bool = False,
    image_size: int | None = None,
    pool: Pool = "cls",
    colours: Literal["own", "clip"] = "own",
    squash: bool | None = None,
) -> TimmEncoder:
    """An image model of timm, read at one layer.

    Args:
        arch: The model, with the tag of its weights after a dot: ``vit_base_patch16_clip_224.openai``.
        pretrained: Load the weights of that tag from the hub; or the file to load them from.
        layer: The block (of a convolutional net: the stage) that is read, from 0, or from the end: -1 the last.
        keep_cls: Keep class and register tokens among the tokens.
        final_norm: Apply the last norm to what is read, if the model has one; the default is what NoteLLM-2 and LLaVA read.
        image_size: Side of the input; None: the model's own.
        pool: ``cls``: ``pooled`` is the class token, kept or not, or where there is none the mean of the patches. ``mean``: the mean of
            all tokens that are kept.
        colours: What pixels are normalised by: ``own``, as the weights of ``arch`` want it, or ``clip``, as ALBEF and BLIP do with any.
        squash: Resize pictures to a square whatever their sides, and crop nothing; None: as the weights of ``arch`` want it.

    Raises:
        ZooError: If timm has no such model or layer, or its weights cannot be had.
    """
    _check_name(arch)
    cfg: Any = timm.get_pretrained_cfg(arch)
    size = image_size or cfg.input_size[-1]
    given: dict[str, Any] = {"num_classes": 0}
    if image_size is not None and cfg.fixed_input_size:
        given["img_size"] = image_size
    if isinstance(pretrained, str):
        if not Path(pretrained).is_file():
            raise ZooError(f"no weights file {pretrained}: name a file, or write {arch}.<tag> and pretrained: true")
        given["pretrained_cfg_overlay"] = {"file": pretrained}
    with fetching(f"weights of timm:{arch}"):
        model = timm.create_model(arch, pretrained=bool(pretrained), **given)
    if "forward_intermediates" not in dir(type(model)):
        raise ZooError(f"timm:{arch} gives no intermediate features: choose another model")
    return TimmEncoder(
        model,
        f"timm:{arch}",
        _processor(cfg, size, colours, squash),
        layer=layer,
        keep_cls=keep_cls,
        final_norm=final_norm,
        pool=pool,
        portable={"pretrained": False} if pretrained else {},
    )


def _processor(cfg: Any, size: int, colours: Literal["own", "clip"], squash: bool | None) -> ImageProcessor:
    """The preprocessing that the weights were evaluated with, but for what the settings say."""
    squash = cfg.crop_mode == "squash" if squash is None else squash
    return ImageProcessor(
        size,
        mean=cfg.mean if colours == "own" else CLIP_MEAN,
        std=cfg.std if colours == "own" else CLIP_STD,
        shorter=None if squash else int(size / cfg.crop_pct),
        squash=squash,
        interpolation="bilinear" if cfg.interpolation == "bilinear" else "bicubic",
    )
