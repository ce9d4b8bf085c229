"""Which rows lose which modality: drawn by seed, at exact rates, and never all of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from zoo.errors import ZooError, unknown


def draw_presence(rates: float | Mapping[str, float], rows: int, modalities: Sequence[str], seed: int | Sequence[int]) -> np.ndarray:
    """Which row has which modality; at least one in every row.

    A number is the share of all cells, as in CPM-Net (Zhang et al., CPM-Nets: cross partial multi-view networks, 2019,
    https://papers.nips.cc/paper/8346) and MLA (Zhang et al., 2024, https://arxiv.org/abs/2311.10707): every modality is lost at this
    rate, and from 1 - 1 / M on, where no more can be lost, every row keeps exactly one. A mapping gives each modality a rate of its own.

    Args:
        rates: In 0..1; modalities that a mapping does not name stay. Its rates add up to M - 1 at most.
        rows: How many.
        modalities: Their M names.
        seed: Of the draw, and of nothing else.

    Returns:
        (rows, M) bool, True where present. The number of rows that lose a modality is within one of its rate times ``rows``.

    Raises:
        ZooError: If a rate is outside 0..1 or of an unknown modality, or if some row would lose all.
    """
    wanted = np.array(list(_each(rates, modalities).values()))
    sums = np.floor(np.concatenate([[0.0], wanted.cumsum()]) * rows + 0.5 + 1e-9).astype(np.int64)  # rounds the sum, so that it never grows
    draw = np.random.default_rng(seed)
    present = np.ones((rows, len(modalities)), dtype=bool)
    for m, count in enumerate(np.diff(sums)):
        present[draw.permutation(rows)[:count], m] = False
    for bare in np.flatnonzero(~present.any(1)):
        donor = draw.choice(np.flatnonzero(present.sum(1) > 1))  # there is one, as the rates add up to M - 1 at most
        m = draw.choice(np.flatnonzero(present[donor]))
        present[donor, m], present[bare, m] = False, True
    return present


def _each(rates: float | Mapping[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """The rate of every modality."""
    if not isinstance(rates, Mapping):
        _check("of missing modalities", rates)
        return dict.fromkeys(modalities, min(rates, 1 - 1 / len(modalities)))
    for modality, rate in rates.items():
        if modality not in modalities:
            raise ZooError(unknown("modality to lose", modality, modalities))
        _check(f"of missing {modality}", rate)
    if sum(rates.values()) > len(modalities) - 1 + 1e-9:
        raise ZooError(
            f"missing modalities: the rates {', '.join(f'{m} {r:g}' for m, r in rates.items())} leave some row nothing:"
            f" of {len(modalities)} modalities they add up to {len(modalities) - 1} at most"
        )
    return {m: rates.get(m, 0.0) for m in modalities}


def _check(which: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ZooError(f"the rate {which} is {rate:g}: write one from 0 to 1")
