"""Recipes side by side, with their spread over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.commands._app import DataRoot, app, root_of
from zoo.errors import ZooError


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipes, and settings of all of them.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, 2 ...")] = 3,
    grid: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE,VALUE", help="A setting to be varied; may come again.")] = None,
    arms: Annotated[str, typer.Option(metavar="NAME,NAME", help="Baselines of the recipes, to be compared too; or all.")] = "",
    against: Annotated[str | None, typer.Option(metavar="CELL", help="What the others are compared with; else the first.")] = None,
    data: DataRoot = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the study.")] = Path("runs/compare"),
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time, each in a process of its own with one thread.")] = 1,
    budget_seconds: Annotated[float | None, typer.Option(help="Mark cells of which a training took longer.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what there is to do, and what is done.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: train again what the folder holds already.")] = False,
) -> None:
    """Train recipes, arms and grid points under several seeds: one table with spread.

    Ctrl-C and SIGTERM end the step, save, and stop; the same command again goes on from there. A setting is picked with
    evaluate.split=val, never on the test split. Exit code 1 if a training failed.
    """
    from zoo.compare import compare as compare_
    from zoo.compare import plan
    from zoo.trials import read_grid

    overrides = [word for word in recipes if "=" in word]
    names = [word for word in recipes if "=" not in word]
    if not names:
        raise ZooError("compare needs a recipe: zoo compare RECIPE... [KEY=VALUE]...")
    chosen = [name.strip() for name in arms.split(",") if name.strip()]
    points = read_grid(grid or [])
    if dry_run:
        typer.echo(plan(names, *overrides, out=out, seeds=seeds, grid=points, arms=chosen, against=against))
        return
    study = compare_(
        names,
        *overrides,
        seeds=seeds,
        grid=points,
        arms=chosen,
        against=against,
        data_root=root_of(data),
        out=out,
        jobs=jobs,
        budget_seconds=budget_seconds,
        fresh=fresh,
    )
    typer.echo(study.table)
    if study.failed:
        typer.echo("\n".join(study.failed), err=True)
        raise typer.Exit(1)
