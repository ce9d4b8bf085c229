"""AdamW or SGD over parameter groups by module prefix, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from zoo.errors import ZooError, unknown
from zoo.freeze import freeze
from zoo.sections import Group, Optimizer


def make_optimizer(module: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """One group for every rate and decay that the settings name; the longest prefix wins.

    Prefixes are written as in ``freeze:``, from the model on: ``vision``, ``backbone.model.layers``; or ``objective``.

    Raises:
        ZooError: If a prefix matches no parameter that is trained, or none is trained at all.
    """
    trained = {n.removeprefix("model."): p for n, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ZooError("nothing to train: every parameter is frozen")
    groups = sorted(settings.groups, key=lambda g: -len(g.prefix))
    members: dict[Group | None, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        group = next((g for g in groups if name == g.prefix or name.startswith(g.prefix + ".")), None)
        members.setdefault(group, []).append(parameter)
    lost = [g.prefix for g in groups if g not in members]
    if lost:
        raise ZooError("optimizer.groups: " + "; ".join(_unmatched(prefix, trained) for prefix in lost))
    peak = {group: settings.lr if group is None or group.lr is None else group.lr for group in members}
    made = [
        {
            "params": parameters,
            "lr": peak[group],
            "peak": peak[group],
            "weight_decay": settings.weight_decay if group is None or group.weight_decay is None else group.weight_decay,
        }
        for group, parameters in members.items()
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(made, lr=settings.lr, momentum=settings.momentum)  # fused fails without gradients
    return torch.optim.AdamW(made, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(settings: Optimizer, step: int, steps: int, epoch: float = 1.0) -> float:
    """What the peak rate is multiplied with in ``step``, counted from 0, of ``steps``; an epoch has ``epoch`` of them.

    ``log`` warm-up is DeepSpeed's: log(step + 1) / log(warm-up steps), so the first step moves nothing.
    """
    warm = round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)
    if step < warm:
        return math.log(step + 1) / math.log(max(warm, 2)) if settings.warmup_shape == "log" else (step + 1) / (warm + 1)
    left = 1.0 - (step - warm) / max(steps - warm, 1)
    if settings.decay == "constant":
        return 1.0
    if settings.decay == "exponential":
        return max(settings.floor, settings.factor ** math.floor(step / epoch))
    share = left if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    return settings.floor + (1.0 - settings.floor) * share


def freeze_all(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Freeze the modules of ``model`` that a recipe's ``freeze:`` names.

    Raises:
        ZooError: If a prefix names no module.
    """
    modules = dict(model.named_modules())
    for prefix in prefixes:
        if prefix not in modules:
            raise ZooError(f"freeze: {unknown('module', prefix, _prefixes(modules, prefix))}")
        freeze(modules[prefix])


def _unmatched(prefix: str, trained: Iterable[str]) -> str:
    if prefix == "objective":
        return f"{prefix!r} matches nothing, the objective has no parameters: leave this group out"
    return unknown("trained module", prefix, _prefixes(trained, prefix))


def _prefixes(names: Iterable[str], near: str) -> set[str]:
    """Names cut to the depth of ``near``, for a list of choices that can be read."""
    depth = near.count(".") + 1
    return {".".join(n.split(".")[:depth]) for n in names if n}
