"""One table of a study: every cell with its mean and spread over seeds, and how sure its distance from a reference is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.errors import ZooError, unknown
from zoo.evaluate.verdict import compare as paired
from zoo.files import write_json, write_text
from zoo.metric import DIRECTIONS, LABELLED, Key, Metric, measure_name, subset_name
from zoo.questions import main_key, split_of
from zoo.study import Result, data_of, load_all, perform_all, result, states
from zoo.trials import Given, Trial, shown, trials


class Cell(NamedTuple):
    """A row of the table."""

    name: str
    classic: str  # as of `Trial`
    results: Mapping[int, Result]  # by seed

    def done(self) -> dict[int, Result]:
        return {seed: found for seed, found in self.results.items() if found.state == "done"}

    def metrics(self, key: Key) -> dict[int, Metric]:
        """By seed; a seed whose trial has no such metric is left out."""
        found = {seed: [m for m in r.metrics if m.key == key] for seed, r in self.done().items()}
        return {seed: metrics[0] for seed, metrics in found.items() if metrics}


class Study(NamedTuple):
    """What a comparison came to."""

    folder: Path
    table: str  # Markdown, as in compare.md
    failed: list[str]  # trials that failed, in words
    numbers: Mapping[str, Any]  # as in compare.json


def compare(
    recipes: Sequence[Given],
    *overrides: str,
    seeds: int = 3,
    grid: Mapping[str, Sequence[Any]] | None = None,
    arms: Sequence[str] = (),
    against: str | None = None,
    data_root: str | Path | None = None,
    out: str | Path = "runs/compare",
    jobs: int = 1,
    budget_seconds: float | None = None,
    fresh: bool = False,
) -> Study:
    """Train and measure every recipe, arm and grid point under several seeds, and set them side by side.

    What is finished under ``out`` is not done again, and what was interrupted goes on from its last checkpoint. A trial that diverges
    is written down as failed, and the others go on. The table stands in ``out/compare.md``, all its numbers in ``out/compare.json``.

    The difference of a cell from the reference is a paired bootstrap over queries, or rows to classify: the recall of each query is
    averaged over the seeds that both cells have finished, and queries are drawn with replacement, each with all its seeds; where every
    seed asks other ones, held-out speakers in rotation, they are drawn from those of all seeds, a row that several seeds ask being one
    that is drawn with all of its answers. So the 95 % interval says how far the
    difference would move with other queries, the trained models being these; how far it moves with the seed is what the standard
    deviations say, and the column ``seeds``: in how many of them the cell is above the reference. The difference of each seed stands
    in ``compare.json``. A classic baseline knows no seed: it is compared with the mean of all of the other's.

    A setting that is picked from this table is picked on the split that it shows. Pick on ``evaluate.split=val``, and show the test
    split for what was picked.

    Args:
        recipes: Files, names of shipped recipes, mappings or `Recipe`.
        *overrides: ``"run.steps=100"``, of every recipe.
        seeds: How many: 0, 1, 2, ...
        grid: {key of a recipe: its values}; each combination is a cell: ``{"objective.alpha": [1, 3, 9, 19]}``.
        arms: Of the recipes' ``baselines``, to be cells as well; ``("all",)``: all of them.
        against: The cell that the others are compared with; None: the first.
        data_root: The folder that holds the folders of data sets.
        out: The folder of the study.
        jobs: Trials at a time, as `zoo.study.perform_all` says.
        budget_seconds: Of one training; the table marks cells that took longer.
        fresh: Do everything again.

    Raises:
        ZooError: On a fault of any recipe, of the data, or of a folder that holds something else, before anything is trained.
    """
    root, out = Path(data_root) if data_root is not None else None, Path(out)
    found = trials(recipes, *overrides, out=out, seeds=seeds, grid=grid, arms=arms)
    reference = _reference(found, against)
    loaded = load_all(found, root)
    perform_all(found, loaded, data_root=root, jobs=jobs, fresh=fresh)
    results = [(trial, result(trial)) for trial in found]
    cells = {t.cell: Cell(t.cell, t.classic, {own.recipe.seed: came for own, came in results if own.cell == t.cell}) for t in found}
    first, data = found[0].recipe, data_of(found[0], loaded)
    numbers = {
        "command": _command(recipes, overrides, seeds, grid or {}, arms, reference, out),
        "split": split_of(first, data),
        "main": main_key(first, data)._asdict(),
        "reference": reference,
        "seeds": list(range(seeds)),
        "budget_seconds": budget_seconds,
        "grid": bool(grid),
        "cells": [_cell(cell, cells[reference]) for cell in cells.values()],
    }
    table = markdown(numbers)
    write_json(out / "compare.json", numbers)
    write_text(out / "compare.md", table)
    return Study(out, table, [f"{trial.title} failed: {came.message}" for trial, came in results if came.state == "failed"], numbers)


def plan(
    recipes: Sequence[Given],
    *overrides: str,
    out: str | Path = "runs/compare",
    seeds: int = 3,
    grid: Mapping[str, Sequence[Any]] | None = None,
    arms: Sequence[str] = (),
    against: str | None = None,
) -> str:
    """What `compare` would do, line by line; recipes are checked, and neither data nor models are touched.

    Raises:
        ZooError: As `compare`, on a fault of any recipe or folder.
    """
    found = trials(recipes, *overrides, out=Path(out), seeds=seeds, grid=grid, arms=arms)
    reference = _reference(found, against)
    standing = states(found, None)
    lines = [f"{state:6} {trial.title}" for trial, state in zip(found, standing, strict=True)]
    left = sum(state != "done" for state in standing)
    cells = len({trial.cell for trial in found})
    return "\n".join([*lines, f"{cells} cells, {len(found)} trials, {left} of them to do; differences are from {reference!r}"])


def _reference(found: Sequence[Trial], against: str | None) -> str:
    cells = list(dict.fromkeys(trial.cell for trial in found))
    if against is None:
        return cells[0]
    if against not in cells:
        raise ZooError(f"against: {unknown('cell of this study', against, cells)}")
    return against


def _command(
    recipes: Sequence[Given],
    overrides: Sequence[str],
    seeds: int,
    grid: Mapping[str, Sequence[Any]],
    arms: Sequence[str],
    reference: str,
    out: Path,
) -> str:
    """The line that does the same from a shell; a recipe that is no file stands there as MAPPING."""
    words = ["zoo", "compare", *(str(r) if isinstance(r, str | Path) else "MAPPING" for r in recipes), *overrides, "--seeds", str(seeds)]
    for key, points in grid.items():
        words += ["--grid", f"{key}={','.join(map(shown, points))}"]
    words += ["--arms", ",".join(arms)] if arms else []
    return shlex.join([*words, "--against", reference, "--out", out.as_posix()])


def _cell(cell: Cell, reference: Cell) -> dict[str, Any]:
    """All numbers of one row."""
    done = cell.done()
    keys = dict.fromkeys(m.key for r in done.values() for m in r.metrics)
    first = next(iter(cell.results.values()))
    return {
        "cell": cell.name,
        "recipe_sha256": first.recipe_sha256,
        "data": first.data,
        "parameters": next((r.parameters for r in done.values()), None),
        "seconds": {seed: round(r.seconds, 1) for seed, r in done.items()},
        "failed": {seed: r.message for seed, r in cell.results.items() if r.state == "failed"},
        "machines": _distinct([r.machine for r in done.values()]),
        "metrics": [_metric(key, cell, reference) for key in keys],
        "more": _means([r.more for r in done.values()]),
    }


def _means(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of every plain number in nested mappings that all of them have; what is no number is left out."""
    out: dict[str, Any] = {}
    for key in [k for k in (found[0] if found else {}) if all(k in other for other in found)]:
        values = [other[key] for other in found]
        if all(isinstance(v, Mapping) for v in values):
            out[key] = _means(values)
        elif all(isinstance(v, float | int) for v in values):
            out[key] = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
    return {key: value for key, value in out.items() if value}


def _distinct(machines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [m for i, m in enumerate(machines) if m not in machines[:i]]


def _metric(key: Key, cell: Cell, reference: Cell) -> dict[str, Any]:
    """Mean and spread of one metric over the seeds, and its difference from the reference."""
    mine = cell.metrics(key)
    recalls = [m.recall for m in mine.values()]
    return {
        **key._asdict(),
        "n": len(recalls),
        "mean": float(np.mean(recalls)),
        "std": float(np.std(recalls, ddof=1)) if len(recalls) > 1 else None,
        "recall": {seed: m.recall for seed, m in mine.items()},
        "queries": len(next(iter(mine.values())).queries),
        "difference": None if cell.name == reference.name else _difference(key, cell, reference),
    }


def _difference(key: Key, cell: Cell, reference: Cell) -> dict[str, Any] | None:
    """The paired comparison over queries; None where the two share no seed, or under a seed do not seek the same among the same."""
    mine, other = cell.metrics(key), reference.metrics(key)
    if not (cell.classic or reference.classic):
        common = mine.keys() & other.keys()
        mine, other = ({seed: m for seed, m in found.items() if seed in common} for found in (mine, other))
    if not mine or not other:
        return None
    asked = [
        {seed: own.results[seed].questions[f"{key.protocol}/{key.subset}"] for seed in found}
        for own, found in ((cell, mine), (reference, other))
    ]
    seeds = sorted({*mine, *other})
    everywhere = len({digest for some in asked for digest in some.values()}) == 1
    if not everywhere and asked[0] != asked[1]:
        return None
    hits = {own.name: _by_query(list(found.values())) for own, found in ((cell, mine), (reference, other))}
    found = paired(cell.name, [reference.name], hits)[0]
    by_seed = {seed: mine[seed].recall - other[seed].recall for seed in seeds if seed in mine and seed in other}
    return {"mean": found.mean, "low": found.low, "high": found.high, "outcome": found.outcome, "seeds": seeds, "by_seed": by_seed}


def _by_query(found: Sequence[Metric]) -> np.ndarray:
    """(Q,) what the seeds answered to each query that any of them asks, so scaled that the mean is that of all answers."""
    queries, of = np.unique(np.concatenate([m.queries for m in found]), return_inverse=True)
    return np.bincount(of, weights=np.concatenate([m.hits for m in found])) * (len(queries) / len(of))


def markdown(numbers: Mapping[str, Any]) -> str:
    """The tables of a study: the headline first, then every protocol and k by what was shown and by subset, then what else was found."""
    headline = Key(**numbers["main"])
    measure = measure_name(headline.protocol, headline.k)
    of = "" if headline.protocol in LABELLED else f", {DIRECTIONS.get(headline.protocol, headline.protocol)}"
    title = f"{measure.replace('_', ' ').capitalize()}{of}, split {numbers['split']}; mean ± standard deviation over n seeds"
    asked = "rows" if headline.protocol in LABELLED else "queries"
    difference = (
        f"Difference: from {numbers['reference']}, paired over {asked}, with its 95 % interval: how far other {asked} would move it, the"
        f" trained models being these. Seeds: in how many of them the cell is above {numbers['reference']}."
    )
    if not next(cell for cell in numbers["cells"] if cell["cell"] == numbers["reference"])["metrics"]:
        difference = f"{numbers['reference']} has no result, so there are no differences: name another cell with --against."
    lines = [f"# {title}", "", difference, ""]
    heads = ["cell", "n", measure, "difference", "outcome", "seeds", "parameters", "seconds", "remarks"]
    mixed = len({commit for cell in numbers["cells"] for commit in _commits(cell)}) > 1
    lines += _table(heads, [_headline(cell, headline, numbers["budget_seconds"], mixed) for cell in numbers["cells"]])
    if numbers["grid"] and numbers["split"] == "test":
        splits = {**dict.fromkeys(LABELLED, "classify.split=val"), **dict.fromkeys(DIRECTIONS, "retrieve.splits=[val]")}
        says = splits.get(headline.protocol, "evaluate.split=val")
        lines += ["", f"A setting that is picked from here is picked on the test split: pick with {says}."]
    metrics = [m for cell in numbers["cells"] for m in cell["metrics"]]
    for protocol, k in dict.fromkeys((m["protocol"], m["k"]) for m in metrics):
        subsets = list(dict.fromkeys(m["subset"] for m in metrics if (m["protocol"], m["k"]) == (protocol, k)))
        rows = [
            [cell["cell"], shown, *(_entry(_find(cell, Key(protocol, subset, shown, k))) for subset in subsets)]
            for cell in numbers["cells"]
            for shown in dict.fromkeys(m["input"] for m in cell["metrics"])
        ]
        name = measure_name(protocol, k).replace("_", " ")
        name = name if protocol in LABELLED else f"{DIRECTIONS.get(protocol, protocol)}, {name}"
        lines += ["", f"## {name}", "", *_table(["cell", "shown", *(subset_name(s).lower() for s in subsets)], rows)]
        if any(subset.startswith("missing_") for subset in subsets):
            lines += [
                "",
                "Missing: of all cells (row, modality). Every row keeps one, so 50 % is the most that two modalities can lose, three 67 %.",
            ]
    lines += _more(numbers["cells"])
    return "\n".join([*lines, "", f"`{numbers['command']}`", ""])


def _more(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of every kind of further number."""
    lines = []
    for kind in dict.fromkeys(kind for cell in cells for kind, found in cell["more"].items() if "mean" not in found):
        columns = list(dict.fromkeys(name for cell in cells for name in cell["more"].get(kind, {})))
        rows = [[cell["cell"], *(_spread(cell["more"].get(kind, {}).get(name)) for name in columns)] for cell in cells]
        lines += ["", f"## {kind.replace('_', ' ')}", "", *_table(["cell", *columns], rows)]
    return lines


def _find(cell: Mapping[str, Any], key: Key) -> Mapping[str, Any] | None:
    return next((m for m in cell["metrics"] if Key(m["protocol"], m["subset"], m["input"], m["k"]) == key), None)


def _commits(cell: Mapping[str, Any]) -> list[str]:
    """Of the software that measured a cell, short."""
    said = [m.get("commit") or "unknown" for m in cell["machines"]]
    return list(dict.fromkeys(commit[:7] + ("-dirty" if commit.endswith("-dirty") else "") for commit in said))


def _headline(cell: Mapping[str, Any], key: Key, budget: float | None, mixed: bool) -> list[str]:
    """A row of the first table; where the software of the cells is ``mixed``, each says which made it."""
    found, seconds = _find(cell, key), list(cell["seconds"].values())
    difference = found["difference"] if found else None
    by_seed = difference["by_seed"] if difference else {}
    remarks = [f"seed {seed} failed" for seed in cell["failed"]]
    if budget is not None and max(seconds, default=0.0) > budget:
        remarks.append(f"over the budget of {budget:g} s: {max(seconds):.1f} s")
    if mixed and (commits := _commits(cell)):
        remarks.append(f"of commit{'s' * (len(commits) > 1)} {', '.join(commits)}")
    return [
        cell["cell"],
        str(found["n"] if found else 0),
        _spread(found),
        _signed(difference),
        difference["outcome"] if difference else "",
        f"{sum(d > 0 for d in by_seed.values())} of {len(by_seed)}" if by_seed else "",
        f"{cell['parameters']:,}" if cell["parameters"] else "",
        f"{np.mean(seconds):.0f}" if cell["parameters"] else "",
        "; ".join(remarks),
    ]


def _entry(found: Mapping[str, Any] | None) -> str:
    return " ".join(filter(None, (_spread(found), f"({_signed(found['difference'])})" if found and found["difference"] else "")))


def _spread(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['mean']:.3f}" + (f" ± {found['std']:.3f}" if found["std"] is not None else "")


def _signed(difference: Mapping[str, Any] | None) -> str:
    return f"{difference['mean']:+z.3f} [{difference['low']:+z.3f}, {difference['high']:+z.3f}]" if difference else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are as wide as their widest cell, so that it can be read as it stands."""
    texts = [list(heads), *([text.replace("|", "\\|") for text in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(heads))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in texts]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
