"""The whole way of a recipe: data, training, evaluation against baselines, report; and each stretch of it by itself."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from zoo.adapters import count
from zoo.config import hints_of, split_spec
from zoo.errors import ZooError, unknown
from zoo.evaluate.gradients import gradient_shares
from zoo.evaluate.verdict import compare, verdict
from zoo.files import write_json
from zoo.hub import load
from zoo.metric import DIRECTIONS, Key, Metric, measure_name
from zoo.questions import ask, ask_classic, check_questions, main_key, questions, split_of
from zoo.recipe import Recipe, arm, load_recipe, values
from zoo.registry import entry, make
from zoo.report import examples, report
from zoo.train import train
from zoo.types import CaptionedData, Data, LabelledData, PairData

logger = logging.getLogger("zoo.run")
_MEASURED = ("evaluate", "classify", "retrieve", "data", "floor", "seed")


class Arm(NamedTuple):
    """One system and how it did."""

    metrics: list[Metric]
    parameters: int  # trained ones; 0 for a classic baseline
    seconds: float  # of training
    vectors: np.ndarray | None  # (N, D) of its items, both modalities shown; None for a classic baseline and for other data
    more: Mapping[str, Any]  # of classes and of captioned pictures, as `Answer` says
    files: Mapping[str, Any]  # likewise


@runtime_checkable
class _Giving(Protocol):
    """A class of models all of which give the same embeddings."""

    outputs: Sequence[str]


class Outcome(NamedTuple):
    """What a run came to."""

    folder: Path
    recall: float  # the headline number; of classes the accuracy
    verdict: str  # against the baselines; without any, the number alone
    missed: list[str]  # quality floors that were not reached, in words
    metrics: Mapping[str, Any]  # as in metrics.json


def evaluate(
    run: str | Path | nn.Module, *, loaded: Data | None = None, data_root: str | Path | None = None, recipe: Any = None, **keywords: Any
) -> list[Metric]:
    """Recall of a trained model, of items or of pictures and texts, or the accuracy of one that tells classes, as its recipe says.

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
    if not isinstance(run, nn.Module):
        check_unseen(run, settings, data, data_root)
    return ask(model, data, settings).metrics


def check_unseen(folder: str | Path, settings: Recipe, data: Data, data_root: str | Path | None) -> None:
    """Whether the rows to be asked about are none that a run was trained on, its splits having been dealt anew: another rotation.

    Args:
        folder: The run.
        settings: To evaluate by.
        data: What they name.
        data_root: The folder that holds the folders of data sets.

    Raises:
        ZooError: If any of them was. Not where the split to be measured is called ``train``.
    """
    written = Path(folder) / "recipe.yaml"
    if isinstance(data, PairData) or not written.is_file():
        return
    own = load_recipe(written)
    if own.data == settings.data or split_spec(own.data)[0] != split_spec(settings.data)[0]:
        return
    splits = settings.retrieve.splits if isinstance(data, CaptionedData) else (settings.classify.split,)
    learned = set(_names(load_data(own, data_root), "train"))
    for split in splits:
        asked = _names(data, split)
        if split != "train" and (seen := sum(name in learned for name in asked)):
            of = "pictures" if isinstance(data, CaptionedData) else "rows"
            raise ZooError(
                f"data: under these settings, {seen} of the {len(asked)} {of} of split {split!r} are among those that {folder} was trained"
                " on: leave out what deals the splits anew (seed, data.seed, data.rotation, data.splits, data.unseen_style)"
            )


def _names(data: Data, split: str) -> list[Any]:
    """Of the rows, or the pictures, of a split."""
    assert not isinstance(data, PairData), "check_unseen leaves them out"
    if isinstance(data, CaptionedData):
        return [data.picture_ids[i] for i in np.unique(data.pairs(split)[:, 0]).tolist()]
    return [data.row_ids[int(i)] for i in data.split(split)]


def evaluation(recipe: Any, *overrides: str, **keywords: Any) -> Recipe:
    """The recipe of a trained model, under overrides of what is measured.

    Args:
        recipe: A file, the name of a shipped recipe, a mapping or a `Recipe`.
        *overrides: ``"evaluate.split=val"``; of ``evaluate``, ``classify``, ``retrieve``, ``data``, ``floor``, ``seed``; the rest is
            in the weights.
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


def load_data(recipe: Recipe, data_root: str | Path | None = None) -> Data:
    """The data set of a recipe; pairs that are not given are mined now."""
    return make("data", recipe.data, Path(data_root) if data_root is not None else None)


def load_pairs(recipe: Recipe, what: str, data_root: str | Path | None = None) -> PairData:
    """The same, for ``what`` is of items only.

    Raises:
        ZooError: If the data set is of labelled rows, or of pictures and texts.
    """
    data = load_data(recipe, data_root)
    if isinstance(data, LabelledData):
        raise ZooError(f"{what} is for models of items, and this run's data are labelled rows: its report says what each modality is worth")
    if not isinstance(data, PairData):
        raise ZooError(f"{what} is for models of items, and this run's data are pictures with texts: its report says what they find")
    return data


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
    arms = {name: train_and_measure(recipe, data, data_root=data_root, fresh=fresh)}
    for baseline, says in recipe.baselines.items():
        if isinstance(says, str):
            arms[baseline] = measure_classic(says, data, recipe)
        else:
            arms[baseline] = train_and_measure(trained[baseline], seen[baseline], data_root=data_root, fresh=fresh)
    return _written(recipe, name, data, arms)


def _check_arm(name: str, recipe: Recipe, data: Data, own: Recipe, seen: Data) -> None:
    """Whether an arm answers the questions of its run: the verdict compares question by question."""
    for section in ("evaluate", "classify", "retrieve"):
        if values(own)[section] != values(recipe)[section]:
            raise ZooError(
                f"baselines.{name}: it changes {section!r}, and arms are compared on the same queries: change it for the whole recipe"
            )
    if questions(own, seen) != questions(recipe, data):
        raise ZooError(
            f"baselines.{name}: its 'data' has other rows, pairs or candidates in split {split_of(recipe, data)!r}, and arms are compared "
            "on the same queries: change 'data' for the whole recipe, or only what is shown of the rows"
        )


def train_and_measure(recipe: Recipe, data: Data, *, data_root: str | Path | None = None, fresh: bool = False) -> Arm:
    """Train an arm, from its last checkpoint on if there is one, and measure it on the modalities that its own data shows.

    Args:
        recipe: Of the arm.
        data: Its data set.
        data_root: The folder that holds the folders of data sets, for a stage in ``init_from`` on another one.
        fresh: Throw away what the run folder holds of an earlier run.

    Raises:
        Failure: If a loss is not finite or a checkpoint is damaged.
        ZooError: On a fault of the recipe or the data.
    """
    _check_vectors(recipe, data)
    model = train(recipe, loaded=data, data_root=data_root, fresh=fresh)
    found = ask(model, data, recipe)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad) + (count(recipe.out) if recipe.adapters else 0)
    parameters = 0 if recipe.run.steps == 0 else parameters
    more = {**found.more, **_gradients(model, recipe)} if isinstance(data, LabelledData) and recipe.run.log_gradients else found.more
    return Arm(found.metrics, parameters, _seconds(recipe.out), found.vectors, more, found.files)


def _check_vectors(recipe: Recipe, data: Data) -> None:
    """Whether pictures and texts can be sought by what a model gives, as far as its class says: before it and its stages are trained."""
    name = split_spec(recipe.model)[0]
    made = hints_of(entry("model", name).maker).get("return")
    if isinstance(data, CaptionedData) and isinstance(made, _Giving) and (lost := {"image", "text"}.difference(made.outputs)):
        raise ZooError(
            f"model: {name} gives no vectors of {' and '.join(sorted(lost))}, so there is nothing to retrieve: zoo train is the command "
            "that trains it, and measures nothing"
        )


def _gradients(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Whom the gradient reached over the training: on average, and step by step."""
    shares = gradient_shares(model, _log(recipe.out))
    return {"gradient_share": shares["mean"], "gradients": {"steps": shares["steps"], "shares": shares["shares"]}}


def measure_classic(name: str, data: Data, recipe: Recipe) -> Arm:
    """Measure ``bm25`` or ``popularity``, for which nothing is trained.

    Raises:
        ZooError: If the data cannot answer what the recipe measures.
    """
    return Arm(ask_classic(name, data, recipe).metrics, 0, 0.0, None, {}, {})


def _seconds(folder: Path) -> float:
    """Of the whole training, which may have been interrupted or done in an earlier call."""
    lines = _log(folder)
    return float(lines[-1]["seconds"]) if lines else 0.0


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _written(recipe: Recipe, name: str, data: Data, arms: Mapping[str, Arm]) -> Outcome:
    """metrics.json, examples.json, report.html, and the one line."""
    main = main_key(recipe, data)
    measure = measure_name(main.protocol, main.k)
    hits = {arm: headline(found.metrics, main).hits for arm, found in arms.items()}
    recall = float(hits[name].mean())
    others = [arm for arm in arms if arm != name]
    comparisons = compare(name, others, hits, seed=recipe.seed) if others else []
    line = (
        verdict(measure, comparisons)
        if comparisons
        else f"{measure.partition('@')[0].upper()}: {measure}={recall:.3f} | no baselines in this recipe"
    )
    metrics = {
        "arms": {
            arm: {"records": [m.record() for m in found.metrics], "seconds": round(found.seconds, 1), "parameters": found.parameters}
            | dict(found.more)
            for arm, found in arms.items()
        },
        "main": {"arm": name, **main._asdict()},
        "verdict": line,
        "comparisons": [{**c._asdict(), "outcome": c.outcome} for c in comparisons],
        "data": {**data.statistics, "broken_images" if isinstance(data, PairData) else "broken": list(data.broken)},
        "machine": machine() | {"seed": recipe.seed},
    }
    write_json(recipe.out / "metrics.json", metrics)
    for file, content in arms[name].files.items():
        write_json(recipe.out / file, content)
    vectors = arms[name].vectors
    if recipe.evaluate.examples and vectors is not None and isinstance(data, PairData):
        queries = np.unique(data.pairs(recipe.evaluate.split)[:, 0])
        drawn = np.random.default_rng(recipe.seed).choice(queries, min(recipe.evaluate.examples, len(queries)), replace=False)
        shown = min(5, len(data.pool(recipe.evaluate.split)) - 1)
        write_json(recipe.out / "examples.json", examples(data, vectors, drawn, shown, split=recipe.evaluate.split))
    report(recipe.out)
    return Outcome(recipe.out, recall, line, missed_floors(recipe, arms[name].metrics, main), metrics)


def headline(metrics: Sequence[Metric], main: Key) -> Metric:
    """The metric that a run is judged by."""
    return next(m for m in metrics if m.key == main)


def missed_floors(recipe: Recipe, metrics: Sequence[Metric], main: Key) -> list[str]:
    """Which of the recipe's quality floors the headline metric did not reach, in words; of captioned pictures in either direction."""
    missed = []
    for protocol in DIRECTIONS if main.protocol in DIRECTIONS else (main.protocol,):
        of = f"{DIRECTIONS[protocol]}, " if protocol in DIRECTIONS else ""
        at = {measure_name(m.protocol, m.k): m.recall for m in metrics if m.key == main._replace(k=m.k, protocol=protocol)}
        missed += [f"{of}{key} is {at[key]:.3f}, below the floor {floor}" for key, floor in recipe.floor.items() if at[key] < floor]
    return missed


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
