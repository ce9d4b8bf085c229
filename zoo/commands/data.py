"""Known data sets: whether a copy is the published one, and where they come from."""

from __future__ import annotations

from typing import Annotated

import typer

from zoo.commands._app import DataRoot, app, root_of

data = typer.Typer(help="Known data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")


@data.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="SET", help="retail_notes, emoji_zh_en or av_digits.")], root: DataRoot = None
) -> None:
    """Check a data set's files against the published hashes, or say where it comes from and why it cannot be made here."""
    from zoo.data._prepare import prepare as check

    typer.echo(f"{check(name, root_of(root))} holds the published files")
