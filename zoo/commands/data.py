"""Known data sets: whether a copy is the published one, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.commands._app import DataRoot, app, root_of, where_the_data_is

data = typer.Typer(help="Known data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")


@data.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="SET", help="retail_notes, emoji_zh_en, av_digits, or one that is split.")],
    root: DataRoot = None,
) -> None:
    """Check a data set's files against the published hashes, or say where it comes from and why it cannot be made here."""
    from zoo.data._prepare import prepare as check

    typer.echo(f"{check(name, root_of(root))} holds the published files")


@data.command()
def split(
    name: Annotated[str, typer.Argument(metavar="SET", help="crema_d, food101, iemocap, kinetics_sounds or mvsa_single.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the lists: a .json or .csv, for data.splits.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    folder: Annotated[str | None, typer.Option(metavar="NAME", help="The data set's folder, where it has another name.")] = None,
    root: DataRoot = None,
) -> None:
    """Check every file of a data set, and write which rows train, select and test: by speaker or session where it has them."""
    from zoo.data._labelled import split as draw
    from zoo.files import check_target

    check_target(out, "--out")
    with where_the_data_is(f"zoo data split {name} --out {out}", root):
        drawn = draw(name, root_of(root), out, seed=seed, folder=folder)
    counted = ", ".join(f"{split} {n}" for split, n in drawn.statistics["rows"].items())
    typer.echo(f"{out}: {counted}; sha256 {drawn.statistics['splits_sha256']}")
    for fault in drawn.statistics["faults"]:
        typer.echo(f"  {fault}", err=True)
