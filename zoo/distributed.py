"""Several processes that train one model: gradients averaged by hand, and weights that are spread over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


def mean_gradients(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Average gradients over all processes, in place; where only some have one, the others count as 0.

    Sharded gradients are left alone: theirs are averaged as they arise.
    """
    mine = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    anywhere = torch.tensor([p.grad is not None for p in mine], dtype=torch.int32, device=device)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    waiting = []
    for parameter, needed in zip(mine, anywhere.tolist(), strict=True):
        if needed:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            waiting.append((parameter.grad, dist.all_reduce(parameter.grad, async_op=True)))
    for gradient, work in waiting:
        work.wait()
        gradient.div_(dist.get_world_size())


def shard(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Spread a model's weights, gradients and optimizer state over all processes (FSDP2, ``torch.distributed.fsdp.fully_shard``).

    Args:
        model: Its forward gathers what no block has of its own.
        blocks: Repeated layers, each gathered when its turn comes. Every process must run all of them in every step.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        fully_shard(block)
    fully_shard(model)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The layers of the longest list of layers in ``module``, by parameters: those of a transformer."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    longest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)
    return [] if longest is None else list(longest)


def whole(tree: Any) -> Any:
    """Nested tensors with sharded ones gathered; all processes must ask together."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list | tuple) else tree


def spread_like(value: Any, like: Tensor | None) -> Any:
    """``value`` spread as ``like`` is, if it is a tensor of the same shape and ``like`` is spread."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_rows(x: Tensor) -> Tensor:
    """(B, ...) of this process to (W B, ...) of all W that train together, in their order, equally many in each.

    A gradient goes back to the process that a row came from; those of all processes add up there.
    """
    if processes() == 1:
        return x
    if x.dtype is torch.bool:  # not every transport knows it
        return all_rows(x.to(torch.uint8)).bool()
    if x.requires_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous()))
    received = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(received, x.contiguous())
    return torch.cat(received)


def longest(length: int, device: torch.device) -> int:
    """The largest ``length`` of the processes that train together."""
    if processes() == 1:
        return length
    found = torch.tensor(length, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
