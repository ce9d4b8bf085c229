"""Run a model that has no weights: every tensor's shape on the way to the loss, and the memory that a step would take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.distributed import blocks_of
from zoo.errors import ZooError
from zoo.types import Batch
from zoo.update import Step

Precision = Literal["no", "bf16", "fp16"]
_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class Line(NamedTuple):
    """What went into a module and came out, by name: ``{"tokens": "(32, 16, 768) float32"}``."""

    module: str
    given: dict[str, str]
    gave: dict[str, str]


class Kept(NamedTuple):
    """What a forward pass leaves in memory for the backward pass."""

    saved: int  # bytes of the distinct tensors that autograd keeps, weights left out
    casts: int  # bytes of the weights that autocast holds in its own precision until the forward pass ends
    calls: tuple[int, ...]  # of that what each call of a module left, in the order in which they end; 0 where it is computed again


class Memory(NamedTuple):
    """Bytes on one GPU in a training step.

    weights      all parameters and buffers, in their own precision
    gradients    of the trained parameters; several processes without sharding hold them twice, once in DDP's buckets
    optimizer    AdamW: two moments, or SGD: one, of each trained parameter in its own precision, and a step count of 4 bytes
    activations  the distinct tensors that autograd saves in one forward pass, weights left out

    With sharding over P processes the first three are divided by P, and the weights of the two largest blocks are there whole. With
    checkpointing of gradients the activations are those that stay, and the larger of one block's own and of autocast's copies of weights.
    Not in it: the CUDA context, the workspaces of kernels, fragmentation (10 to 20 %), and what the last layers need while they run.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


class _Exact(TorchDispatchMode):
    """Answers what can be answered without values.

    Masks that are known become row numbers: the shape of ``x[mask]`` is known then, although the values of ``x`` are not. A number that
    nobody knows is nan, which every check of a loss takes for neither large nor small.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _INDEXING:
            rows: list[Tensor | None] = []
            for index in args[1]:
                rows += [index] if index is None or index.dtype is not torch.bool else index.nonzero(as_tuple=True)
            args = (args[0], rows, *args[2:])
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor) and args[0].is_floating_point():
            return math.nan
        return func(*args, **(kwargs or {}))


class _Casts(TorchDispatchMode):
    """Counts what autocast makes of weights."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.parameters = {_storage(p) for p in parameters if p.requires_grad}
        self.bytes: dict[int, int] = {}  # by weight: autocast keeps one copy of each, and none of frozen ones

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and _storage(args[0]) in self.parameters:
            self.bytes[_storage(args[0])] = out.nbytes
        return out


def without_weights(step: Step) -> Step:
    """Every parameter and buffer replaced, in place, by one that has a shape, a type and no memory, and says that it lies on the CPU.

    Tensors of a batch stay real, so that what depends on them alone, such as masks and positions, is computed and not guessed.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    new: dict[Tensor, Tensor] = {}  # weights that are shared stay so

    def emptied(x: Tensor) -> Tensor:
        with fake:
            return torch.empty_like(x, device="cpu")

    for module in step.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in new:
                new[parameter] = nn.Parameter(emptied(parameter), parameter.requires_grad)
            module.register_parameter(name, new[parameter])  # type: ignore[arg-type]
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, emptied(buffer), persistent=name not in module._non_persistent_buffers_set)
    return step


def walk(step: Step, batch: Batch, precision: Precision = "no", *, deep: bool = False) -> tuple[list[Line], Kept]:
    """The shapes on the way of a batch to its loss, in the order in which the modules end, and what stays in memory behind it.

    Args:
        step: With or without weights. If its model has checkpointing of gradients on, what stays is what stays with it.
        batch: Real.
        precision: Of the forward pass.
        deep: Every module; else the model's own children, the model and the loss.

    Raises:
        ZooError: If a shape depends on values that nobody knows without weights.
    """
    lines: list[Line] = []
    held: dict[int, Tensor] = {}  # the tensors too: else the place of one that is gone is taken for it
    weights = {_storage(p) for p in step.parameters()}
    saved, began, calls = [0], list[int](), list[int]()  # bytes so far, of the calls that run now, and of those that have ended

    def pack(x: Tensor) -> Tensor:
        if _storage(x) not in weights and _storage(x) not in held:
            held[_storage(x)] = x
            saved[0] += x.untyped_storage().nbytes()
        return x

    casts = _Casts(step.parameters())
    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: lines.append(Line(name or "model", _arguments(m, args, kwargs), _shapes(out))),
            with_kwargs=True,
        )
        for name, module in step.model.named_modules()
        if deep or "." not in name
    ]
    for module in step.model.modules():
        handles.append(module.register_forward_pre_hook(lambda *_: began.append(saved[0])))
        handles.append(module.register_forward_hook(lambda *_: calls.append(saved[0] - began.pop())))
    try:
        with running(precision), casts, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = step(batch)
    finally:
        for handle in handles:
            handle.remove()
    assert loss.total.requires_grad, "something is trained"
    lines.append(Line("loss", {}, _shapes({"total": loss.total, **loss.parts})))
    return lines, Kept(saved[0], sum(casts.bytes.values()), tuple(calls))


def memory(step: Step, once: Kept, again: Kept, *, checkpointing: bool, processes: int, shard: bool, moments: int = 2) -> Memory:
    """`Memory` of a step.

    Args:
        step: With or without weights.
        once: Of `walk` without checkpointing of gradients.
        again: With it.
        checkpointing: Whether it is on.
        processes: GPUs that train together.
        shard: Spread weights, gradients and optimizer state over them.
        moments: That the optimizer keeps of each weight: 2 for AdamW, 1 for SGD.
    """
    trained = [p for p in step.parameters() if p.requires_grad]
    weights = _bytes([*step.parameters(), *step.buffers()])
    gradients, optimizer = _bytes(trained), moments * _bytes(trained) + 4 * len(trained)
    if shard:
        largest = max((_bytes(block.parameters()) for block in blocks_of(step.model)), default=0)
        weights, gradients, optimizer = -(-weights // processes) + 2 * largest, -(-gradients // processes), -(-optimizer // processes)
    elif processes > 1:
        gradients *= 2
    block = max((own for own, left in zip(once.calls, again.calls, strict=True) if left == 0), default=0)
    return Memory(weights, gradients, optimizer, again.saved + max(block, again.casts) if checkpointing else once.saved)


@contextmanager
def running(precision: Precision) -> Iterator[None]:
    """Inside, a step whose parameters are `without_weights` runs as it would with them.

    Raises:
        ZooError: If a shape depends on values that nobody knows without weights.
    """
    low = _AUTOCAST[precision]
    try:
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None), _Exact():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as e:
        raise ZooError(
            f"this model cannot be walked through without its weights: a shape depends on their values ({e.func}); "
            "compute masks and lengths from the batch alone, or look at a small model of its kind"
        ) from e


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> dict[str, str]:
    """By the names of the module's own signature."""
    return _shapes(dict(signature(module.forward).bind(*args, **kwargs).arguments))


def _shapes(value: Any, name: str = "") -> dict[str, str]:
    """Every tensor in a nested value, under dotted names."""
    if isinstance(value, Tensor):
        return {name: f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"}
    if isinstance(value, tuple) and type(value) is not tuple:
        named: Any = value  # a NamedTuple
        value = named._asdict()
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: v for key, each in inside for k, v in _shapes(each, f"{name}.{key}" if name else str(key)).items()}
