"""A measured number as it travels from evaluation to tables: what was asked, of whom, and how each question was answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

CLASSES = "classes"  # the protocol of classification
ANSWERS = "answers"  # the same, where a class is an answer that more or fewer people gave
LABELLED = (CLASSES, ANSWERS)
DIRECTIONS = {"image_to_text": "from picture to text", "text_to_image": "from text to picture"}  # the protocols of captioned pictures
RERANKED = "reranked"  # in the place of what was shown: the nearest were scored again by a model that reads both at once
_SUBSETS = {"all": "All", "short_query": "Short query", "short_target": "Short target"}
_INPUTS = {"both": "", "all": ""}  # everything is shown, of two modalities or of any number


class Key(NamedTuple):
    """What a metric is of."""

    protocol: str  # "one_target", "multi"; "classes", "answers"; "image_to_text", "text_to_image"
    subset: str  # of the queries: "all", "short_query", "short_target"; "missing_25", "missing_image:50": all, of which shares are hidden;
    # of answers the kind of question; of captioned pictures the split
    input: str  # what the model was shown: "both", "text", "image"; of labelled rows "all", "audio", "audio+image"; "all", "reranked"
    k: int  # an answer counts within the first k; 1 for classes


class Metric(NamedTuple):
    """Recall at k of one system, with that of every query for paired tests; the accuracy of classes, and the soft one of answers."""

    protocol: str
    subset: str
    input: str
    k: int
    recall: float
    low: float
    high: float
    queries: np.ndarray  # (Q,) int64 items or rows
    hits: np.ndarray  # (Q,) float64 in 0..1

    @property
    def key(self) -> Key:
        """What it is of."""
        return Key(self.protocol, self.subset, self.input, self.k)

    def record(self) -> dict[str, Any]:
        """The plain values, for ``metrics.json``; ``queries`` becomes their number."""
        return {name: value for name, value in self._asdict().items() if name != "hits"} | {"queries": len(self.queries)}


def measure_name(protocol: str, k: int) -> str:
    """As tables call it: ``recall@10``, ``accuracy``, ``soft_accuracy``."""
    return {CLASSES: "accuracy", ANSWERS: "soft_accuracy"}.get(protocol, f"recall@{k}")


def place_name(direction: str, split: str, k: int) -> str:
    """A number of captioned pictures, as tables call it: ``from picture to text, test, recall@1``."""
    return f"{DIRECTIONS[direction]}, {split}, {measure_name(direction, k)}"


def missing(rates: float | Mapping[str, float]) -> str:
    """The subset of all rows of which shares in 0..1 are hidden: ``missing_25``, ``missing_image:50,text:25``."""
    return "missing_" + (
        ",".join(f"{name}:{100 * rate:g}" for name, rate in rates.items()) if isinstance(rates, Mapping) else f"{100 * rates:g}"
    )


def subset_name(subset: str) -> str:
    """As tables call it: ``Short query``, ``25 % missing``, ``image 50 %, text 25 % missing``; splits and kinds as they are."""
    if not subset.startswith("missing_"):
        return _SUBSETS.get(subset, subset)
    return ", ".join(f"{share.replace(':', ' ')} %" for share in subset.removeprefix("missing_").split(",")) + " missing"


def input_name(given: str) -> str:
    """As tables call it, empty where everything is shown: ``text only``, ``audio+image only``; ``re-ranked``."""
    return "re-ranked" if given == RERANKED else _INPUTS.get(given, f"{given} only")
