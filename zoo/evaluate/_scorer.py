"""The one thing that retrieval asks of a model or a baseline, apart from both so that neither imports the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Scorer = Callable[
    [np.ndarray], np.ndarray
]  # (q,) int64 note indices -> (q, N) float32 or float64, higher is nearer, every note a candidate
