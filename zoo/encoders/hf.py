"""Vision and text encoders from the hub or a folder, through transformers: ``hf:facebook/dinov2-small``, ``hf:./my_bert``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from zoo.encoders._hf_text import HfTextProcessor
from zoo.encoders._hf_vision import FAMILIES, WHOLE, HfVisionEncoder, family_processor, vision_config, vision_model
from zoo.encoders._image import ImageProcessor
from zoo.encoders._read import WEIGHTS, depth_of, fetching
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import ModalityInputs, Remote, Tokens

TEXT = ("albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "ernie", "modernbert", "mpnet", "roberta", "xlm-roberta")
BILINEAR = 2  # PIL's number, as preprocessor_config.json has it


class HfTextEncoder(nn.Module):
    """A BERT-like text encoder; ``pooled`` is the mean over the real tokens.

    Args:
        model: With as many layers as are run.
        processor: Of its texts.
        keep_cls: Keep the first token, the class token.
        portable: What `portable` gives.
    """

    def __init__(self, model: PreTrainedModel, processor: HfTextProcessor, *, keep_cls: bool, portable: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self._keep_cls, self._portable = keep_cls, portable
        self.dim: int = model.config.hidden_size

    def forward(self, x: ModalityInputs) -> Tokens:
        """Ids (B, N) and their mask to Tokens."""
        mask = x.mask if x.mask is not None else torch.ones_like(x.values, dtype=torch.bool)
        hidden = self.model(input_ids=x.values, attention_mask=mask.long()).last_hidden_state  # (B, N, D)
        weight = mask[..., None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        first = 0 if self._keep_cls else 1
        return Tokens(hidden[:, first:], mask[:, first:], pooled, torch.ones_like(mask[:, 0]))

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network, for weights that come from elsewhere."""
        return dict(self._portable)


def _remote(settings: Mapping[str, Any]) -> list[Remote]:
    """Whether pixels or words are prepared, only the configuration tells: the one file or the other is enough."""
    arch, words = settings["arch"], settings["tokenizer"]
    found = [Remote("weights", arch, WEIGHTS)] if settings["pretrained"] else []
    if settings["config"] is None:
        found.append(Remote("config", arch, ("config.json",)))
    if isinstance(words, str):
        return [*found, Remote("tokenizer", words, ("tokenizer.json",))]
    prepared = words is not None or settings["processor"] is not None or settings["config"] is not None
    return found if prepared else [*found, Remote("processor", arch, ("preprocessor_config.json", "tokenizer.json"))]


@register(
    "encoder",
    "hf",
    paper="Wolf et al., Transformers, 2020, https://arxiv.org/abs/1910.03771",
    licence="of the weights that are loaded: see their card",
    remote=_remote,
)
def make_hf(
    *,
    arch: str,
    pretrained: bool = True,
    layer: int = -1,
    keep_cls: bool = True,
    final_norm: bool = False,
    config: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
    tokenizer: str | dict[str, str] | None = None,
) -> HfVisionEncoder | HfTextEncoder:
    """A vision or text encoder of the hub; which of the two its configuration says.

    Args:
        arch: Repository or folder. With ``HF_HUB_OFFLINE=1`` only what was fetched before is found.
        pretrained: Load its weights; False: random ones.
        layer: The layer that is read, from 0, or from the end: -1 the last.
        keep_cls: Keep the class token among the tokens.
        final_norm: Of a vision encoder: apply the last norm to what is read.
        config: The configuration, instead of the one at ``arch``; with ``pretrained: false`` nothing is fetched.
        processor: Of a vision encoder: the arguments of its image processor, instead of the ones at ``arch``.
        tokenizer: Of a text encoder: repository or folder of its tokenizer, if it is not ``arch``. A mapping is one that was
            saved along with weights.

    Raises:
        ZooError: If nothing is found, or the model is neither a vision nor a text encoder that the zoo knows.
    """
    found = _config(arch, config)
    kind = found.model_type
    weights = arch if pretrained else None
    if kind in FAMILIES or kind in WHOLE:
        if tokenizer is not None:
            raise ZooError(f"hf:{arch} is a vision encoder ({kind}): it takes no tokenizer")
        found = vision_config(found)
        pixels = ImageProcessor(**processor) if processor else _processor(arch, found) if config is None else family_processor(found)
        kept = {"pretrained": False, "config": found.to_dict(), "processor": pixels.config()}
        model = vision_model(found, weights, layer, f"hf:{arch}")
        return HfVisionEncoder(model, pixels, keep_cls=keep_cls, final_norm=final_norm, portable=kept)
    if kind not in TEXT:
        raise ZooError(f"hf:{arch} is a {kind!r}: known are, of vision, {', '.join([*FAMILIES, *WHOLE])}; of text, {', '.join(TEXT)}")
    if processor is not None or final_norm:
        raise ZooError(f"hf:{arch} is a text encoder ({kind}): it takes no processor and no final_norm")
    longest = _longest(found)
    words = (
        HfTextProcessor(tokenizer["serialized"], longest)
        if isinstance(tokenizer, dict)
        else HfTextProcessor.fetched(tokenizer or arch, longest)
    )
    kept = {"pretrained": False, "config": found.to_dict(), "tokenizer": {"serialized": words.serialized()}}
    return HfTextEncoder(_text_model(arch, found, weights, layer), words, keep_cls=keep_cls, portable=kept)


def _config(arch: str, given: dict[str, Any] | None) -> PreTrainedConfig:
    if given is None:
        with fetching(f"hf:{arch}"):
            return AutoConfig.from_pretrained(arch)
    rest = dict(given)
    if "model_type" not in rest:
        raise ZooError(f"hf:{arch}: config has no 'model_type': write one, such as {', '.join(FAMILIES)} or bert")
    with fetching(f"the configuration of hf:{arch}"):
        return AutoConfig.for_model(rest.pop("model_type"), **rest)


def _text_model(arch: str, config: PreTrainedConfig, weights: str | None, layer: int) -> PreTrainedModel:
    config.num_hidden_layers = depth_of(layer, config.num_hidden_layers, f"hf:{arch}")
    if weights is not None:
        with fetching(f"weights of hf:{arch}"):
            model = AutoModel.from_pretrained(weights, config=config, dtype=torch.float32)
    else:
        model = AutoModel.from_config(config)
    if "pooler" in dict(model.named_children()):
        model.pooler = None  # it would be trained by nothing
    return model


def _longest(config: PreTrainedConfig) -> int:
    """RoBERTa counts its positions from the padding id on, and so has fewer of them than it says."""
    spare = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    return int(config.max_position_embeddings) - spare


def _processor(arch: str, config: PreTrainedConfig) -> ImageProcessor:
    file: Any
    with fetching(f"preprocessor_config.json of hf:{arch} (or write processor: {{size: ..., mean: ..., std: ...}})"):
        file = cached_file(arch, "preprocessor_config.json")
    said: dict[str, Any] = json.loads(Path(file).read_text())
    size, crop = said.get("size", config.image_size), said.get("crop_size")
    if isinstance(crop, dict):
        crop = crop["height"]
    shorter = size.get("shortest_edge") if isinstance(size, dict) else size
    squash = not said.get("do_center_crop", False)
    side: Any = (size["height"] if isinstance(size, dict) and "height" in size else shorter) if squash else crop
    return ImageProcessor(
        side,
        mean=tuple(said["image_mean"]),
        std=tuple(said["image_std"]),
        shorter=None if squash else shorter,
        squash=squash,
        interpolation="bilinear" if said.get("resample") == BILINEAR else "bicubic",
    )
