"""The vision transformers of transformers, for the encoders that are one of them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from zoo.encoders._image import CLIP_MEAN, CLIP_STD, HALF, Colour, ImageProcessor
from zoo.encoders._read import depth_of, fetching, read
from zoo.errors import ZooError
from zoo.types import ModalityInputs, Tokens


class Family(NamedTuple):
    """What differs between the vision transformers of transformers."""

    config: type[PreTrainedConfig]
    model: Any  # its class
    norm: str  # attribute of the last norm
    normed: bool  # its last_hidden_state has gone through that norm
    has_cls: bool
    mean: Colour
    std: Colour
    config_off: dict[str, Any]  # settings that leave out what the tokens do not need
    model_off: dict[str, Any]  # arguments of the model that do


IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FAMILIES = {
    "clip_vision_model": Family(CLIPVisionConfig, CLIPVisionModel, "post_layernorm", False, True, CLIP_MEAN, CLIP_STD, {}, {}),
    "siglip_vision_model": Family(
        SiglipVisionConfig, SiglipVisionModel, "post_layernorm", True, False, HALF, HALF, {"vision_use_head": False}, {}
    ),
    "vit": Family(ViTConfig, ViTModel, "layernorm", True, True, HALF, HALF, {}, {"add_pooling_layer": False}),
    "dinov2": Family(Dinov2Config, Dinov2Model, "layernorm", True, True, *IMAGENET, {"use_mask_token": False}, {}),
}
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # a model of two towers -> the vision tower's type


class HfVisionEncoder(nn.Module):
    """A vision transformer of transformers, cut after the layer that is read.

    The cut model's ``last_hidden_state`` is what is read. ``hidden_states[layer]`` of the whole one is the same thing, but
    for some families the library replaces its last entry by the normed state.

    Args:
        model: Made by `vision_model`, with as many layers as are run.
        processor: Of its pixels.
        keep_cls: Keep the class token.
        final_norm: Apply the last norm to what is read.
        portable: What `portable` gives.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ImageProcessor, *, keep_cls: bool, final_norm: bool, portable: dict[str, Any]
    ) -> None:
        super().__init__()
        family = FAMILIES[model.config.model_type]
        norm = model.get_submodule(family.norm)
        # CLIP norms its class token alone, and only for the pooled output that we do not read.
        self.norm = norm if final_norm and not family.normed else nn.Identity()
        if not (final_norm and family.normed):
            model.set_submodule(family.norm, nn.Identity())
        self.model, self.processor = model, processor
        self._keep_cls, self._has_cls, self._portable = keep_cls, family.has_cls, portable
        self.dim: int = model.config.hidden_size

    def forward(self, x: ModalityInputs) -> Tokens:
        """Pixels (B, 3, H, W) to Tokens."""
        hidden = self.norm(self.model(pixel_values=x.values.to(self.model.dtype)).last_hidden_state)
        prefix, patches = (hidden[:, :1], hidden[:, 1:]) if self._has_cls else (None, hidden)
        return read(prefix, patches, has_cls=self._has_cls, keep_cls=self._keep_cls)

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network, for weights that come from elsewhere."""
        return dict(self._portable)


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's configuration out of that of a model of two towers; others as they are."""
    return config.vision_config if config.model_type in WHOLE else config


def vision_model(config: PreTrainedConfig, weights: str | None, layer: int, name: str, device: Literal["cpu", "meta"] = "cpu") -> Any:
    """A vision transformer with as many layers as it takes to read ``layer``.

    Args:
        config: Of one of `FAMILIES`.
        weights: Repository or folder; None: random.
        layer: -1 the last, 0 the first.
        name: For messages.
        device: ``"meta"`` allocates nothing; random weights only.

    Raises:
        ZooError: If there is no such layer, or the weights cannot be had.
    """
    family = FAMILIES[config.model_type]
    depth = depth_of(layer, config.num_hidden_layers, name)
    config = deepcopy(config)
    config.update({"num_hidden_layers": depth, **family.config_off})
    if weights is None:
        with torch.device(device):
            return family.model(config, **family.model_off)
    with fetching(f"weights of {name} from {weights}"):
        model, said = family.model.from_pretrained(
            weights, config=config, dtype=torch.float32, output_loading_info=True, **family.model_off
        )
    if said["missing_keys"]:  # transformers would leave them random
        raise ZooError(f"{name}: {weights} lacks {len(said['missing_keys'])} weights, such as {min(said['missing_keys'])}")
    return model


def family_processor(config: PreTrainedConfig) -> ImageProcessor:
    """The preprocessing that the first weights of a family were trained with."""
    family = FAMILIES[config.model_type]
    size = config.image_size
    if not isinstance(size, int):
        raise ZooError(f"image_size {size!r} of a {config.model_type}: only square images are supported")
    return ImageProcessor(size, mean=family.mean, std=family.std, squash=config.model_type in ("siglip_vision_model", "vit"))
