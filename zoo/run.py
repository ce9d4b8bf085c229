"""The whole way of a recipe: data, training, evaluation against baselines, report; and each stretch of it by itself."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from zoo.adapters import count
from zoo.errors import ZooError, unknown
from zoo.evaluate.baselines import bm25, popularity
from zoo.evaluate.retrieval import Input, Metric, Scorer, embedding_scorer, measure, tasks
from zoo.evaluate.verdict import compare, verdict
from zoo.files import write_json
from zoo.hub import load
from zoo.models._encode import progress
from zoo.recipe import Evaluate, Recipe, arm, load_recipe
from zoo.registry import make
from zoo.report import examples, report
from zoo.train import train
from zoo.types import PairData, Row

logger = logging.getLogger("zoo.run")
_MEASURED = ("evaluate", "data", "floor", "seed")
_TEXT = ("title", "topic", "content")
_CLASSIC = {"bm25": bm25, "popularity": popularity}


class Arm(NamedTuple):
    """One system and how it did."""

    metrics: list[Metric]
    parameters: int  # trained ones; 0 for a classic baseline
    seconds: float  # of training
    vectors: np.ndarray | None  # (N, D) of its items, both modalities shown; None for a classic baseline


class Outcome(NamedTuple):
    """What a run came to."""

    folder: Path
    recall: float  # the headline number
    verdict: str  # against the baselines; without any, the number alone
    missed: list[str]  # quality floors that were not reached, in words
    metrics: Mapping[str, Any]  # as in metrics.json


class Shown(Sequence[Row]):
    """Rows of a data set of which only some modalities are shown."""

    def __init__(self, notes: Sequence[Row], input: Input) -> None:
        self.notes, self.input = notes, input

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, index: Any) -> Any:
        row = self.notes[index]
        if self.input == "text":
            row = {k: v for k, v in row.items() if k != "image"}
        elif self.input == "image":
            row = {k: v for k, v in row.items() if k not in _TEXT}
        return row


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


def evaluate(
    run: str | Path | nn.Module, *, loaded: PairData | None = None, data_root: str | Path | None = None, recipe: Any = None, **keywords: Any
) -> list[Metric]:
    """Recall of a trained model, as its recipe says.

    Args:
        run: A run folder, or a model together with ``recipe``.
        loaded: The recipe's data set, where it is loaded already.
        data_root: The folder that holds the folders of data sets.
        recipe: In the place of the run folder's own.
        **keywords: Overrides of what is measured, as in `evaluation`: ``evaluate__split="val"``.

    Returns:
        One `Metric` per protocol, subset, input and k.

    Raises:
        ZooError: If there is no such run, or a fault in the recipe or the data.
    """
    if recipe is None and isinstance(run, nn.Module):
        raise ZooError("evaluate(model) needs the recipe that names the data: evaluate(model, recipe=...)")
    model = run if isinstance(run, nn.Module) else load(run)
    settings = evaluation(recipe if recipe is not None else Path(run) / "recipe.yaml", **keywords)  # type: ignore[arg-type]
    data = load_data(settings, data_root) if loaded is None else loaded
    check_questions(settings, data)
    return measure_model(model, data, settings)[0]


def evaluation(recipe: Any, *overrides: str, **keywords: Any) -> Recipe:
    """The recipe of a trained model, under overrides of what is measured.

    Args:
        recipe: A file, the name of a shipped recipe, a mapping or a `Recipe`.
        *overrides: ``"evaluate.split=val"``; of ``evaluate``, ``data``, ``floor`` and ``seed``, the rest having gone into the weights.
        **keywords: The same from Python, ``evaluate__split="val"``.

    Raises:
        ZooError: On an override of anything else, or a fault of the recipe.
    """
    keys = [override.partition("=")[0] for override in overrides] + [key.replace("__", ".") for key in keywords]
    sections = {key: key.partition(".")[0] for key in keys}
    faults = [f"override {k!r}: {unknown('section to evaluate by', s, _MEASURED)}" for k, s in sections.items() if s not in _MEASURED]
    if faults:
        raise ZooError("\n".join([*faults, "what a model was trained with stays as it is: train another one"]))
    return load_recipe(recipe, *overrides, **keywords)


def load_data(recipe: Recipe, data_root: str | Path | None = None) -> PairData:
    """The data set of a recipe; pairs that are not given are mined now."""
    return make("data", recipe.data, Path(data_root) if data_root is not None else None)


def check_questions(recipe: Recipe, data: PairData) -> None:
    """Whether the data can answer what the recipe will measure; asked before hours of training, not after.

    Raises:
        ZooError: If it has no such split, no pairs in it, or too few candidates for a k.
    """
    for protocol in recipe.evaluate.protocols:
        tasks(data, split=recipe.evaluate.split, protocol=protocol, ks=recipe.evaluate.k)


def measure_model(model: nn.Module, data: PairData, recipe: Recipe) -> tuple[list[Metric], np.ndarray]:
    """Every metric that the recipe asks for, and the vectors (N, D) of the items that it asks about with both modalities shown.

    An input of which the model sees nothing on any item, images for a model without eyes, has no metric, nor has one that hides nothing
    from it: text for the same model.
    """
    metrics: list[Metric] = []
    vectors: dict[Input, np.ndarray] = {}
    inputs: tuple[Input, ...] = ("both", *recipe.evaluate.inputs)
    split = recipe.evaluate.split
    asked = np.union1d(data.pool(split), data.pairs(split))
    for shown in dict.fromkeys(inputs):
        vectors[shown] = embed(model, Shown(data.notes, shown), batch_size=recipe.evaluate.batch_size, only=asked)
        same = shown != "both" and np.array_equal(vectors[shown], vectors["both"])
        if shown == "both" and not vectors[shown].any():
            raise ZooError("this model sees nothing of any item: give it data whose data.inputs it looks at")
        if vectors[shown].any() and not same:
            metrics += _measure(embedding_scorer(vectors[shown]), data, recipe, shown)
    return metrics, vectors["both"]


def _measure(scorer: Scorer, data: PairData, recipe: Recipe, shown: Input = "both") -> list[Metric]:
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


def run(recipe: Any, *overrides: str, data_root: str | Path | None = None, fresh: bool = False, **keywords: Any) -> Outcome:
    """Mine, train, evaluate, report: the recipe's model and every baseline it names, on the same data.

    Everything stands in the run folder afterwards: the model, ``metrics.json``, ``examples.json``, ``report.html``. Arms that are
    trained already are not trained again.

    Args:
        recipe: A file, the name of a shipped recipe, a mapping or a `Recipe`.
        *overrides: ``"optimizer.lr=3e-5"``.
        data_root: The folder that holds the folders of data sets.
        fresh: Throw away what the run folder holds of an earlier run.
        **keywords: Overrides from Python, ``optimizer__lr=3e-5``.

    Raises:
        Failure: If a loss is not finite or a checkpoint is damaged.
        ZooError: On a fault of the recipe or the data.
    """
    recipe = load_recipe(recipe, *overrides, **keywords)
    name = recipe.out.name
    if name in recipe.baselines:
        raise ZooError(f"baselines: {name!r} is the name of the run folder, and so of the model itself; rename one")
    data = load_data(recipe, data_root)
    check_questions(recipe, data)
    trained = {baseline: arm(recipe, baseline) for baseline, says in recipe.baselines.items() if not isinstance(says, str)}
    seen = {baseline: data if own.data == recipe.data else load_data(own, data_root) for baseline, own in trained.items()}
    for baseline, own in trained.items():
        _check_arm(baseline, recipe, data, own, seen[baseline])
    arms = {name: train_and_measure(recipe, data, fresh=fresh)}
    for baseline, says in recipe.baselines.items():
        if isinstance(says, str):
            arms[baseline] = measure_classic(says, data, recipe)
        else:
            arms[baseline] = train_and_measure(trained[baseline], seen[baseline], fresh=fresh)
    return _written(recipe, name, data, arms)


def _check_arm(name: str, recipe: Recipe, data: PairData, own: Recipe, seen: PairData) -> None:
    """Whether an arm answers the questions of its run: the verdict compares query by query."""
    if own.evaluate != recipe.evaluate:
        raise ZooError(
            f"baselines.{name}: it changes 'evaluate', and arms are compared on the same queries: change it for the whole recipe"
        )
    split = recipe.evaluate.split
    same = list(seen.note_ids) == list(data.note_ids) and all(
        np.array_equal(a, b) for a, b in ((seen.pairs(split), data.pairs(split)), (seen.pool(split), data.pool(split)))
    )
    if not same:
        raise ZooError(
            f"baselines.{name}: its 'data' has other notes, pairs or candidates in split {split!r}, and arms are compared on the same "
            "queries: change 'data' for the whole recipe, or only data.inputs"
        )


def train_and_measure(recipe: Recipe, data: PairData, *, fresh: bool = False) -> Arm:
    """Train an arm, from its last checkpoint on if there is one, and measure it on the modalities that its own data shows.

    Raises:
        Failure: If a loss is not finite or a checkpoint is damaged.
        ZooError: On a fault of the recipe or the data.
    """
    model = train(recipe, loaded=data, fresh=fresh)
    metrics, vectors = measure_model(model, data, recipe)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) + (count(recipe.out) if recipe.adapters else 0)
    parameters = 0 if recipe.run.steps == 0 else parameters
    return Arm(metrics, parameters, _seconds(recipe.out), vectors)


def measure_classic(name: str, data: PairData, recipe: Recipe) -> Arm:
    """Measure ``bm25`` or ``popularity``, for which nothing is trained.

    Raises:
        ZooError: If the data cannot answer what the recipe measures.
    """
    return Arm(_measure(_CLASSIC[name](data), data, recipe), 0, 0.0, None)


def _seconds(folder: Path) -> float:
    """Of the whole training, which may have been interrupted or done in an earlier call."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0


def _written(recipe: Recipe, name: str, data: PairData, arms: Mapping[str, Arm]) -> Outcome:
    """metrics.json, examples.json, report.html, and the one line."""
    main = recipe.evaluate.main
    hits = {arm: headline(found.metrics, recipe.evaluate).hits for arm, found in arms.items()}
    recall = float(hits[name].mean())
    others = [arm for arm in arms if arm != name]
    comparisons = compare(name, others, hits, seed=recipe.seed) if others else []
    line = verdict(main.k, comparisons) if comparisons else f"RECALL: recall@{main.k}={recall:.3f} | no baselines in this recipe"
    metrics = {
        "arms": {
            arm: {"records": [m.record() for m in found.metrics], "seconds": round(found.seconds, 1), "parameters": found.parameters}
            for arm, found in arms.items()
        },
        "main": {"arm": name, "protocol": main.protocol, "subset": "all", "input": "both", "k": main.k},
        "verdict": line,
        "comparisons": [{**c._asdict(), "outcome": c.outcome} for c in comparisons],
        "data": {**data.statistics, "broken_images": list(data.broken)},
        "machine": machine() | {"seed": recipe.seed},
    }
    write_json(recipe.out / "metrics.json", metrics)
    vectors = arms[name].vectors
    if recipe.evaluate.examples and vectors is not None:
        queries = np.unique(data.pairs(recipe.evaluate.split)[:, 0])
        drawn = np.random.default_rng(recipe.seed).choice(queries, min(recipe.evaluate.examples, len(queries)), replace=False)
        shown = min(5, len(data.pool(recipe.evaluate.split)) - 1)
        write_json(recipe.out / "examples.json", examples(data, vectors, drawn, shown, split=recipe.evaluate.split))
    report(recipe.out)
    return Outcome(recipe.out, recall, line, missed_floors(recipe, arms[name].metrics), metrics)


def headline(metrics: Sequence[Metric], settings: Evaluate, k: int | None = None) -> Metric:
    """The metric that a run is judged by, at the headline's k or another: all pairs, both modalities shown."""
    wanted = (settings.main.protocol, "all", "both", settings.main.k if k is None else k)
    return next(m for m in metrics if (m.protocol, m.subset, m.input, m.k) == wanted)


def missed_floors(recipe: Recipe, metrics: Sequence[Metric]) -> list[str]:
    """Which of the recipe's quality floors the headline metric did not reach, in words."""
    found = {key: headline(metrics, recipe.evaluate, int(key.partition("@")[2])).recall for key in recipe.floor}
    return [f"{key} is {found[key]:.3f}, below the floor {floor}" for key, floor in recipe.floor.items() if found[key] < floor]


def machine() -> dict[str, Any]:
    """What the numbers of this run were made on."""
    from importlib.metadata import version

    return {
        "processor": platform.processor() or platform.machine(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "timm", "multimodal-zoo")},
    }
