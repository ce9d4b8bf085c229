"""From a recipe to a trained and measured model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from zoo.commands._app import AsJson, DataRoot, Fresh, Overrides, RecipeName, RunFolder, app, root_of, table, where_the_data_is


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None, data: DataRoot = None, fresh: Fresh = False) -> None:
    """Train a recipe, from its last checkpoint if there is one.

    Ctrl-C and SIGTERM end the step, save, and stop; the same command again goes on from there.
    """
    from zoo.recipe import load_recipe
    from zoo.train import train as train_

    settings = load_recipe(recipe, *(overrides or []))
    train_(settings, data_root=root_of(data), fresh=fresh)
    typer.echo(str(settings.out))


@app.command()
def run(recipe: RecipeName, overrides: Overrides = None, data: DataRoot = None, fresh: Fresh = False) -> None:
    """From data to a report: mine, train, evaluate, compare.

    Trains the recipe's model and every baseline that is an arm of it; what is trained already is not trained again. The last
    line of the output is the verdict. Exit code 3 if a quality floor of the recipe is missed.

    Ctrl-C and SIGTERM end the step, save, and stop; the same command again goes on from there.
    """
    from zoo.run import run as run_

    outcome = run_(recipe, *(overrides or []), data_root=root_of(data), fresh=fresh)
    typer.echo(table([r | {"arm": name} for name, arm in outcome.metrics["arms"].items() for r in arm["records"]]))
    typer.echo(f"report: {outcome.folder / 'report.html'}")
    typer.echo(outcome.verdict)
    if outcome.missed:
        typer.echo("\n".join(outcome.missed), err=True)
        raise typer.Exit(3)


@app.command("eval")
def eval_(
    folder: RunFolder,
    overrides: Overrides = None,
    data: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Recall of a trained run, or accuracy of one that tells classes, as its recipe says.

    Overrides come last: zoo eval runs/demo evaluate.split=val
    """
    from zoo.hub import load
    from zoo.questions import ask, check_questions, main_key
    from zoo.run import check_unseen, evaluation, load_data, missed_floors

    model = load(folder)
    settings = evaluation(folder / "recipe.yaml", *(overrides or []))
    with where_the_data_is(f"zoo eval {folder}", data):
        found = load_data(settings, root_of(data))
    check_questions(settings, found)
    check_unseen(folder, settings, found, root_of(data))
    answer = ask(model, found, settings)
    records = [m.record() for m in answer.metrics]
    typer.echo(json.dumps(records, indent=1, default=str) if as_json else table(records))
    if (captions := answer.more.get("captions")) and not as_json:
        typer.echo("captions: " + "; ".join(f"{name} {value:.3f}" for name, value in captions.items()))
    if missed := missed_floors(settings, answer.metrics, main_key(settings, found)):
        typer.echo("\n".join(missed), err=True)
        raise typer.Exit(3)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write the report of a run again, as one HTML file."""
    from zoo.report import report as write

    typer.echo(str(write(folder)))
