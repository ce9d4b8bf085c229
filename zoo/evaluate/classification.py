"""Classes predicted from every subset of the modalities: accuracy, macro F1, calibration, and what else tells whom a model listens to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.answers import AnsweredData
from zoo.collate import processed, stack
from zoo.errors import Failure, ZooError
from zoo.evaluate._bootstrap import interval
from zoo.evaluate._subsets import Shown, shapley, subsets
from zoo.labelled import Stated
from zoo.metric import CLASSES, Metric, missing
from zoo.models._encode import progress, to_device
from zoo.presence import draw_presence
from zoo.sections import Classify
from zoo.types import Batch, LabelledData, ModelOutput

BINS = 15  # of the calibration error


class Predicted(NamedTuple):
    """What a model says of some rows when it is shown some of their modalities."""

    labels: np.ndarray  # (n,) int64
    logits: np.ndarray  # (n, K) float32, NaN for a row that then shows nothing

    @property
    def seen(self) -> np.ndarray:
        """(n,) bool, whether the row shows anything."""
        return np.isfinite(self.logits).all(1)

    def guesses(self, prior: int) -> np.ndarray:
        """(n,) int64; a row that shows nothing is taken for the class ``prior``."""
        return np.where(self.seen, np.nan_to_num(self.logits).argmax(1), prior)

    def right(self, prior: int) -> np.ndarray:
        """(n,) float64 in {0, 1}."""
        return (self.guesses(prior) == self.labels).astype(np.float64)


class Grading(Protocol):
    """How right a guess is, where it can be right in part."""

    protocol: str  # of the metrics

    def right(self, rows: np.ndarray, guesses: np.ndarray) -> np.ndarray:
        """(n,) float64 in 0..1 of the classes guessed (n,) int64 of rows (n,) int64."""

    def subsets(self, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """{name: (n,) bool} over the rows (n,) int64: those that have a number of their own."""


class Looked(NamedTuple):
    """What a model makes of each modality by itself, of the rows that show anything."""

    labels: Tensor  # (n,) int64
    features: Mapping[str, Tensor]  # {modality: (n, D) float32}
    logits: Mapping[str, Tensor]  # {modality: (n, K) float32}; {} of a model that combines features
    present: Mapping[str, Tensor]  # {modality: (n,) bool}


def check(data: LabelledData, settings: Classify) -> None:
    """Whether the data can answer what will be measured, and every class can be learned; but one that stands for the rest of the answers.

    Raises:
        ZooError: If a split is not there or empty, there is one modality, a class has no training row, or a rate of missing cells
            cannot be, or stands there twice.
    """
    train = data.split("train")
    if not len(data.split(settings.split)):
        raise ZooError(f"split {settings.split!r} has no rows: there is nothing to classify; name another one")
    if len(data.modalities) < 2:
        raise ZooError(f"the data have one modality, {', '.join(data.modalities)}: balance between modalities needs two or more")
    counts = np.bincount(data.labels[train], minlength=len(data.classes))
    rest = data.rest if isinstance(data, AnsweredData) else ()
    if lost := [data.classes[k] for k in np.flatnonzero(counts == 0) if data.classes[k] not in rest]:
        raise ZooError(f"classes without a training row: {', '.join(lost)}; leave them out of the data, or split it otherwise")
    for rate in settings.missing:
        try:
            draw_presence(rate, 1, data.modalities, 0)
        except ZooError as e:
            raise ZooError(f"classify.missing: {e}") from e
    names = asked(settings)
    if twice := {name for name in names if names.count(name) > 1}:
        raise ZooError(f"classify.missing: {', '.join(sorted(twice))} stands there twice: write each rate once")


def asked(settings: Classify) -> list[str]:
    """The subsets that have an accuracy: all rows as they are, and at each rate of missing cells."""
    return ["all", *(missing(rate) for rate in settings.missing)]


def named(shown: Shown, data: LabelledData) -> str:
    """A subset of the modalities as tables call it: ``all``, ``audio``, ``audio+image``."""
    return "all" if len(shown) == len(data.modalities) else "+".join(name for name in data.modalities if name in shown)


def measure(
    model: Any, data: LabelledData, settings: Classify, *, seed: int, grading: Grading | None = None
) -> tuple[list[Metric], None, dict[str, Any]]:
    """Accuracy from every subset of the modalities and at every rate of missing cells; no vectors; and the `details`.

    Args:
        model: A classifier in eval mode.
        data: Rows that it was not trained on, among others.
        settings: Of what is measured.
        seed: Of the intervals, and of the cells that are hidden.
        grading: How right guesses are, and which rows have a number of their own; None: right or wrong, by the label.

    Raises:
        ZooError: If the model gives no logits of these classes.
    """
    rows = data.split(settings.split)
    predicted = every_subset(model, data, rows, batch_size=settings.batch_size)
    prior = int(np.bincount(data.labels[data.split("train")]).argmax())
    right = {shown: _right(found, rows, prior, grading) for shown, found in predicted.items()}
    metric = partial(_metric, CLASSES if grading is None else grading.protocol, settings=settings, seed=seed)
    metrics = [metric("all", named(shown, data), rows, hits) for shown, hits in right.items()]
    whole = right[frozenset(data.modalities)]
    parts = {} if grading is None else grading.subsets(rows)
    metrics[1:1] = [metric(name, "all", rows[there], whole[there]) for name, there in parts.items()]
    for rate in settings.missing:
        present = draw_presence(rate, len(rows), data.modalities, [seed, len(rows)])
        shown = [frozenset(np.array(data.modalities)[here].tolist()) for here in present]
        hits = np.array([right[some][i] for i, some in enumerate(shown)])
        metrics.append(metric(missing(rate), "all", rows, hits))
    alone = by_modality(model, data, rows, batch_size=settings.batch_size)
    return metrics, None, details(data, rows, predicted, alone, prior, grading)


def _right(found: Predicted, rows: np.ndarray, prior: int, grading: Grading | None) -> np.ndarray:
    """(n,) float64 in 0..1."""
    return found.right(prior) if grading is None else grading.right(rows, found.guesses(prior))


def _metric(protocol: str, subset: str, given: str, rows: np.ndarray, hits: np.ndarray, *, settings: Classify, seed: int) -> Metric:
    low, high = interval(hits, resamples=settings.bootstrap, seed=seed)
    return Metric(protocol, subset, given, 1, float(hits.mean()), float(low), float(high), rows, hits)


def details(
    data: LabelledData,
    rows: np.ndarray,
    predicted: Mapping[Shown, Predicted],
    alone: Looked,
    prior: int,
    grading: Grading | None = None,
) -> dict[str, Any]:
    """What accuracies do not tell, as plain values.

    Returns:
        ``macro_f1`` and ``calibration_error`` by what was shown, and ``consistency`` where several rows are about one sentence;
        ``shapley``: the accuracy that each modality adds, exact over all subsets, nothing shown being the commonest training class;
        ``entropy``: of each modality, ten equal shares of its rows by rising entropy
        with their mean entropy and error; ``gap``: the distance of each two modalities' centroids.
        All but ``shapley`` go by the label, however guesses are graded.
    """
    classes = len(data.classes)
    right = {shown: _right(found, rows, prior, grading) for shown, found in predicted.items()}
    blind = Predicted(data.labels[rows], np.full((len(rows), classes), np.nan, np.float32))
    nothing = _right(blind, rows, prior, grading)
    adds = shapley({**right, frozenset(): nothing}, data.modalities)
    own = {name: x[there].float() for name, x in alone.features.items() if (there := alone.present[name]).any()}
    sure = {shown: Predicted(found.labels[found.seen], found.logits[found.seen]) for shown, found in predicted.items()}
    return {
        "macro_f1": {named(shown, data): macro_f1(found.labels, found.guesses(prior), classes) for shown, found in predicted.items()},
        **_consistent(data, rows, right),
        "calibration_error": {named(shown, data): calibration_error(p.logits, p.labels) for shown, p in sure.items() if len(p.labels)},
        "shapley": {name: float(values.mean()) for name, values in adds.items()},
        "nothing": float(nothing.mean()),
        "entropy": {
            name: entropy_and_error(logits[there].float().numpy(), alone.labels[there].numpy())
            for name, logits in alone.logits.items()
            if (there := alone.present[name]).any()
        },
        "gap": {f"{a} – {b}": distance for (a, b), distance in modality_gap(own).items()},
    }


def _consistent(data: LabelledData, rows: np.ndarray, right: Mapping[Shown, np.ndarray]) -> dict[str, dict[str, float]]:
    if not isinstance(data, Stated):
        return {}
    return {"consistency": {named(shown, data): consistency(hits, data.statements[rows]) for shown, hits in right.items()}}


@torch.no_grad()
def every_subset(model: Any, data: LabelledData, rows: np.ndarray, *, batch_size: int = 256) -> dict[Shown, Predicted]:
    """What the model says of ``rows`` from each of the 2^M - 1 subsets of modalities, the whole first; the rest is absent.

    Args:
        model: A classifier in eval mode.
        data: Of which the rows are; each is decoded once.
        rows: (n,) int64.
        batch_size: Rows at a time.

    Raises:
        Failure: If logits are not finite.
        ZooError: If the model gives no logits of these classes.
    """
    wanted = [shown for shown in subsets(data.modalities) if shown]
    logits = {shown: np.full((len(rows), len(data.classes)), np.nan, np.float32) for shown in wanted}
    device = next(model.parameters()).device
    for start in progress(range(0, len(rows), batch_size), "predicting", None):
        samples = [processed(model.processor, data.rows[int(i)], int(i)) for i in rows[start : start + batch_size]]
        for shown in wanted:
            cut = [{name: x for name, x in sample.items() if name in shown} for sample in samples]
            here = [i for i, sample in enumerate(cut) if sample]
            if here:
                said = _fused(model(to_device(Batch(stack([cut[i] for i in here])), device)), data).float().cpu().numpy()
                if len(wrong := np.flatnonzero(~np.isfinite(said).all(1))):
                    row, some = rows[start + here[wrong[0]]], named(shown, data)
                    raise Failure(f"row {row}: from {some}, the model gives logits that are NaN or infinite: its weights are at fault")
                logits[shown][[start + i for i in here]] = said
    return {shown: Predicted(data.labels[rows], found) for shown, found in logits.items()}


def _fused(out: ModelOutput, data: LabelledData) -> Tensor:
    """(B, K)."""
    found = out.logits.get("fused")
    if found is None or found.shape[-1] != len(data.classes):
        seen = "no logits of classes" if found is None else f"logits of {found.shape[-1]} classes"
        raise ZooError(f"the model gives {seen}, and the data have {len(data.classes)}: write model.classes={len(data.classes)}")
    return found


@torch.no_grad()
def by_modality(model: Any, data: LabelledData, rows: np.ndarray, *, batch_size: int = 256) -> Looked:
    """Features of each modality, and its logits where the model combines those.

    Args:
        model: A classifier in eval mode.
        data: Of which the rows are.
        rows: (n,) int64.
        batch_size: Rows at a time.

    Raises:
        ZooError: If no row shows anything.
    """
    labels, outputs = [], []
    device = next(model.parameters()).device
    for start in progress(range(0, len(rows), batch_size), "features", None):
        numbered = [(int(i), processed(model.processor, data.rows[int(i)], int(i))) for i in rows[start : start + batch_size]]
        samples = [(i, sample) for i, sample in numbered if sample]
        if samples:
            outputs.append(model(to_device(Batch(stack([sample for _, sample in samples])), device)))
            labels.append(data.labels[[i for i, _ in samples]])
    if not outputs:
        raise ZooError(f"none of {len(rows)} rows shows any of {', '.join(model.outputs)}")

    def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in model.outputs if name in parts[0]}

    features, logits = joined([out.embeddings for out in outputs]), joined([out.logits for out in outputs])
    return Looked(torch.from_numpy(np.concatenate(labels)), features, logits, joined([out.present for out in outputs]))


def macro_f1(labels: np.ndarray, guesses: np.ndarray, classes: int) -> float:
    """The mean of F1 over the classes that occur among labels or guesses."""
    true = np.bincount(labels[labels == guesses], minlength=classes)
    either = np.bincount(labels, minlength=classes) + np.bincount(guesses, minlength=classes)
    there = either > 0
    return float((2 * true[there] / either[there]).mean())


def consistency(right: np.ndarray, of: np.ndarray) -> float:
    """The share of the sentences that are told right of all their rows (Suhr et al., 2019, https://arxiv.org/abs/1811.00491).

    Args:
        right: (n,) in 0..1, how right each row is told.
        of: (n,) int64, the number of its sentence.
    """
    _, place = np.unique(of, return_inverse=True)
    return float((np.bincount(place, right) == np.bincount(place)).mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: how far confidence is from accuracy, over bins of equal width, in 0..1.

    Guo et al., On calibration of modern neural networks, 2017, https://arxiv.org/abs/1706.04599.
    """
    chances = torch.from_numpy(logits).double().softmax(1).numpy()
    sure, right = chances.max(1), chances.argmax(1) == labels
    of = np.minimum((sure * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(of, weights=right - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def entropies(logits: np.ndarray) -> np.ndarray:
    """(n,) of softmax(logits), in nats."""
    log_p = torch.from_numpy(logits).double().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).numpy()


def entropy_and_error(logits: np.ndarray, labels: np.ndarray, shares: int = 10) -> list[dict[str, float]]:
    """The rows in ``shares`` equal parts by rising entropy: of each its rows, its mean entropy in nats, and the share that is wrong."""
    doubt, wrong = entropies(logits), logits.argmax(1) != labels
    parts = [part for part in np.array_split(np.argsort(doubt, kind="stable"), shares) if len(part)]
    return [{"rows": len(part), "entropy": float(doubt[part].mean()), "error": float(wrong[part].mean())} for part in parts]


def modality_gap(features: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    """Distance between the centroids of each two modalities' features (n, D), each row of length 1 first.

    Liang et al., Mind the gap, 2022, https://arxiv.org/abs/2203.02053.
    """
    centroids = {name: F.normalize(x.double(), dim=-1).mean(0) for name, x in features.items()}
    names: Sequence[str] = list(centroids)
    return {(a, b): float((centroids[a] - centroids[b]).norm()) for i, a in enumerate(names) for b in names[i + 1 :]}
