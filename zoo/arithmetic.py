"""Sums and differences of what pictures and texts mean: their vectors, each of length 1, added and taken away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zoo.errors import ZooError


def combine(
    plus: Sequence[np.ndarray] | np.ndarray, minus: Sequence[np.ndarray] | np.ndarray = (), *, weights: Sequence[float] | None = None
) -> np.ndarray:
    """One vector to search with: a picture plus a text, a text minus another.

    Each vector is given length 1 first: some models' outputs have lengths of their own, and the longest would decide. Girdhar et al.,
    ImageBind, 2023, section 4.3, https://arxiv.org/abs/2305.05665.

    Args:
        plus: Vectors (D,).
        minus: Vectors (D,).
        weights: Of all of them, those of ``plus`` first; None: 1 each.

    Returns:
        (D,) float32 of length 1.

    Raises:
        ZooError: If there is no vector, widths or numbers differ, one is zero or not finite, or nothing is left.
    """
    given = [np.asarray(x, dtype=np.float64) for x in (*plus, *minus)]
    if not given:
        raise ZooError("there is nothing to add: give one vector at least")
    if wrong := [x.shape for x in given if x.ndim != 1 or x.shape != given[0].shape]:
        raise ZooError(f"vectors of shapes {given[0].shape} and {wrong[0]} cannot be added: each is (D,), of one model")
    factors = [1.0] * len(given) if weights is None else list(weights)
    if len(factors) != len(given):
        raise ZooError(f"weights: {len(factors)} of them for {len(given)} vectors: write one for each")
    lengths = [float(np.linalg.norm(x)) for x in given]
    if bad := [i for i, length in enumerate(lengths) if not np.isfinite(length) or length == 0]:
        raise ZooError(f"vector {bad[0]} has no direction (its length is {lengths[bad[0]]:g}): leave it out")
    signs = [1.0] * len(plus) + [-1.0] * len(minus)
    total = sum((s * f / n) * x for s, f, n, x in zip(signs, factors, lengths, given, strict=True))
    length = float(np.linalg.norm(total))
    if length < 1e-6:
        raise ZooError("nothing is left: what is added and what is taken away are the same")
    return np.asarray(total / length, dtype=np.float32)
