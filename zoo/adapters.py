"""The recipe's section of low-rank adapters, apart from `zoo.lora`: a recipe is read without the seconds that peft takes to import."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from safetensors import safe_open

from zoo.config import Fault, Positive

FOLDER, WEIGHTS = "adapters", "adapter_model.safetensors"  # the latter is peft's name


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Low-rank adapters in one module, whose own weights are frozen by it.

    Attributes:
        on: The module, by name as in ``freeze``: ``backbone``, ``vision.model.blocks.3``. What ``freeze`` names inside it gets none.
        kind: ``lora``: Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685. ``dora``: Liu et al., DoRA, 2024,
            https://arxiv.org/abs/2402.09353; not for nn.MultiheadAttention.
        rank: Of the update B A.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: On the input of the adapters; not for nn.MultiheadAttention, whose weights are adapted and not its input.
        targets: The last names of the layers that get one: ``[q_proj, v_proj]``; None: every linear layer and nn.MultiheadAttention.
    """

    on: str
    kind: Literal["lora", "dora"] = "lora"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


def overlaps(adapters: Any) -> list[Fault]:
    """Modules that two entries adapt; an entry that is wrong in itself is passed over."""
    faults = []
    known = [(i, a) for i, a in enumerate(adapters if isinstance(adapters, tuple) else ()) if isinstance(a, Adapter)]
    for (_, one), (i, other) in combinations(known, 2):
        if f"{one.on}.".startswith(f"{other.on}.") or f"{other.on}.".startswith(f"{one.on}."):
            says = f"{other.on!r} and {one.on!r} overlap: a module has one kind of adapter; write one entry, or names apart"
            faults.append(Fault(("adapters", i, "on"), says))
    return faults


def count(folder: Path) -> int:
    """The number of weights in the adapters that a training run left in ``folder``."""
    found = 0
    for file in sorted((folder / FOLDER).glob(f"*/{WEIGHTS}")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it cannot be iterated itself
                found += prod(tensors.get_slice(name).get_shape())
    return found
