"""Whose parameters the gradient of a training reached: those of the image, of the text, or of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zoo.evaluate._unavailable import Unavailable
from zoo.types import Divided

_LOGGED = "squared_gradient/"
SHARED = "shared"


def gradient_shares(model: Any, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of the squared gradient norm by modality at every logged step; those of a step sum to 1.

    Args:
        model: Is `Divided`: it says which of its modules serve one modality alone; the others, and the objective, are shared.
        log: The lines of a run that was trained with ``run.log_gradients``.

    Returns:
        ``{"steps": [...], "shares": {modality: [...]}, "mean": {modality: ...}, "spread": {modality: ...}}``, the last two over the steps.

    Raises:
        Unavailable: If the model does not say, nothing was logged, or no gradient ever came.
    """
    if not isinstance(model, Divided):
        raise Unavailable("this model does not say which of its modules serve one modality alone (modality_modules)")
    lines = [line for line in log if any(key.startswith(_LOGGED) for key in line)]
    if not lines:
        raise Unavailable("the log of this run holds no gradients: train with run.log_gradients=true")
    owner = {module: modality for modality, modules in model.modality_modules.items() for module in modules}
    names = [*model.modality_modules, SHARED]
    squared = np.zeros((len(lines), len(names)))
    for line, row in zip(lines, squared, strict=True):
        for key, value in line.items():
            if key.startswith(_LOGGED) and value is not None:  # what is not finite is logged as null
                row[names.index(owner.get(key.removeprefix(_LOGGED), SHARED))] += value
    moved = squared.sum(1) > 0
    if not moved.any():
        raise Unavailable("no gradient reached any module in the logged steps")
    shares = squared[moved] / squared[moved].sum(1, keepdims=True)  # (steps, modalities)
    return {
        "steps": [line["step"] for line, some in zip(lines, moved, strict=True) if some],
        "shares": {name: shares[:, i].round(6).tolist() for i, name in enumerate(names)},
        "mean": {name: float(shares[:, i].mean()) for i, name in enumerate(names)},
        "spread": {name: float(shares[:, i].std()) for i, name in enumerate(names)},
    }
