"""Low-rank adapters by peft: put into a model, which keeps its names and learns only them, and merged into plain weights again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from zoo.adapters import FOLDER, WEIGHTS, Adapter
from zoo.errors import ZooError, unknown
from zoo.files import write_bytes, write_json
from zoo.freeze import freeze, thaw

_NAME = "default"  # peft's, of the one adapter that a layer has
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Attention(MultiheadAttention):
    """peft's adapter of nn.MultiheadAttention with a forward pass of its own.

    The one of peft 0.21 writes W + BA into the module and subtracts it afterwards, so that the frozen weights drift by rounding, and
    it adds the update of the output projection twice (https://github.com/huggingface/peft/pull/3774).
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As nn.MultiheadAttention's, with W + BA * alpha / rank in the place of the two weights."""
        base: Any = self.get_base_layer()
        weights = {
            "in_proj_weight": (base.in_proj_weight + self.get_delta_weight(_NAME)).to(base.in_proj_weight.dtype),
            "out_proj.base_layer.weight": (base.out_proj.weight + base.out_proj.get_delta_weight(_NAME)).to(base.out_proj.weight.dtype),
        }
        return functional_call(base, weights, (query, *args), kwargs)

    def _restore_weights(self) -> None:
        """Nothing was taken out; peft's makes new parameters, which a reader of ``named_modules`` does not expect."""


def adapt(model: nn.Module, adapters: Sequence[Adapter], frozen: Iterable[str] = ()) -> None:
    """Put the adapters of a recipe into ``model``, freeze the weights beside them, and let its modules train otherwise.

    A new adapter changes nothing: B is 0 (DoRA: and the magnitude is the norm of W). Adapters are in float32 whatever the weights are in.
    Dropout of an adapted module is on in training, as peft has it; its batch norms stay in eval mode.

    Args:
        model: With the names that the adapters' ``on`` says.
        adapters: Without overlaps.
        frozen: The recipe's ``freeze``; what lies inside an adapted module gets no adapter.

    Raises:
        ZooError: If a module or a target does not exist, or cannot be adapted so.
    """
    for i, adapter in enumerate(adapters):
        key = f"adapters.{i}"
        if adapter.on not in dict(model.named_modules()) or not adapter.on:
            depth = adapter.on.count(".") + 1
            near = {".".join(name.split(".")[:depth]) for name, _ in model.named_modules() if name}
            raise ZooError(f"{key}.on: {unknown('module', adapter.on, near)}")
        module = model.get_submodule(adapter.on)
        inside = [name.removeprefix(f"{adapter.on}.") for name in frozen if name.startswith(f"{adapter.on}.")]
        targets = _targets(module, adapter, inside, key)
        thaw(model, adapter.on)
        _inject(module, adapter, targets)
        for name in inside:
            freeze(module.get_submodule(name))


def _targets(module: nn.Module, adapter: Adapter, frozen: Sequence[str], key: str) -> list[str]:
    """The names of the layers of ``module`` that get an adapter."""
    attentions = [name for name, child in module.named_modules() if isinstance(child, nn.MultiheadAttention)]
    layers = {
        name: child
        for name, child in module.named_modules()
        if name and isinstance(child, nn.Linear | nn.MultiheadAttention)
        if not any(name.startswith(f"{attention}.") for attention in attentions)  # its adapter has the output projection along
        if not any(f"{name}.".startswith(f"{prefix}.") for prefix in frozen)
    }
    if not layers:
        raise ZooError(f"{key}.on: {adapter.on!r} has no linear layer inside it to adapt: name a module around some that are not in freeze")
    last = {name.rpartition(".")[2] for name in layers}
    chosen: set[str] = set()
    for target in adapter.targets if adapter.targets is not None else last:
        found = {name for name in layers if f".{name}".endswith(f".{target}")}
        if not found:
            raise ZooError(f"{key}.targets: {unknown(f'layer to adapt in {adapter.on!r}', target, last)}")
        chosen |= found
    _check_attention({name: layers[name] for name in sorted(chosen)}, adapter, key)
    return sorted(chosen)


def _check_attention(chosen: dict[str, nn.Module], adapter: Adapter, key: str) -> None:
    """Refuse what nn.MultiheadAttention, whose weights are adapted and not its inputs, cannot do."""
    plain = sorted({name.rpartition(".")[2] for name, layer in chosen.items() if isinstance(layer, nn.Linear)})
    others = f"targets without it: {', '.join(plain) or 'there are none'}"
    for name, layer in chosen.items():
        if not isinstance(layer, nn.MultiheadAttention):
            continue
        if adapter.kind == "dora":
            raise ZooError(f"{key}.kind: {adapter.on}.{name} is an nn.MultiheadAttention, which has no dora: write lora, or {others}")
        if adapter.dropout:
            raise ZooError(f"{key}.dropout: {adapter.on}.{name} is an nn.MultiheadAttention, which has none: write 0, or {others}")
        if layer.in_proj_weight is None:
            raise ZooError(f"{key}.targets: {adapter.on}.{name} has keys or values of another width than its queries: write {others}")


def _inject(module: nn.Module, adapter: Adapter, targets: Sequence[str]) -> None:
    """Let peft wrap the ``targets`` of ``module``, in place."""
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules="|".join(re.escape(name) for name in targets),  # a list would match ends of names as well
    )
    config._register_custom_module({nn.MultiheadAttention: Attention})
    inject_adapter_in_model(config, module, _NAME)
    for _, layer in _adapted(module):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # bfloat16 would lose the optimizer's small steps
        if adapter.kind == "dora":
            weight = layer.get_base_layer().weight
            layer.lora_magnitude_vector[_NAME].weight = nn.Parameter(torch.linalg.norm(weight.detach().float(), dim=1))
    for child in module.modules():
        if isinstance(child, _NORMS):
            freeze(child)
        if isinstance(child, nn.TransformerEncoderLayer):
            child.register_forward_pre_hook(_no_fast_path)


def _no_fast_path(_module: nn.Module, _given: Any) -> None:
    """Does nothing: a layer with a hook takes no fast path, which would read the weights of its linear layers past their adapters."""


def _adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapters in ``module`` and their names, outer ones first: that of nn.MultiheadAttention holds another one."""
    for name, child in module.named_modules():
        if isinstance(child, LoraLayer):
            yield name, child


@torch.no_grad()
def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of ``model`` with its adapters merged, under the names that it has without them.

    W + BA * alpha / rank, and for DoRA each row of it scaled to its learned length, in float32 and rounded once to the precision of W.

    Args:
        model: Stays as it is.
        state: Its ``state_dict``.
    """
    out = dict(state)
    for name, layer in reversed(list(_adapted(model))):  # inner ones first: the outer's name is part of theirs
        key = f"{name}.base_layer.{'in_proj_weight' if isinstance(layer, Attention) else 'weight'}"
        down, up = (out.pop(f"{name}.lora_{side}.{_NAME}.weight") for side in "AB")
        magnitude = out.pop(f"{name}.lora_magnitude_vector.{_NAME}.weight", None)
        precise = torch.promote_types(out[key].dtype, torch.float32)
        weight = out[key].to(precise) + (up.to(precise) @ down.to(precise)) * layer.scaling[_NAME]
        if magnitude is not None:
            weight *= (magnitude / torch.linalg.norm(weight, dim=1))[:, None]
        out[key] = weight.to(out[key].dtype)
        wrapped = [key for key in out if key.startswith(f"{name}.base_layer.")]
        out |= {f"{name}.{key.removeprefix(f'{name}.base_layer.')}": out.pop(key) for key in wrapped}
    return out


def merge(model: nn.Module) -> None:
    """Merge the adapters of ``model`` into its weights, in place: afterwards it is the model that it was without them, but trained.

    Outputs differ by the rounding of W + BA to the precision of W: about 1e-6 of them in float32, 1e-2 in bfloat16.
    """
    state = merged_state(model, model.state_dict())
    for name, layer in reversed(list(_adapted(model))):
        model.set_submodule(name, layer.get_base_layer())
    for module in model.modules():
        vars(module).pop("peft_config", None)
    model.load_state_dict(state)


def save_adapters(model: nn.Module, state: Mapping[str, Tensor], adapters: Sequence[Adapter], folder: Path) -> None:
    """Write each entry's adapters alone to ``folder/adapters/<on>``, which ``PeftModel.from_pretrained(model.<on>, ...)`` reads.

    Args:
        model: Before its adapters are merged.
        state: Its ``state_dict``.
        adapters: Of the recipe.
        folder: Of the run.
    """
    for adapter in adapters:
        module: Any = model.get_submodule(adapter.on)
        own = {key.removeprefix(f"{adapter.on}."): value for key, value in state.items() if key.startswith(f"{adapter.on}.")}
        own = get_peft_model_state_dict(module, own, adapter_name=_NAME, save_embedding_layers=False)
        tensors = {f"base_model.model.{key}": value.detach().cpu().contiguous() for key, value in own.items()}
        config = module.peft_config[_NAME].to_dict() | {"inference_mode": True}
        write_bytes(folder / FOLDER / adapter.on / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_json(folder / FOLDER / adapter.on / "adapter_config.json", config)
