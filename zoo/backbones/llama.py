"""Llama as a backbone: what NoteLLM-2's code puts in the place of its in-house Tomato."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import LlamaConfig, LlamaModel

from zoo.backbones._decoder import Decoder, Device, Precision, build, configuration
from zoo.backbones._remote import remotes, source_of
from zoo.backbones._tokenizers import choose
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Remote

Size = Literal["tiny", "1.1b", "7b"]

_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_GEOMETRY: dict[str, tuple[int, ...]] = {
    "tiny": (64, 128, 2, 4, 4, 512),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}
_REPOSITORY = {"1.1b": "TinyLlama/TinyLlama_v1.1", "7b": "meta-llama/Llama-2-7b-hf"}


def _remote(settings: Mapping[str, Any]) -> list[Remote]:
    return remotes(source_of(settings["pretrained"], _REPOSITORY.get(settings["size"])), settings["tokenizer"], settings["config"])


@register(
    "backbone",
    "llama",
    paper="Touvron et al., Llama 2, 2023, https://arxiv.org/abs/2307.09288",
    licence="of the weights: Apache-2.0 (1.1b), Llama 2 Community License (7b); of others: see their card",
    remote=_remote,
)
def make_llama(
    *,
    size: Size = "1.1b",
    pretrained: bool | str = False,
    tokenizer: str | dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    dtype: Precision = "float32",
    device: Device = "cpu",
) -> Decoder:
    """A Llama without its head.

    Args:
        size: ``7b`` is Llama-2-7B; ``1.1b`` is TinyLlama (Zhang et al., 2024, https://arxiv.org/abs/2401.02385).
        pretrained: Load the published weights of this size; or the repository or folder to load them from. The default builds
            random weights and needs no network.
        tokenizer: ``bytes``, or a repository or folder; None: that of the weights, and bytes for random ones. A mapping is
            one that was saved along with weights.
        config: Settings of transformers' LlamaConfig, instead of those of ``size``.
        dtype: Of the weights.
        device: ``meta`` allocates nothing.

    Raises:
        ZooError: If ``tiny`` is wanted pretrained, weights or tokenizer cannot be had, or random ones would take over 4 GiB.
    """
    name = f"llama {size}"
    source = source_of(pretrained, _REPOSITORY.get(size))
    if pretrained and source is None:
        raise ZooError(f"{name} has no published weights: write another size ({', '.join(_REPOSITORY)}), or a folder")
    geometry = {
        **dict(zip(_KEYS, _GEOMETRY[size], strict=True)),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096 if size == "7b" else 2048,
    }
    found = configuration(name, LlamaConfig, config, source, geometry)
    words = choose(name, tokenizer, source, quiet=device == "meta")
    return build(name, LlamaModel, found, words, source=source, dtype=dtype, device=device)
