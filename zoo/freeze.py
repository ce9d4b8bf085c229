"""Freeze a module: no gradient, and eval mode whatever ``train()`` is called on the model around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from zoo.errors import ZooError, unknown


def freeze(module: nn.Module) -> None:
    """Take ``module`` out of training: its parameters need no gradient and its dropout and batch norm stay in eval mode.

    No gradient needed below means that autograd records nothing, so that the memory of a ``no_grad`` block is saved too.
    """
    module.requires_grad_(False)
    module.eval()
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # never called itself, so a hook on it would never run
        for child in module.children():
            freeze(child)
    else:
        module.register_forward_pre_hook(_stay_in_eval)


def freeze_others(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze all of ``model`` but the parameters that ``patterns`` name.

    What holds no parameter, such as dropout, goes with the module around it: it acts in training where that learns anything.

    Args:
        model: Any.
        patterns: Names of parameters, or of modules for all within, each step of which may be a shell pattern: ``embed``,
            ``trunk.blocks.*.ffn.text``.

    Raises:
        ZooError: If one names nothing, or nothing that the model itself lets train.
    """
    named = list(model.named_parameters(remove_duplicate=False))  # weights that are tied go by all of their names
    trained: set[int] = set()
    for pattern in patterns:
        found = [parameter for name, parameter in named if _names(pattern, name)]
        if not found:
            depth = pattern.count(".") + 1
            near = {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", ".".join(name.split(".")[:depth])) for name, _ in named}
            raise ZooError(f"train_only: {unknown('module or parameter', pattern, near)}")
        if not any(parameter.requires_grad for parameter in found):
            raise ZooError(f"train_only: {pattern!r} is never trained, as the model's own settings say: change those, or leave it out")
        trained |= {id(parameter) for parameter in found if parameter.requires_grad}
    _freeze_but(model, trained)


def _names(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names a parameter, or a module around it."""
    steps, asked = name.split("."), pattern.split(".")
    return len(steps) >= len(asked) and all(fnmatchcase(step, each) for step, each in zip(steps, asked, strict=False))


def _freeze_but(module: nn.Module, trained: set[int]) -> None:
    """Freeze ``module``, or what of it holds none of these parameters."""
    inside = {id(parameter) for parameter in module.parameters()}
    if not inside & trained:
        if inside:
            freeze(module)
        return
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(id(parameter) in trained)
    for child in module.children():
        _freeze_but(child, trained)


def thaw(model: nn.Module, name: str) -> None:
    """Let the module ``name`` of ``model`` and all in it change to training mode again; what is frozen around it stays frozen.

    No parameter is told to need a gradient: that is for who learns something in there.
    """
    module = model
    for part in name.split("."):
        if _release(module):
            for child in module.children():
                freeze(child)
        module = module.get_submodule(part)
    for inside in module.modules():
        _release(inside)


def _release(module: nn.Module) -> bool:
    """Take the hook of `freeze` off ``module``; whether it was there."""
    found = [key for key, hook in module._forward_pre_hooks.items() if hook is _stay_in_eval]
    for key in found:
        del module._forward_pre_hooks[key]  # what the handle of a hook does, which nobody kept
    return bool(found)


def _stay_in_eval(module: nn.Module, _: Any) -> None:
    if module.training:  # the model around it was put in training mode
        module.eval()
