"""Classes predicted from every subset of the modalities: accuracy, macro F1, calibration, and what else tells whom a model listens to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.collate import RowCollate
from zoo.evaluate.modalities import Altered, Shown, subsets
from zoo.models._encode import progress, to_device
from zoo.types import LabelledData

BINS = 15  # of the calibration error


class Predicted(NamedTuple):
    """What a model says of some rows when it is shown some of their modalities."""

    rows: np.ndarray  # (n,) int64 of the data set
    labels: np.ndarray  # (n,) int64
    logits: np.ndarray  # (n, K) float32, NaN for a row that then shows nothing
    seen: np.ndarray  # (n,) bool, whether it shows anything

    def right(self, prior: int) -> np.ndarray:
        """(n,) float64 in {0, 1}; a row that shows nothing is taken for the class ``prior``."""
        guess = np.where(self.seen, np.nan_to_num(self.logits).argmax(1), prior)
        return (guess == self.labels).astype(np.float64)


@torch.no_grad()
def predict(model: Any, data: LabelledData, rows: np.ndarray, shown: Shown, *, batch_size: int = 256) -> Predicted:
    """The fused logits of ``rows`` with only the modalities ``shown``; the others are absent, not zeros.

    Args:
        model: A classifier in eval mode.
        data: Of which the rows are.
        rows: (n,) int64.
        shown: Names of modalities.
        batch_size: Rows at a time.
    """
    altered = Altered(data.rows, hidden=set(data.modalities) - shown)
    collate, device = RowCollate(model.processor), next(model.parameters()).device
    logits = np.full((len(rows), len(data.classes)), np.nan, np.float32)
    for start in progress(range(0, len(rows), batch_size), "predicting", None):
        here = [(i, altered[int(rows[i])]) for i in range(start, min(start + batch_size, len(rows)))]
        seen = [(i, row) for i, row in here if model.processor.sees(row)]
        if seen:
            out = model(to_device(collate([row for _, row in seen]), device))
            logits[[i for i, _ in seen]] = out.logits["fused"].float().cpu().numpy()
    return Predicted(rows, data.labels[rows], logits, np.isfinite(logits).all(1))


def every_subset(model: Any, data: LabelledData, rows: np.ndarray, *, batch_size: int = 256) -> dict[Shown, Predicted]:
    """`predict` for all 2^M - 1 subsets that show something, the whole first."""
    return {shown: predict(model, data, rows, shown, batch_size=batch_size) for shown in subsets(data.modalities) if shown}


def macro_f1(labels: np.ndarray, guesses: np.ndarray, classes: int) -> float:
    """The mean of F1 over the classes that occur among labels or guesses."""
    true = np.bincount(labels[labels == guesses], minlength=classes)
    either = np.bincount(labels, minlength=classes) + np.bincount(guesses, minlength=classes)
    there = either > 0
    return float((2 * true[there] / either[there]).mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: how far confidence is from accuracy, over bins of equal width, in 0..1.

    Guo et al., On calibration of modern neural networks, 2017, https://arxiv.org/abs/1706.04599.
    """
    chances = torch.from_numpy(logits).double().softmax(1).numpy()
    sure, right = chances.max(1), chances.argmax(1) == labels
    of = np.minimum((sure * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(of, weights=right - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The positive number that logits are divided by so that their cross-entropy is least; of rows that no weight was fitted on.

    As the paper of `calibration_error`; by golden-section search over its logarithm, in which the loss has one valley, within 0.01 and 100.
    """
    x, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(x / np.exp(log_t), y))

    low, high = np.log(0.01), np.log(100)
    ratio = (np.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def entropies(logits: np.ndarray) -> np.ndarray:
    """(n,) of softmax(logits), in nats."""
    log_p = torch.from_numpy(logits).double().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).numpy()  # type: ignore[no-any-return]


def modality_gap(features: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """Distance between the centroids of each two modalities' features (n, D), each row of length 1 first.

    Liang et al., Mind the gap, 2022, https://arxiv.org/abs/2203.02053.
    """
    centroids = {name: F.normalize(x.double(), dim=-1).mean(0) for name, x in features.items()}
    names: Sequence[str] = list(centroids)
    return {(a, b): float((centroids[a] - centroids[b]).norm()) for i, a in enumerate(names) for b in names[i + 1 :]}
