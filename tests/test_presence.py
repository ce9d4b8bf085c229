"""Rows lose modalities at the rates that were asked for, by seed, and never all of them."""

import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.presence import draw_presence

TWO, THREE = ("audio", "image"), ("audio", "image", "text")


@pytest.mark.parametrize("modalities", [TWO, THREE])
@pytest.mark.parametrize("rows", [1, 2, 7, 101, 3000])
@pytest.mark.parametrize("rate", [0, 0.1, 0.25, 0.5, 2 / 3, 0.75, 1])
def test_one_rate_for_all_is_kept_to_within_a_row_until_one_modality_is_left(modalities, rows, rate):
    present = draw_presence(rate, rows, modalities, seed=3)
    most = 1 - 1 / len(modalities)
    assert present.shape == (rows, len(modalities))
    assert present.any(1).all()
    assert np.all(np.abs((~present).sum(0) - min(rate, most) * rows) <= 1)
    assert abs((~present).sum() - min(rate, most) * present.size) <= 0.5 + 1e-9
    if rate >= most:
        assert (present.sum(1) == 1).all()


@pytest.mark.parametrize(
    "rates", [{"audio": 0.75}, {"image": 1}, {"audio": 0.3, "text": 0.9}, {"audio": 1, "image": 0.4, "text": 0.6}, {"text": 0.0}, {}]
)
def test_each_modality_at_its_own_rate(rates):
    present = draw_presence(rates, 1000, THREE, seed=0)
    assert present.any(1).all()
    lost = dict(zip(THREE, (~present).mean(0), strict=True))
    assert lost == pytest.approx({m: rates.get(m, 0) for m in THREE}, abs=0.0011)


def test_the_seed_alone_decides():
    a, b, c = (draw_presence(0.3, 500, TWO, seed) for seed in (1, 1, [1, 2]))
    assert (a == b).all()
    assert (a != c).any()


def test_who_loses_what_is_spread_evenly():
    """Rows that lost all are given one back by rows drawn at random: no row and no modality is favoured."""
    kept = np.mean([draw_presence(0.45, 40, TWO, seed) for seed in range(200)], 0)  # (40, 2), each 0.55 +- 0.035
    assert np.abs(kept - 0.55).max() < 0.15


@pytest.mark.parametrize(
    "rates, says",
    [
        (1.2, r"the rate of missing modalities is 1\.2: write one from 0 to 1"),
        ({"image": -0.1}, r"the rate of missing image is -0\.1"),
        ({"image": float("nan")}, "the rate of missing image is nan"),
        ({"imagery": 0.1}, r"no modality to lose named 'imagery'; did you mean 'image'\? \(have: audio, image\)"),
        ({"audio": 0.75, "image": 0.5}, r"rates audio 0\.75, image 0\.5 leave some row nothing: of 2 modalities they add up to 1 at most"),
    ],
)
def test_rates_that_cannot_be(rates, says):
    with pytest.raises(ZooError, match=says):
        draw_presence(rates, 10, TWO, seed=0)
