"""One page that says what a run did and whether it was worth it: readable offline, in any browser, in ten years."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from zoo.checkpoint import checkpoints
from zoo.errors import ZooError
from zoo.evaluate import caption_tables, class_plots, diagnosis_plots, plots
from zoo.evaluate.retrieval import topk
from zoo.files import write_bytes, write_text
from zoo.metric import DIRECTIONS, LABELLED, Key, input_name, measure_name, place_name, subset_name
from zoo.source import Source
from zoo.thumbnail import thumbnail
from zoo.types import PairData, Row

logger = logging.getLogger("zoo.report")
_TEMPLATE = Path(__file__).with_name("report.html")


def report(folder: Path) -> Path:
    """Write ``report.html`` from what a run left in ``folder``, and its pictures as ``plots/*.png``.

    The page is one file: pictures are inside it, nothing is loaded and no script runs. What the run did not leave (no
    examples, no evaluation yet) has no section. That a training has not ended is said in it, and logged.

    Args:
        folder: Holds any of ``recipe.yaml``, ``log.jsonl``, ``metrics.json``, ``examples.json``, ``diagnosis.json``, ``arms/*/log.jsonl``.

    Returns:
        The page.

    Raises:
        ZooError: If there is none of these, or one cannot be read.
    """
    metrics = _read_json(folder / "metrics.json") or {}
    recipe = folder / "recipe.yaml"
    logs = _logs(folder, metrics)
    if not (metrics or logs or recipe.is_file()):
        raise ZooError(f"{folder} holds no run: expected recipe.yaml, log.jsonl or metrics.json in it")
    unfinished = [] if metrics else _unfinished(folder)
    for says in unfinished:
        logger.warning("%s", says)
    diagnosis = _read_json(folder / "diagnosis.json") or {}
    arms = metrics.get("arms", {})
    captioned = metrics.get("main", {}).get("protocol") in DIRECTIONS
    gradients = {k: v for found in list(arms.values())[:1] for k, v in found.items() if k == "gradients"}  # of the run's own model
    pictures = _pictures(metrics, logs) | diagnosis_plots.pictures({**gradients, **diagnosis}) | class_plots.pictures(arms)
    for name, png in pictures.items():
        write_bytes(folder / "plots" / f"{name}.png", png)
    page = _environment().get_template(_TEMPLATE.name)
    content = page.render(
        name=folder.resolve().name,
        verdict=metrics.get("verdict"),
        unfinished=unfinished,
        main=_main(metrics),
        comparisons=metrics.get("comparisons", []),
        tables=_tables(metrics),
        further=[] if captioned else _further(metrics),
        classes=metrics.get("main", {}).get("protocol") in LABELLED,
        captioned=caption_tables.tables(arms, _read_json(folder / "captions.json") or []) if captioned else None,
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        diagnosis=diagnosis,
        examples=_read_json(folder / "examples.json") or [],
        arms=arms,
        facts={"Data": _flat(metrics.get("data", {})), "Machine": _flat(metrics.get("machine", {}))},
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
    )
    return write_text(folder / "report.html", content)


def examples(
    data: PairData, vectors: np.ndarray | torch.Tensor, queries: Sequence[int] | np.ndarray, k: int, *, split: str = "test"
) -> list[dict[str, Any]]:
    """Entries of ``examples.json``: each query with its nearest candidates, and which of them are its partners.

    Args:
        data: Its notes are shown, its pairs mark the hits, its pool without the query itself is searched.
        vectors: (N, D), one per note.
        queries: (q,) note indices.
        k: Neighbours of each.
        split: Of the pairs and the pool.

    Raises:
        ZooError: If k exceeds the candidates, or the vectors are not finite.
    """
    pairs, pool = data.pairs(split), data.pool(split)
    vectors = torch.as_tensor(vectors)
    entries = []
    for query in map(int, queries):
        candidates = pool[pool != query]
        partners = set(pairs[pairs[:, 0] == query, 1].tolist())
        places, scores = topk(vectors[torch.from_numpy(candidates)], vectors[[query]], k)
        neighbours = [
            {**_card(data.notes[note]), "hit": note in partners, "score": float(score)}
            for note, score in zip(candidates[places[0]].tolist(), scores[0], strict=True)
        ]
        for neighbour in neighbours:
            del neighbour["text"]
        entries.append({"query": _card(data.notes[query]), "neighbours": neighbours})
    return entries


def _card(row: Row) -> dict[str, Any]:
    """What is shown of a note: title, text, and a small PNG in base64, None without a picture."""
    return {"title": row.get("title") or "", "text": row.get("content") or "", "image": thumbnail(row.get("image"))}


def _read_json(path: Path) -> Any:
    """The content, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ZooError(f"{path}: no JSON ({e}); delete it and evaluate again") from e


def _logs(folder: Path, metrics: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By arm, the main one first, the log lines that hold a loss."""
    main = metrics.get("main", {}).get("arm", "model")
    arms = metrics["arms"] if "arms" in metrics else [p.name for p in sorted(folder.glob("arms/*"))]  # else: a run that is under way
    files = {main: folder / "log.jsonl"} | {arm: folder / "arms" / arm / "log.jsonl" for arm in arms if arm != main}
    logs = {name: _losses(path) for name, path in files.items() if path.is_file()}
    return {name: lines for name, lines in logs.items() if lines}


def _unfinished(folder: Path) -> list[str]:
    """Where the run and its arms stopped, in words, of those that have begun and left no model."""
    said = []
    for place in (folder, *sorted(folder.glob("arms/*"))):
        recipe = place / "recipe.yaml"
        if not recipe.is_file() or (place / "model.json").is_file():
            continue
        written = Source.read(recipe.name, recipe.read_text(encoding="utf-8")).values
        run = written.get("run") if isinstance(written, Mapping) else None
        steps = run.get("steps") if isinstance(run, Mapping) else None
        logged = _losses(place / "log.jsonl") if (place / "log.jsonl").is_file() else []
        saved = checkpoints(place / "checkpoints")
        step = max(logged[-1]["step"] if logged else 0, int(saved[-1].name.removeprefix("step_")) if saved else 0)
        said.append(
            f"{'' if place == folder else f'arm {place.name}: '}training stopped at step {step}{'' if steps is None else f' of {steps}'},"
            f" unless it is running still; to go on, write the same command again, or: zoo run {folder / 'recipe.yaml'}"
        )
    return said


def _losses(path: Path) -> list[dict[str, Any]]:
    ended = path.read_text(encoding="utf-8").split("\n")[:-1]  # a run that is killed may leave a last line without its end
    found = []
    for number, line in enumerate(ended, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as e:
            raise ZooError(f"{path}, line {number}: no JSON ({e})") from e
        if "step" in entry and "loss" in entry:
            found.append(entry)
    return found


def _records(metrics: Mapping[str, Any]) -> dict[tuple[str, Key], dict[str, Any]]:
    """Every record by arm and key."""
    return {
        (arm, Key(r["protocol"], r["subset"], r["input"], r["k"])): r
        for arm, values in metrics.get("arms", {}).items()
        for r in values.get("records", [])
    }


def _main(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record that the verdict speaks of, with its arm."""
    main = metrics.get("main")
    if main is None:
        return None
    place = (main["arm"], Key(*(main[part] for part in Key._fields)))
    records = _records(metrics)
    if place not in records:
        raise ZooError(f"metrics.json: the main record {(place[0], *place[1])} is not among its {len(records)} records; evaluate again")
    names = {"measure": measure_name(main["protocol"], main["k"]).replace("_", " "), "subset_label": subset_name(main["subset"])}
    names |= {"protocol_label": DIRECTIONS.get(main["protocol"], main["protocol"])}
    return {**records[place], "arm": main["arm"], **names}


def _tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per protocol: a row per arm and input, a column per subset and k; the main record's protocol first."""
    records, main = _records(metrics), metrics.get("main", {})
    protocols = sorted({key.protocol for _, key in records}, key=lambda p: (p != main.get("protocol"), p))
    chances: Mapping[str, float] = next((found["chance"] for found in metrics.get("arms", {}).values() if "chance" in found), {})
    return [_table({at: r for at, r in records.items() if at[1].protocol == protocol}, protocol, main, chances) for protocol in protocols]


def _table(
    records: Mapping[tuple[str, Key], dict[str, Any]], protocol: str, main: Mapping[str, Any], chances: Mapping[str, float]
) -> dict[str, Any]:
    subsets = list(dict.fromkeys(key.subset for _, key in records))
    columns = [(s, k) for s in subsets for k in sorted({key.k for _, key in records if key.subset == s})]
    best = {(s, k): max(round(r["recall"], 3) for (_, key), r in records.items() if (key.subset, key.k) == (s, k)) for s, k in columns}
    chance = {column: chances.get(place_name(protocol, *column)) if protocol in DIRECTIONS else None for column in columns}
    rows = []
    for arm, given in dict.fromkeys((arm, key.input) for arm, key in records):
        cells = [records.get((arm, Key(protocol, s, given, k))) for s, k in columns]
        marked = [
            cell and {**cell, "best": round(cell["recall"], 3) == best[at], "times": caption_tables.times(cell["recall"], chance[at])}
            for cell, at in zip(cells, columns, strict=True)
        ]
        rows.append({"arm": arm, "input": input_name(given), "main": (arm, given) == (main.get("arm"), main.get("input")), "cells": marked})
    groups = []
    for subset in subsets:
        measures = [measure_name(protocol, k).replace("_", " ") for s, k in columns if s == subset]
        queries = max(r["queries"] for (_, key), r in records.items() if key.subset == subset)
        groups.append({"label": subset_name(subset), "queries": queries, "measures": measures})
    label = DIRECTIONS.get(protocol, f"Protocol {protocol}").capitalize()
    return {"protocol": protocol, "label": label, "groups": groups, "rows": rows, "chance": [x for x in chance.values() if x is not None]}


def _further(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table of every kind of plain number that arms have besides records: ``macro_f1`` by what was shown."""
    arms = metrics.get("arms", {})
    tables = []
    for kind in dict.fromkeys(k for found in arms.values() for k, v in found.items() if _plain_numbers(v)):
        columns = list(dict.fromkeys(name for found in arms.values() for name in found.get(kind, {})))
        rows = [{"arm": arm, "cells": [found[kind].get(name) for name in columns]} for arm, found in arms.items() if kind in found]
        tables.append({"kind": kind.replace("_", " "), "columns": columns, "rows": rows})
    return tables


def _plain_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, float | int) for v in value.values())


def _pictures(metrics: Mapping[str, Any], logs: Mapping[str, list[dict[str, Any]]]) -> dict[str, bytes]:
    pictures = {}
    if (main := _main(metrics)) is not None:
        pictures["recall"] = plots.recall_plot(*_bars(metrics, main), main["measure"])
    if logs:
        pictures["loss"] = plots.loss_plot(logs)
    return pictures


def _bars(metrics: Mapping[str, Any], main: Mapping[str, Any]) -> tuple[list[plots.Bar], list[str]]:
    """The main record's protocol and k, for every arm and input; the highest recall on top."""
    chosen = (main["protocol"], main["k"])
    records = {(arm, key.input, key.subset): r for (arm, key), r in _records(metrics).items() if (key.protocol, key.k) == chosen}
    subsets = list(dict.fromkeys(subset for _, _, subset in records))
    bars = []
    for arm, given in dict.fromkeys(key[:2] for key in records):
        colour = plots.TRAINED if metrics["arms"][arm].get("parameters") else plots.UNTRAINED
        row = [records.get((arm, given, s), {}) for s in subsets]
        values = [[r.get(part) for r in row] for part in ("recall", "low", "high")]
        label = f"{arm}, {input_name(given)}" if input_name(given) else arm
        bars.append(plots.Bar(label, plots.MAIN if (arm, given) == (main["arm"], main["input"]) else colour, *values))
    bars.sort(key=lambda bar: -(bar.recall[0] or 0.0))
    return bars, [subset_name(s) for s in subsets]


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one: ``{"clicks": {"users": 3}}`` as ``{"clicks users": 3}``."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}".replace("_", " ")
        out |= _flat(value, f"{name} ") if isinstance(value, Mapping) else {name: value}
    return out


def _environment() -> jinja2.Environment:
    """Titles come from users and may hold markup: everything is escaped, and a name the page does not get is an error."""
    loader = jinja2.FileSystemLoader(_TEMPLATE.parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": _shown, "duration": _duration, "decimals": "{:.3f}".format, "signed": "{:+z.3f}".format}
    return environment


def _shown(value: Any, most: int = 20) -> str:
    """A value as a person reads it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, list):
        more = f" and {len(value) - most:,} more" if len(value) > most else ""
        return ", ".join(map(str, value[:most])) + more
    return str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
