"""Which trainings a study is made of: recipes, their arms and the points of a grid, under several seeds."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import ZooError, unknown
from zoo.recipe import Recipe, arm, load_recipe, values
from zoo.source import Source

Given = str | Path | Mapping[str, Any] | Recipe


class Trial(NamedTuple):
    """One training and measurement: a cell of the study under one seed."""

    cell: str  # recipe, arm and point of the grid: "retail, base, objective.alpha=3"
    recipe: Recipe  # with the seed and the run folder of this trial
    classic: str = ""  # "bm25" or "popularity", which are measured and not trained, once for all seeds

    @property
    def title(self) -> str:
        return self.cell if self.classic else f"{self.cell}, seed {self.recipe.seed}"


def trials(
    recipes: Sequence[Given],
    *overrides: str,
    out: Path,
    seeds: int = 3,
    grid: Mapping[str, Sequence[Any]] | None = None,
    arms: Sequence[str] = (),
) -> list[Trial]:
    """Every training of a study, checked as far as recipes can be without making anything.

    Args:
        recipes: Files, names of shipped recipes, mappings or `Recipe`; each is a cell, called by the stem of the file, and by its folder
            too where others have the same stem.
        *overrides: ``"run.steps=100"``, of every recipe.
        out: The folder of the study; a trial stands in ``out/<cell>/seed_<n>``.
        seeds: How many; 0, 1, 2, ... take the place of a recipe's own seed.
        grid: {key of a recipe: its values}; each combination is a cell, over whatever an arm says.
        arms: Names from the recipes' ``baselines``, each a cell besides the recipe's own model; ``("all",)``: all of them.

    Raises:
        ZooError: With every fault of every cell.
    """
    faults = _refused(overrides, seeds, grid or {})
    given: dict[str, Recipe] = {}
    stems = Counter(Path(recipe).stem for recipe in recipes if isinstance(recipe, str | Path))
    for recipe in recipes:
        try:
            loaded = load_recipe(recipe, *overrides)
        except ZooError as e:
            faults.append(str(e))
            continue
        name = loaded.out.name
        if isinstance(recipe, str | Path):  # clip/emoji_en, where albef/emoji_en is there too
            name = Path(recipe).stem if stems[Path(recipe).stem] == 1 else "/".join((*Path(recipe).parts[-2:-1], Path(recipe).stem))
        if name in given:
            faults.append(f"two recipes of this study are called {name!r}: give one of the files another name")
        given[name] = loaded
    named = [] if tuple(arms) == ("all",) else arms
    faults += [unknown("arm of these recipes", a, {b for r in given.values() for b in r.baselines}) for a in named if not _has(a, given)]
    if faults or not given:
        raise ZooError("\n".join(faults) or "a study needs a recipe: name at least one")
    found: list[Trial] = []
    for name, recipe in given.items():
        chosen = ["", *(b for b in recipe.baselines if b in named or (arms and not named))]
        for cell in chosen:
            found += _cell(name, recipe, cell, grid or {}, range(seeds), out, faults)
    faults += _collisions(found)
    if faults:
        raise ZooError("\n".join(dict.fromkeys(faults)))
    return found


def read_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["objective.alpha=1,3,9"]`` as ``{"objective.alpha": [1, 3, 9]}``; what stands between the commas is YAML.

    Raises:
        ZooError: With everything that cannot be read.
    """
    grid: dict[str, list[Any]] = {}
    faults = []
    for text in texts:
        key, equals, points = text.partition("=")
        source = Source.read(f"grid {text!r}", f"[{points}]")
        if not equals:
            faults.append(f"{source.name}: write KEY=VALUE,VALUE")
        elif source.faults:
            faults.append(source.report(source.faults))
        elif key in grid:
            faults.append(f"grid {key}: it stands there twice: write all of its values into one")
        grid[key] = source.values
    if faults:
        raise ZooError("\n".join(faults))
    return grid


def _has(name: str, given: Mapping[str, Recipe]) -> bool:
    return any(name in recipe.baselines for recipe in given.values())


def _refused(overrides: Sequence[str], seeds: int, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """What no recipe would have to be read for."""
    keys = {*(o.partition("=")[0] for o in overrides), *grid}
    faults = [
        f"{key}: a study sets it by itself: write {says}"
        for key, says in {"seed": "--seeds N (from Python: seeds=N)", "out": "--out runs/foo (from Python: out='runs/foo')"}.items()
        if key in keys
    ]
    faults += [
        f"grid {key}: {section} is the same for all cells, which answer the same questions: override it for all"
        for key in grid
        if (section := key.partition(".")[0]) in ("evaluate", "classify", "retrieve")
    ]
    faults += [f"grid {key}: it has no value: write {key}=VALUE,VALUE" for key, points in grid.items() if not len(points)]
    return faults + ([] if seeds >= 1 else [f"seeds: {seeds} is none: write 1 or more"])


def _cell(
    name: str, recipe: Recipe, baseline: str, grid: Mapping[str, Sequence[Any]], seeds: Sequence[int], out: Path, faults: list[str]
) -> list[Trial]:
    """The trials of a recipe's own model, or of one of its baselines, at every point of the grid."""
    says = recipe.baselines.get(baseline)
    classic = says if isinstance(says, str) else ""
    base = recipe if not baseline or classic else arm(recipe, baseline)
    if classic:  # of a grid over a model, word overlap knows nothing
        grid = {key: points for key, points in grid.items() if key.partition(".")[0] == "data"}
    found = []
    for point in product(*([(key, value) for value in points] for key, points in grid.items())):
        cell = ", ".join([name, *([baseline] if baseline else []), *(f"{key}={shown(value)}" for key, value in point)])
        try:
            own = load_recipe(base, *(f"{key}={json.dumps(value)}" for key, value in point))
        except ZooError as e:
            faults.append(str(e))
            continue
        for seed in seeds[:1] if classic else seeds:
            folder = out / re.sub(r"[^\w.=+,()\[\] -]", "_", cell) / f"seed_{seed}"
            seeded = load_recipe(replace(own, seed=seed, out=folder, baselines={}, floor={}))  # read again, for what follows the seed
            found.append(Trial(cell, seeded, classic))
    return found


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _collisions(found: Sequence[Trial]) -> list[str]:
    """Cells that would share a folder, or do not answer the same questions."""
    faults: list[str] = []
    folders: dict[Path, str] = {}
    for trial in found:
        folder = trial.recipe.out
        if folder in folders:
            faults.append(f"cells {folders[folder]!r} and {trial.cell!r} would share the folder {folder}: leave one out")
        folders[folder] = trial.cell
        first = found[0]
        for section in ("evaluate", "classify", "retrieve"):
            if values(trial.recipe)[section] != values(first.recipe)[section]:
                says = "and cells answer the same questions: override it for all"
                faults.append(f"{trial.cell}: its {section!r} is not that of {first.cell}, {says}")
    return faults
