"""How much of each modality's vector a learned gate lets through, and how that depends on which modalities are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.evaluate._unavailable import Unavailable
from zoo.joints import Sharing
from zoo.types import Batch

_Given = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # what a combine plug-in is called with


@torch.no_grad()
def gate_shares(model: Any, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """The share of each modality's vector in the combined one, by output and by which modalities are there.

    Args:
        model: Has one combine plug-in that is `Sharing`; it is called once for each output.
        batches: On the model's device.

    Returns:
        Records ``{"output", "present", "modality", "notes", "mean", "spread", "between_notes"}``: mean and standard deviation over notes
        and features, and the standard deviation of the notes' own means; in the order of the outputs, most modalities first.

    Raises:
        Unavailable: If nothing in the model shares out its result.
    """
    gates = [module for module in model.modules() if isinstance(module, Sharing)]
    if len(gates) != 1:
        raise Unavailable(f"shares are those of one combine plug-in that tells them, such as gated_late, and this model has {len(gates)}")
    given: list[_Given] = []
    assert isinstance(gates[0], nn.Module), gates[0]
    hook = gates[0].register_forward_pre_hook(lambda _module, arguments: given.append(arguments))
    found: dict[tuple[int, tuple[str, ...], str], list[Tensor]] = {}
    try:
        for batch in batches:
            given.clear()
            model(batch)
            for output, arguments in enumerate(given):
                for key, moments in _moments(gates[0], *arguments).items():
                    found.setdefault((output, *key), []).append(moments)
    finally:
        hook.remove()
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[0][1]), item[0][1:]))
    return [_record(model.outputs[output], present, name, torch.cat(parts)) for (output, present, name), parts in ordered]


def _moments(gate: Sharing, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[tuple[tuple[str, ...], str], Tensor]:
    """By (modalities that are there, modality): (R, 2) of those rows, the mean over features and that of the square."""
    shares = gate.shares(x, present)
    there = torch.stack([present[name] for name in shares], dim=1).tolist()
    combinations = [tuple(name for name, here in zip(shares, row, strict=True) if here) for row in there]
    moments = {}
    for combination in set(combinations) - {()}:
        rows = torch.tensor([i for i, c in enumerate(combinations) if c == combination])
        for name in combination:
            share = shares[name].double().cpu()[rows]
            moments[combination, name] = torch.stack([share.mean(1), share.square().mean(1)], dim=1)
    return moments


def _record(output: str, present: tuple[str, ...], modality: str, moments: Tensor) -> dict[str, Any]:
    mean, square = moments.mean(0)
    return {
        "output": output,
        "present": list(present),
        "modality": modality,
        "notes": len(moments),
        "mean": float(mean),
        "spread": float((square - mean**2).clamp(min=0).sqrt()),
        "between_notes": float(moments[:, 0].std(correction=0)),
    }
