"""Freeze a module: no gradient, and eval mode whatever ``train()`` is called on the model around it."""

from __future__ import annotations

from typing import Any

from torch import nn


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
