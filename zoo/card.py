"""The page that a model shows on a hub: what it is, how it was measured, how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from zoo.config import hints_of, part_kind, parts_in, settings, split_spec
from zoo.errors import Failure, ZooError
from zoo.metric import ANSWERS, DIRECTIONS, LABELLED, input_name, measure_name
from zoo.registry import Entry, entry
from zoo.types import Classifying

LIBRARY = "multimodal-zoo"
_USE = """## Use

```bash
pip install {library}
```

```python
import zoo

model = zoo.from_pretrained("{repo}")
vectors = model.encode([{{"title": "a red cup", "image": "cup.jpg"}}, {{"title": "only words"}}])
model.similarity(vectors, vectors)
```

A row has any subset of the keys {keys}; a missing key is a missing modality. The vectors have {dim} features and length 1.
"""
_PICTURES = """## Use

```bash
pip install {library}
```

```python
import zoo

model = zoo.from_pretrained("{repo}")
pictures = model.encode([{{"image": "cup.jpg"}}, {{"image": "shoe.jpg"}}])
model.similarity(pictures, model.encode(["a red cup", "a shoe"]))
```

A row has one of the keys {keys}. The vectors have {dim} features and length 1.
"""
_CLASSIFY = """## Use

```bash
pip install {library}
```

```python
import zoo

model = zoo.from_pretrained("{repo}")
chances = model.classify([row, other])  # (2, classes), each row adding up to 1
```

A row has any subset of the keys {keys}; a missing key is a missing modality.
"""
_ANSWERS = "The classes are answers, whose words stand in this order in `answers.json` of the run.\n"


def card(model: Any, run: str | Path | None = None, *, repo: str | None = None, licence: str | None = None) -> str:
    """The page ``README.md`` of a model, with the metadata that the Hugging Face hub reads.

    Args:
        model: As `zoo.types.Model` says, built by `zoo.build`.
        run: The folder of its run, for the recipe and the measured recall; None: neither is shown.
        repo: Where it will lie on the hub, for the title and the example; None: the title is that of the run, or of the model.
        licence: Of these weights, as the hub writes it: ``apache-2.0``. None: the page names none, as the zoo cannot know it.

    Returns:
        Markdown that opens with YAML.

    Raises:
        Failure: If a file of the run is damaged.
        ZooError: If ``run`` holds no recipe.
    """
    recipe, metrics = ("", None) if run is None else _of_run(Path(run))
    title = repo.rpartition("/")[2] if repo else Path(run).resolve().name if run is not None else model.spec["name"]
    keys = model.processor.keys()
    sections = [
        _metadata(model.spec["name"], title, keys, _results(recipe, metrics), licence),
        f"# {title}\n",
        f"{entry('model', model.spec['name']).summary}\n",
        "" if model.trained else "**Its weights are random: nothing was trained or loaded into them.**\n",
        (_CLASSIFY if isinstance(model, Classifying) else _PICTURES if tuple(keys) == ("image", "text") else _USE).format(
            library=LIBRARY, repo=repo or f"org/{title}", keys=", ".join(f"`{key}`" for key in keys), dim=model.dim
        ),
        _ANSWERS if metrics and metrics["main"].get("protocol") == ANSWERS else "",
        _measured(metrics),
        _made_of(model.spec),
        f"## Recipe\n\n```yaml\n{recipe.strip()}\n```\n" if recipe else "",
    ]
    return "\n".join(section for section in sections if section)


def _of_run(run: Path) -> tuple[str, dict[str, Any] | None]:
    """The recipe as it stands in the folder, and its numbers; None before they are measured."""
    recipe, metrics = run / "recipe.yaml", run / "metrics.json"
    if not recipe.is_file():
        raise ZooError(f"no recipe.yaml in {run}: name the run folder that the model comes from")
    if not metrics.is_file():
        return recipe.read_text(encoding="utf-8"), None
    try:
        return recipe.read_text(encoding="utf-8"), json.loads(metrics.read_text(encoding="utf-8"))
    except ValueError as e:
        raise Failure(f"{metrics} is damaged ({e}): measure the run again with: zoo run") from e


def _records(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was measured of the model itself, not of its baselines."""
    return metrics["arms"][metrics["main"]["arm"]]["records"]


def _results(recipe: str, metrics: Mapping[str, Any] | None) -> list[EvalResult]:
    """One result of the model index for each number of all pairs with every modality shown, which is what a model is compared by."""
    if metrics is None:
        return []
    said = yaml.safe_load(recipe)
    data, _ = split_spec(said["data"])
    results = []
    for record in _records(metrics):
        classes, captions, answers = (record["protocol"] in of for of in (LABELLED, DIRECTIONS, (ANSWERS,)))
        if (record["subset"] == "all" or captions) and not input_name(record["input"]):
            task = "image-text retrieval" if captions else "multimodal classification" if classes else "item-to-item retrieval"
            task = "visual question answering" if answers else task
            results.append(
                EvalResult(
                    task_type="visual-question-answering" if answers else "classification" if classes else "retrieval",
                    task_name=task,
                    dataset_type=data,
                    dataset_name=data,
                    dataset_split=record["subset"] if captions else said["classify" if classes else "evaluate"]["split"],
                    metric_type=measure_name(record["protocol"], record["k"]).replace("@", "_at_"),
                    metric_name="VQA accuracy" if answers else "Accuracy" if classes else f"Recall@{record['k']} ({record['protocol']})",
                    metric_value=round(record["recall"], 4),
                )
            )
    return results


def _metadata(name: str, title: str, keys: Sequence[str], results: list[EvalResult], licence: str | None) -> str:
    """What the hub sorts and filters by."""
    sees = ["text", "image"] if "image" in keys else ["text"]
    data = ModelCardData(
        library_name=LIBRARY,
        tags=[LIBRARY, name, "item-embeddings", "retrieval", *sees],
        pipeline_tag="feature-extraction",
        license=licence,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _measured(metrics: Mapping[str, Any] | None) -> str:
    """Every number of the model, and what it was compared with."""
    if metrics is None:
        return ""
    rows = [
        [
            *(r[key] for key in ("protocol", "subset", "input", "k")),
            f"{r['recall']:.3f}",
            f"{r['low']:.3f} to {r['high']:.3f}",
            r["queries"],
        ]
        for r in _records(metrics)
    ]
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    head = "| protocol | subset | input | k | recall | 95 % interval | queries |\n|---|---|---|---|---|---|---|"
    return "\n".join(["## Measured\n", f"`{metrics['verdict']}`\n", head, *lines, ""])


def _made_of(spec: Mapping[str, Any]) -> str:
    """The parts of the model, those of its defaults included, with their papers, and the licences of what they load."""
    model = entry("model", spec["name"])
    hints = hints_of(model.maker)
    found = {("model", model.name): model}
    for key, parameter in settings(model.maker).items():
        if (kind := part_kind(hints.get(key))) is not None:
            found |= {(kind, part.name): part for part in _named(kind, hints.get(key), spec.get(key, parameter.default))}
    lines = [
        f"- {p.kind} `{p.name}`" + "".join(f"; {says}" for says in (p.paper, p.licence and f"licence {p.licence}") if says)
        for p in found.values()
    ]
    return "\n".join(["## Parts\n", *lines, ""])


def _named(kind: str, hint: Any, value: Any) -> list[Entry]:
    """The parts that one setting names."""
    return [entry(kind, split_spec(spec)[0].partition(":")[0]) for spec in parts_in(hint, value).values()]
