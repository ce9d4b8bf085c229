"""What of each training pair a model is shown: a picture and its text, or one of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from zoo.errors import ZooError
from zoo.types import Row

Kind = Literal["pair", "image", "text"]
KINDS: dict[Kind, tuple[bool, bool]] = {  # whether there is a picture, and a text
    "pair": (True, True),
    "image": (True, False),
    "text": (False, True),
}
DRAW = 11  # apart from what else the seed decides
Needs = Mapping[str, tuple[Kind, ...]]  # {an objective: kinds of which it needs one}


@runtime_checkable
class Choosy(Protocol):
    """An objective that learns from pairs of some kinds alone."""

    @property
    def learns_from(self) -> Needs:
        """Its own, by its name; of an objective of several, those of each."""


def pairs_alone(name: str) -> Needs:
    """What an objective needs that sets pictures beside their texts."""
    return {name: ("pair",)}


def check_shown(objective: Any, shares: Mapping[Kind, float]) -> None:
    """Whether what training pairs show is what an objective learns from.

    Args:
        objective: Any.
        shares: As of `draw_shown`; {}: all show both.

    Raises:
        ZooError: If it, or one of several, would learn nothing from any.
    """
    needed = objective.learns_from if isinstance(objective, Choosy) and shares else {}
    for name, kinds in needed.items():
        if not shares.keys() & {*kinds}:
            raise ZooError(
                f"run.shows: training shows {' and '.join(shares)} alone, of which {name} learns nothing: add {' or '.join(kinds)}: 1, or "
                f"leave {name} out"
            )


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
