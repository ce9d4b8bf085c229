"""Numbers of classification by hand, and beside scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from zoo.evaluate.classification import calibration_error, entropies, macro_f1, modality_gap


def logits_of(chances):
    return np.log(np.array(chances, np.float32))


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_is_scikit_learns(seed):
    draw = np.random.default_rng(seed)
    labels, guesses = draw.integers(0, 4, 60), draw.integers(0, 4, 60)
    assert macro_f1(labels, guesses, 5) == pytest.approx(f1_score(labels, guesses, average="macro"), abs=1e-12)


def test_calibration_error_by_hand():
    """Sure by 0.9 and right in one of two: 0.4; sure by 0.6 and right: 0.4."""
    logits = logits_of([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    assert calibration_error(logits, np.array([0, 1, 0])) == pytest.approx((2 * 0.4 + 0.4) / 3, abs=1e-6)


def test_entropies():
    np.testing.assert_allclose(entropies(np.array([[0, 0, 0], [1e4, 0, 0]], np.float32)), [np.log(3), 0], atol=1e-12)


def test_the_gap():
    features = {
        "audio": torch.tensor([[2.0, 0.0], [0.5, 0.0]]),
        "image": torch.tensor([[0.0, 1.0], [0.0, 7.0]]),
        "text": torch.tensor([[3.0, 0.0]]),
    }
    assert modality_gap(features) == {
        ("audio", "image"): pytest.approx(2**0.5),
        ("audio", "text"): 0,
        ("image", "text"): pytest.approx(2**0.5),
    }
