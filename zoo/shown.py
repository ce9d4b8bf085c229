"""What of each training pair a model is shown: a picture and its text, or one of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from zoo.types import Row

Kind = Literal["pair", "image", "text"]
KINDS: dict[Kind, tuple[bool, bool]] = {  # whether there is a picture, and a text
    "pair": (True, True),
    "image": (True, False),
    "text": (False, True),
}
DRAW = 11  # apart from what else the seed decides


def draw_shown(count: int, shares: Mapping[Kind, float], seed: int) -> np.ndarray:
    """(count, 2) bool, whether each pair shows its picture, and its text; the same whenever it is asked.

    Args:
        count: Of pairs.
        shares: {kind of `KINDS`: weight}, above 0; kinds get as many pairs as weights say, to a rounding.
        seed: Of who gets which.
    """
    weights = np.array([*shares.values()], dtype=float)
    ends = np.round(weights.cumsum() / weights.sum() * count).astype(int)
    kind = np.searchsorted(ends, np.random.default_rng([seed, DRAW]).permutation(count), side="right")
    return np.array([KINDS[name] for name in shares])[kind]


def only_shown(row: Row, shown: np.ndarray) -> Row:
    """The row of a pair without what it does not show."""
    left_out = {key for key, there in zip(("image", "text"), shown, strict=True) if not there}
    return {key: value for key, value in row.items() if key not in left_out}
