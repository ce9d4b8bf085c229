"""What there is: names, facts, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from zoo.commands._app import AsJson, app, give
from zoo.errors import ZooError

KINDS = ("models", "encoders", "backbones", "connectors", "fusions", "objectives", "data", "recipes")


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}.")] = "models",
    matrix: Annotated[bool, typer.Option("--matrix", help="Which fusion and which connector fit which model.")] = False,
) -> None:
    """Names of parts and recipes, or which of them fit together."""
    if matrix:
        from zoo.matrix import matrix as cells
        from zoo.matrix import table

        typer.echo(table(cells()))
        return
    if what not in KINDS:
        from zoo.errors import unknown

        raise ZooError(unknown("list", what, KINDS))
    if what == "recipes":
        from zoo.recipe import recipes

        typer.echo("\n".join(recipes()))
        return
    from zoo.registry import names

    typer.echo("\n".join(names(what if what == "data" else what.removesuffix("s"))))


@app.command()
def info(name: Annotated[str, typer.Argument(help="Of any part: notellm2, gated_late, qformer ...")], as_json: AsJson = False) -> None:
    """What there is to know of a part: summary, paper, licence, joints, settings with their defaults."""
    from zoo.registry import info as about

    found = about(name)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False, default=str))
        return
    settings, joints = found.pop("settings"), found.pop("joints")
    for key, value in found.items():
        if value:
            typer.echo(f"{key:9} {value}")
    if joints:
        typer.echo(f"{'joints':9} {', '.join(f'{joint} ({default})' if default else joint for joint, default in joints.items())}")
    for key, value in settings.items():
        typer.echo(f"  {key}: {value}")


@app.command()
def schema(out: Annotated[Path | None, typer.Option("--out", help="A file; else standard output.")] = None) -> None:
    """The JSON schema of a recipe, for editors."""
    from zoo.schema import schema as make_schema

    give(make_schema(), out)
