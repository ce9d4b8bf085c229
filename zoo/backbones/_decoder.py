"""The decoder language models of transformers, for the backbones that are one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from zoo.backbones._tokenizers import PortableTokenizer
from zoo.errors import ZooError

MOST_RANDOM = 4 * 2**30  # bytes: larger random weights on a CPU are a mistake, most likely a forgotten ``pretrained``
WORTH_SAYING = 1_000_000_000
Device = Literal["cpu", "meta"]
Precision = Literal["float32", "bfloat16"]
Loader = Callable[[PreTrainedModel], None]  # fills the parameters of an empty model
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
log = logging.getLogger("zoo")


class Decoder(nn.Module):
    """A causal language model without its head, read at the hidden state after the final norm.

    Args:
        model: A LlamaModel or one built alike.
        tokenizer: Its ids must fall into the embedding; `build` sees to it.
        trained: Weights were loaded.
        portable: What `portable` gives.
    """

    def __init__(self, model: Any, tokenizer: PortableTokenizer, *, trained: bool, portable: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.tokenizer, self.trained = model, tokenizer, trained
        self.dim: int = model.config.hidden_size
        self._portable = portable

    def embed(self, ids: Tensor) -> Tensor:
        """(B, N) ids to (B, N, D)."""
        return self.model.embed_tokens(ids)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Embeddings (B, S, D), real positions (B, S) bool and their numbers (B, S) to hidden states (B, S, D).

        What it gives at padding means nothing.
        """
        out = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return out.last_hidden_state

    @contextmanager
    def watch_attention(self) -> Iterator[list[Tensor]]:
        """Inside, a forward pass appends the attention of each layer, first to last: (B, heads, S, S) after the softmax, in the graph."""
        seen: list[Tensor] = []
        implementation = self.model.config._attn_implementation  # there is a public way to set it, and none to ask
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        hooks = [layer.self_attn.register_forward_hook(lambda _module, _given, gave: seen.append(gave[1])) for layer in self.model.layers]
        self.model.set_attn_implementation("eager")  # the others do not hand their weights out
        try:
            for parameter in frozen:  # else the attention of a frozen model has no gradient
                parameter.requires_grad_(True)
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in frozen:
                parameter.requires_grad_(False)
            self.model.set_attn_implementation(implementation)

    def predict(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to the logits (..., V) of the next id, by the input embedding, since there is no head.

        Tied as in Press and Wolf, Using the output embedding to improve language models, 2017, https://arxiv.org/abs/1608.05859.
        """
        return nn.functional.linear(hidden, self.model.embed_tokens.weight)

    def checkpoint_gradients(self) -> None:
        """Keep only the input of each layer for the backward pass and compute the rest again: less memory, a third more time."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network, for weights that come from elsewhere."""
        return dict(self._portable)


def configuration(
    name: str, kind: type[PreTrainedConfig], given: Mapping[str, Any] | None, source: str | None, geometry: Mapping[str, Any]
) -> PreTrainedConfig:
    """The geometry of a decoder: the one that was given, else that of its weights, else that of its size.

    Args:
        name: For messages.
        kind: Of configuration.
        given: Settings of ``kind``, or None.
        source: Repository or folder of the weights, or None.
        geometry: Settings of ``kind`` for the size.

    Raises:
        ZooError: If ``source`` cannot be had, or is another kind of model.
    """
    if given is not None:
        return kind.from_dict(dict(given))
    if source is None:
        return kind(**geometry)
    try:
        found, _ = kind.get_config_dict(source)
    except (OSError, ValueError) as e:
        raise ZooError(not_found(f"configuration of {name}", source, e)) from e
    if found.get("model_type") != kind.model_type:
        seen = f"is a {found['model_type']!r}" if "model_type" in found else "has no config.json with a model_type"
        raise ZooError(f"{name}: {source} {seen}, wanted is a {kind.model_type!r}: name another repository or folder")
    return kind.from_dict(found)


def build(
    name: str,
    family: Any,
    config: PreTrainedConfig,
    tokenizer: PortableTokenizer,
    *,
    source: str | None,
    dtype: Precision,
    device: Device,
    load: Loader | None = None,
) -> Decoder:
    """A decoder with random weights, or with those of ``source``.

    Args:
        name: For messages.
        family: The model's class.
        config: Its geometry.
        tokenizer: If it has more ids than the embedding has rows, rows are added: the mean of those that are there, as in NoteLLM-2.
        source: Repository or folder of the weights; None: random.
        dtype: Of the weights.
        device: ``"meta"`` allocates nothing.
        load: Fills the model from ``source`` when its files are not transformers' own.

    Raises:
        ZooError: If random weights are larger than `MOST_RANDOM`, or weights cannot be had.
    """
    precision = _PRECISIONS[dtype]
    with torch.device("meta"):
        model = family(config).to(precision)
    large = _state_memory(name, model, source is not None, device)
    if source is None or load is not None:
        _allocate(model, device)
        if load is not None and source is not None:
            load(model)
        elif device == "cpu":
            _randomise(model)
    else:
        model = _pretrained(name, family, config, source, precision)
    if tokenizer.vocab_size > config.vocab_size:
        _widen(model, tokenizer.vocab_size)
    kept = {"pretrained": False, "config": model.config.to_dict(), "tokenizer": tokenizer.portable(), "dtype": dtype}
    return Decoder(model, tokenizer, trained=source is not None, portable={**kept, "device": "meta"} if large else kept)


def _state_memory(name: str, model: nn.Module, loaded: bool, device: Device) -> bool:
    """Say how much memory the weights take, before they take it, and refuse what cannot be meant; True if only loading may take it."""
    if loaded and device == "meta":
        raise ZooError(f"{name}: device: meta holds no weights: write pretrained: false with it")
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    said = f"{name}: {parameters / 1e9:.2f} G parameters, {size / 1e9:.1f} GB of memory"
    if size > MOST_RANDOM and not loaded and device == "cpu":
        raise ZooError(f"{said}, all random: write pretrained: true (or a repository or folder), a smaller size, or device: meta")
    if size > WORTH_SAYING and device == "cpu":
        log.warning(said)
    return size > MOST_RANDOM


def _allocate(model: Any, device: Device) -> None:
    if device == "cpu":
        model.to_empty(device="cpu")
    model.rotary_emb = type(model.rotary_emb)(config=model.config)  # its frequencies are no weights: nothing would fill them


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Every matrix N(0, initializer_range²), norms 1, biases 0, in one pass over memory that nothing has touched yet."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=model.config.initializer_range)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _pretrained(name: str, family: Any, config: PreTrainedConfig, source: str, precision: torch.dtype) -> Any:
    try:
        model, said = family.from_pretrained(source, config=config, dtype=precision, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as e:  # what transformers raises for files that are missing or do not fit
        raise ZooError(not_found(f"weights of {name}", source, e)) from e
    if said["missing_keys"]:  # transformers would leave them random
        raise ZooError(f"{name}: {source} lacks {len(said['missing_keys'])} weights, such as {min(said['missing_keys'])}")
    return model


def not_found(what: str, source: str, error: Exception) -> str:
    """One sentence for weights that cannot be had."""
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{what}: {source} could not be loaded ({reason}): check the name, fetch it once with a network,"
        " name a local folder that has it, or write pretrained: false for random weights"
    )


@torch.no_grad()
def _widen(model: Any, rows: int) -> None:
    old = model.embed_tokens.weight
    new = nn.Embedding(rows, old.shape[1], device=old.device, dtype=old.dtype)
    if old.device.type != "meta":
        new.weight[: len(old)] = old
        new.weight[len(old) :] = old.mean(0)
    model.embed_tokens = new
    model.config.vocab_size = rows
