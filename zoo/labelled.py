"""What a data set of rows of known class may tell besides the class: which rows are about one sentence, and how right each class is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


@runtime_checkable
class Stated(Protocol):
    """Rows of which several are about one sentence; reports then say of how many sentences all rows are told right."""

    statements: np.ndarray  # (N,) int64; rows of one number are about one sentence


@runtime_checkable
class Soft(Protocol):
    """Rows of which training may be told how right each class is, in the place of the one that is right."""

    soft: bool  # whether it is

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """(n, K) float32 in 0..1, how right each class is of the rows (n,) int64."""
