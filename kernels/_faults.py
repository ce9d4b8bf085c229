"""What a caller of any of the operations can get wrong alike: what is no tensor, lies elsewhere, or cannot be multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def faults_of_types(given: Mapping[str, object], optional: Mapping[str, object]) -> list[str]:
    """Which are no tensors; ``optional`` may be None. Nothing else can be asked of them before this is known."""
    wrong = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    wrong |= {name: value for name, value in optional.items() if not isinstance(value, Tensor | None)}
    return [f"{name} must be a tensor, not {type_named(value)}" for name, value in wrong.items()]


def type_named(value: object) -> str:
    """As an error message names it."""
    return "None" if value is None else type(value).__name__


def named(dtype: torch.dtype) -> str:
    """As an error message names it."""
    return str(dtype).removeprefix("torch.")


def faults_of_floats(given: Mapping[str, Tensor | None]) -> list[str]:
    """Which cannot be multiplied: of a dtype that is none of FLOATS, or not dense."""
    there = {name: value for name, value in given.items() if value is not None}
    choices = f"{', '.join(map(named, FLOATS[:-1]))} or {named(FLOATS[-1])}"
    faults = [f"{name} must be {choices}, not {named(value.dtype)}" for name, value in there.items() if value.dtype not in FLOATS]
    return faults + [
        f"{name} must be dense, not {str(value.layout).removeprefix('torch.')}: write {name}.to_dense()"
        for name, value in there.items()
        if value.layout is not torch.strided
    ]


def faults_of_devices(given: Mapping[str, Tensor | None]) -> list[str]:
    """Which do not lie where the first does: a kernel would read whatever stands at their address."""
    there = {name: value for name, value in given.items() if value is not None}
    (first, of_first), *others = there.items()
    device = of_first.device
    return [f"{name} lies on {value.device}, {first} on {device}: move it" for name, value in others if value.device != device]


def refuse_forward_mode(operation: str, given: Iterable[Tensor | None]) -> None:
    """Raise NotImplementedError if a tensor carries a tangent: a registered operation would drop it, and the derivative would be 0."""
    if torch.compiler.is_compiling():
        return
    if any(value is not None and forward_ad.unpack_dual(value).tangent is not None for value in given):
        raise NotImplementedError(f"{operation} has no forward-mode derivatives (jvp, jacfwd): for these write impl='reference'")
