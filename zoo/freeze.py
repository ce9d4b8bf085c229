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


def _stay_in_eval(module: nn.Module, _: Any) -> None:
    if module.training:  # the model around it was put in training mode
        module.eval()
