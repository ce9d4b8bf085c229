"""What a language model of the hub is read from, said once for the makers that read it and for who wants to know beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.backbones._tokenizers import FILE
from zoo.types import Remote


def source_of(pretrained: bool | str, repository: str | None) -> str | None:
    """The repository or folder of the weights that ``pretrained`` asks for; None for random ones."""
    return pretrained if isinstance(pretrained, str) else repository if pretrained else None


def remotes(
    source: str | None,
    tokenizer: str | Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    weights: tuple[str, ...] = ("model*.safetensors", "pytorch_model*.bin"),
) -> list[Remote]:
    """Weights and configuration at ``source``, and the tokenizer: the one that was asked for, else that of the weights.

    Args:
        source: Repository or folder of the weights; None: random.
        tokenizer: A name as the user wrote it, a saved one, or None.
        config: The geometry, where it is given and not read.
        weights: Patterns of their files.
    """
    words = source if tokenizer is None else tokenizer if isinstance(tokenizer, str) and tokenizer != "bytes" else None
    found = [] if source is None else [Remote("weights", source, weights)]
    if source is not None and config is None:
        found.append(Remote("config", source, ("config.json",)))
    return found if words is None else [*found, Remote("tokenizer", words, ("tokenizer.json", FILE))]
