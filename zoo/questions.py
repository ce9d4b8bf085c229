"""What a recipe asks of a model on its data, and the answers: retrieval where these are pairs, classes where they are labelled rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from zoo import caption_questions
from zoo.answers import AnsweredData
from zoo.errors import ZooError, unknown
from zoo.evaluate import captioned, classification
from zoo.evaluate.baselines import bm25, popularity
from zoo.evaluate.modalities import Altered
from zoo.evaluate.retrieval import Input, Scorer, embedding_scorer, measure, tasks
from zoo.evaluate.vqa import People
from zoo.metric import CLASSES, Key, Metric, measure_name
from zoo.models._encode import progress
from zoo.recipe import Recipe
from zoo.sections import Classify, Evaluate, Retrieve
from zoo.types import CaptionedData, Data, LabelledData, PairData, Row

HIDDEN: Mapping[str, tuple[str, ...]] = {"both": (), "text": ("image",), "image": ("title", "topic", "content")}  # by what is shown
_SECTIONS: Mapping[str, Evaluate | Classify | Retrieve] = {"evaluate": Evaluate(), "classify": Classify(), "retrieve": Retrieve()}
_OF = {"evaluate": "pairs", "classify": "labelled rows", "retrieve": "pictures with texts"}
_CLASSIC = {"bm25": bm25, "popularity": popularity}


class Answer(NamedTuple):
    """How a model did."""

    metrics: list[Metric]
    vectors: np.ndarray | None = None  # (N, D) of the items that were asked about, both modalities shown
    more: Mapping[str, Any] = {}  # of classes as `zoo.evaluate.classification.details` says, of captions as `zoo.caption_questions.ask`
    files: Mapping[str, Any] = {}  # by name, what a run leaves besides: examples of captioned pictures, the words of answers


def embed(
    model: Any, notes: Sequence[Row], *, batch_size: int = 256, show_progress: bool | None = None, only: np.ndarray | None = None
) -> np.ndarray:
    """Vectors of all items, (N, D) float32 of length 1; an item of which this model sees nothing gets the zero vector.

    Args:
        model: Has ``encode`` and ``processor``.
        notes: Rows, each read once.
        batch_size: Rows at a time.
        show_progress: None: a bar when there are many rows and somebody watches.
        only: (n,) int64 items to embed, the rest gets the zero vector too; None: all.
    """
    vectors = np.zeros((len(notes), model.dim), dtype=np.float32)
    wanted = np.arange(len(notes)) if only is None else only
    for start in progress(range(0, len(wanted), batch_size), "embedding", show_progress):
        here = wanted[start : start + batch_size]
        rows = [notes[int(i)] for i in here]
        seen = [i for i, row in enumerate(rows) if model.processor.sees(row)]
        if seen:
            vectors[here[seen]] = model.encode([rows[i] for i in seen], batch_size, False)
    return vectors


def check_questions(recipe: Recipe, data: Data) -> None:
    """Whether the data can answer what the recipe will measure; asked before hours of training, not after.

    Raises:
        ZooError: If it has no such split, nothing in it, or too few candidates for a k; or if the recipe measures another kind of data.
    """
    own = section_of(data)
    for section, default in _SECTIONS.items():
        if section != own and getattr(recipe, section) != default:
            says = f"{section}: the data set is of {_OF[own]}, of which {own!r} says what is measured"
            raise ZooError(f"{says}: write that, and leave this out")
    ks = recipe.retrieve.k if own == "retrieve" else recipe.evaluate.k
    floors = [measure_name(main_key(recipe, data).protocol, 1)] if own == "classify" else [f"recall@{k}" for k in ks]
    if lost := [key for key in recipe.floor if key not in floors]:
        raise ZooError("\n".join(f'floor: {unknown("metric", key, floors)}, or write "floor={{}}" for none' for key in lost))
    if isinstance(data, PairData):
        for protocol in recipe.evaluate.protocols:
            tasks(data, split=recipe.evaluate.split, protocol=protocol, ks=recipe.evaluate.k)
        return
    if classic := [name for name, says in recipe.baselines.items() if isinstance(says, str)]:
        has = "classes have none" if isinstance(data, LabelledData) else "the words of a picture are what is sought"
        raise ZooError(f"baselines.{classic[0]}: {recipe.baselines[classic[0]]} searches items by words or clicks; {has}")
    if isinstance(data, LabelledData):
        classification.check(data, recipe.classify)
    else:
        captioned.check(data, recipe.retrieve)


def section_of(data: Data) -> str:
    """The section of a recipe that says what is measured of a data set: ``evaluate``, ``classify``, ``retrieve``."""
    return "classify" if isinstance(data, LabelledData) else "retrieve" if isinstance(data, CaptionedData) else "evaluate"


def ask(model: nn.Module, data: Data, recipe: Recipe) -> Answer:
    """Every metric that the recipe asks for.

    An input of which the model sees nothing on any item, images for a model without eyes, has no metric of retrieval, nor has one that
    hides nothing from it: text for the same model.

    Raises:
        ZooError: If the model sees nothing of any row, or has no logits of classes.
    """
    if isinstance(data, LabelledData):
        graded = _graded(data)
        files = {} if graded is None else {"answers.json": {"classes": list(data.classes)}}
        return Answer(*classification.measure(model, data, recipe.classify, seed=recipe.seed, grading=graded), files)
    if isinstance(data, CaptionedData):
        answered = caption_questions.ask(model, data, recipe.retrieve, seed=recipe.seed)
        return Answer(answered.metrics, None, answered.more, answered.files)
    metrics: list[Metric] = []
    vectors: dict[Input, np.ndarray] = {}
    inputs: tuple[Input, ...] = ("both", *recipe.evaluate.inputs)
    split = recipe.evaluate.split
    asked = np.union1d(data.pool(split), data.pairs(split))
    for shown in dict.fromkeys(inputs):
        rows = Altered(data.notes, hidden=HIDDEN[shown])
        vectors[shown] = embed(model, rows, batch_size=recipe.evaluate.batch_size, only=asked)
        same = shown != "both" and np.array_equal(vectors[shown], vectors["both"])
        if shown == "both" and not vectors[shown].any():
            raise ZooError("this model sees nothing of any item: give it data whose data.inputs it looks at")
        if vectors[shown].any() and not same:
            metrics += _recalls(embedding_scorer(vectors[shown]), data, recipe, shown)
    return Answer(metrics, vectors["both"])


def _graded(data: LabelledData) -> People | None:
    """How right guesses are; None: by the label alone."""
    return People(data) if isinstance(data, AnsweredData) else None


def _protocol(graded: People | None) -> str:
    return CLASSES if graded is None else graded.protocol


def ask_classic(name: str, data: Data, recipe: Recipe) -> Answer:
    """The same of ``bm25`` or ``popularity``, for which nothing is trained.

    Raises:
        ZooError: If the data cannot answer what the recipe measures.
    """
    assert isinstance(data, PairData), "check_questions refuses the others"
    return Answer(_recalls(_CLASSIC[name](data), data, recipe))


def _recalls(scorer: Scorer, data: PairData, recipe: Recipe, shown: Input = "both") -> list[Metric]:
    settings = recipe.evaluate
    found = [
        metric
        for protocol in settings.protocols
        for metric in measure(
            scorer,
            data,
            split=settings.split,
            protocol=protocol,
            ks=settings.k,
            input=shown,
            resamples=settings.bootstrap,
            seed=recipe.seed,
        )
    ]
    return [m for m in found if settings.subsets or m.subset == "all"]


def main_key(recipe: Recipe, data: Data) -> Key:
    """The metric that a model is judged by: all questions, everything shown."""
    if isinstance(data, LabelledData):
        return Key(_protocol(_graded(data)), "all", "all", 1)
    if isinstance(data, CaptionedData):
        return Key(recipe.retrieve.main.direction, recipe.retrieve.splits[0], "all", recipe.retrieve.main.k)
    return Key(recipe.evaluate.main.protocol, "all", "both", recipe.evaluate.main.k)


def split_of(recipe: Recipe, data: Data) -> str:
    """Which part of the data the questions are about."""
    if isinstance(data, CaptionedData):
        return recipe.retrieve.splits[0]
    return recipe.classify.split if isinstance(data, LabelledData) else recipe.evaluate.split


def questions(recipe: Recipe, data: Data) -> dict[str, str]:
    """{"multi/all": digest}: what was sought among what. Answers are pairs, question by question, where the digests agree."""
    if isinstance(data, LabelledData):
        digest = hashlib.sha256(json.dumps([list(data.row_ids), data.classes, data.modalities], default=str).encode())
        rows = data.split(recipe.classify.split)
        digest.update(rows.tobytes() + data.labels[rows].tobytes())
        subsets, graded = classification.asked(recipe.classify), _graded(data)
        if graded is not None:
            subsets += graded.subsets(rows)
            digest.update(json.dumps([[graded.data.answers[i], graded.data.kinds[i]] for i in rows.tolist()]).encode())
        return dict.fromkeys((f"{_protocol(graded)}/{subset}" for subset in subsets), digest.hexdigest())
    if isinstance(data, CaptionedData):
        return caption_questions.digests(data, recipe.retrieve)
    asked, digests = recipe.evaluate, {}
    for protocol in asked.protocols:
        for subset, task in tasks(data, split=asked.split, protocol=protocol, ks=asked.k).items():
            digest = hashlib.sha256(json.dumps(list(data.note_ids), default=str).encode())
            digest.update(task.pairs.tobytes() + task.candidates.tobytes())
            digests[f"{protocol}/{subset}"] = digest.hexdigest()
    return digests
