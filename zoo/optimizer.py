"""AdamW or SGD over parameter groups by module prefix, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from zoo.depths import levels_below
from zoo.errors import ZooError, unknown
from zoo.freeze import freeze
from zoo.sections import Group, Optimizer


def make_optimizer(module: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """One group for every rate and decay that the settings name; the longest prefix wins.

    Prefixes are written as in ``freeze:``, from the model on: ``vision``, ``backbone.model.layers``; or ``objective``.

    Raises:
        ZooError: If a prefix matches no parameter that is trained, none is trained at all, or rates shall fall by block where there are
            no numbered ones.
    """
    named = {n.removeprefix("model."): p for n, p in module.named_parameters()}
    trained = {n: p for n, p in named.items() if p.requires_grad}
    if not trained:
        raise ZooError("nothing to train: every parameter is frozen")
    groups = sorted(settings.groups, key=lambda g: -len(g.prefix))
    of = {name: next((g for g in groups if name == g.prefix or name.startswith(g.prefix + ".")), None) for name in trained}
    lost = [g.prefix for g in groups if g not in of.values()]
    if lost:
        raise ZooError("optimizer.groups: " + "; ".join(_unmatched(prefix, trained) for prefix in lost))
    scales = _scales(list(named), of, settings)
    members: dict[tuple[Group | None, float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        shrinks = settings.decay_vectors or parameter.ndim > 1
        members.setdefault((of[name], scales[name], shrinks), []).append(parameter)
    made = []
    for (group, scale, shrinks), parameters in members.items():
        peak = scale * (settings.lr if group is None or group.lr is None else group.lr)
        weight_decay = settings.weight_decay if group is None or group.weight_decay is None else group.weight_decay
        made.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": weight_decay if shrinks else 0.0})
    if settings.name == "sgd":
        return torch.optim.SGD(made, lr=settings.lr, momentum=settings.momentum)  # fused fails without gradients
    return torch.optim.AdamW(made, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _scales(names: Sequence[str], of: Mapping[str, Group | None], settings: Optimizer) -> dict[str, float]:
    """What the rate of each trained parameter is multiplied by, for where it stands.

    Args:
        names: Of all parameters.
        of: {one that is trained: its group}.
        settings: Of the optimizer.
    """
    levels, scales = levels_below(names), {}
    reaches: dict[str, bool] = {}  # {what says that rates fall: whether any does}
    for name, group in of.items():
        decay, says = settings.layer_decay, "optimizer.layer_decay"
        if group is not None and group.layer_decay is not None:
            decay, says = group.layer_decay, f"optimizer.groups: layer_decay of {group.prefix!r}"
        scales[name] = decay ** levels[name]
        if decay < 1.0:
            reaches[says] = reaches.get(says, False) or levels[name] > 0
    if idle := [says for says, reached in reaches.items() if not reached]:
        raise ZooError(f"{idle[0]}: nothing that is trained there stands in numbered blocks (blocks.0, layers.0): leave it out")
    return scales


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
