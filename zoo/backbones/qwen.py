"""Qwen as a backbone, from a toy of its shape to the model of NoteLLM-2's MQwen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from transformers import Qwen2Config, Qwen2Model

from zoo.backbones import _qwen1
from zoo.backbones._decoder import Decoder, Device, Precision, build, configuration
from zoo.backbones._remote import remotes, source_of
from zoo.backbones._tokenizers import choose
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Remote

Size = Literal["tiny", "0.5b", "1.5b", "7b", "qwen1_7b_chat"]

_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_GEOMETRY: dict[str, tuple[int, ...]] = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "qwen1_7b_chat": (4096, 11008, 32, 32, 32, 151936),
}
_REPOSITORY = {
    "0.5b": "Qwen/Qwen2.5-0.5B",
    "1.5b": "Qwen/Qwen2.5-1.5B",
    "7b": "Qwen/Qwen2.5-7B",
    "qwen1_7b_chat": "Qwen/Qwen-7B-Chat",
}


def _remote(settings: Mapping[str, Any]) -> list[Remote]:
    source, words = source_of(settings["pretrained"], _REPOSITORY.get(settings["size"])), settings["tokenizer"]
    if settings["size"] != "qwen1_7b_chat":
        return remotes(source, words, settings["config"])
    weights = remotes(source, "bytes", {}, ("*.safetensors",))  # its geometry is that of its size
    return weights + remotes(None, words if words is not None or source is None else _qwen1.TOKENIZER, None)


@register(
    "backbone",
    "qwen",
    paper="Qwen Team, Qwen2.5 technical report, 2024, https://arxiv.org/abs/2412.15115",
    licence="of the weights: Apache-2.0 (0.5b, 1.5b, 7b), Tongyi Qianwen License Agreement (qwen1_7b_chat); of others: see their card",
    remote=_remote,
)
def make_qwen(
    *,
    size: Size = "0.5b",
    pretrained: bool | str = False,
    tokenizer: str | dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    dtype: Precision = "float32",
    device: Device = "cpu",
) -> Decoder:
    """A Qwen without its head.

    Args:
        size: ``qwen1_7b_chat`` is the original Qwen-7B-Chat (Bai et al., 2023, https://arxiv.org/abs/2309.16609).
        pretrained: Load the published weights of this size; or the repository or folder to load them from. The default builds
            random weights and needs no network.
        tokenizer: ``bytes``, or a repository or folder; None: that of the weights, and bytes for random ones. A mapping is
            one that was saved along with weights.
        config: Settings of transformers' Qwen2Config, instead of those of ``size``.
        dtype: Of the weights.
        device: ``meta`` allocates nothing.

    Raises:
        ZooError: If ``tiny`` is wanted pretrained, weights or tokenizer cannot be had, or random ones would take over 4 GiB.
    """
    name = f"qwen {size}"
    source = source_of(pretrained, _REPOSITORY.get(size))
    if pretrained and source is None:
        raise ZooError(f"{name} has no published weights: write another size ({', '.join(_REPOSITORY)}), or a folder")
    theta = 10_000.0 if size == "qwen1_7b_chat" else 1_000_000.0
    geometry = {**dict(zip(_KEYS, _GEOMETRY[size], strict=True)), "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    if size == "qwen1_7b_chat":  # neither its configuration nor its weights nor its tokenizer are in transformers' words
        found = configuration(name, Qwen2Config, config, None, geometry)
        words = choose(name, tokenizer, _qwen1.TOKENIZER if source else None, _qwen1.ROLES, quiet=device == "meta")
        load = partial(_qwen1.fill, source=source) if source else None
        return build(name, Qwen2Model, found, words, source=source, dtype=dtype, device=device, load=load)
    found = configuration(name, Qwen2Config, config, source, geometry)
    words = choose(name, tokenizer, source, quiet=device == "meta")
    return build(name, Qwen2Model, found, words, source=source, dtype=dtype, device=device)
