"""All subsets of some modalities, and what each modality is worth across them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import combinations

import numpy as np

Shown = frozenset[str]


def subsets(names: Collection[str]) -> list[Shown]:
    """All 2^M, the largest first, in the order of ``names``."""
    return [frozenset(some) for size in range(len(names), -1, -1) for some in combinations(names, size)]


def shapley(values: Mapping[Shown, np.ndarray], names: Collection[str]) -> dict[str, np.ndarray]:
    """What each modality contributes on average over all orders in which they may be added (Shapley 1953).

    Exact; the contributions sum to the value of all minus that of none. As for modalities: Hu et al., SHAPE, 2022,
    https://arxiv.org/abs/2205.00302.

    Args:
        values: Of every subset of ``names``, for each query (Q,).
        names: The M modalities.

    Returns:
        {name: (Q,)}.
    """
    count = len(names)
    found = {}
    for name in names:
        without = [s for s in values if name not in s]
        weights = [math.factorial(len(s)) * math.factorial(count - len(s) - 1) / math.factorial(count) for s in without]
        found[name] = sum((w * (values[s | {name}] - values[s]) for w, s in zip(weights, without, strict=True)), np.zeros(()))
    return found
