"""Captions in, fewer captions out: no query asks for more than so many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from zoo.commands._app import AsJson, app


@app.command()
def balance(
    folder: Annotated[Path, typer.Argument(help="captions.parquet or .jsonl, or captions-*.parquet or .jsonl.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder, for the data and for queries.csv: query, pairs, kept.")],
    queries: Annotated[Path | None, typer.Option(help="A file with a query a line; else every word that --least texts have.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Pairs that a query asks for.")] = 20_000,
    least: Annotated[int, typer.Option(min=1, help="Texts that have a word, for it to be a query.")] = 100,
    text: Annotated[list[str] | None, typer.Option("--text", metavar="COLUMN", help="Of texts; several times for several.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Balance captions by what they speak of, as CLIP's training set was made.

    Queries that are in many texts ask for a part of them, drawn evenly; a pair stays if any query asks for it. Rows of splits other than
    train stay as they are. Files are read twice, row by row, so they may be larger than memory.
    """
    from zoo.balance import balance as balanced

    done = balanced(folder, out, queries=queries, most=most, least=least, texts=text or ["text"], seed=seed)
    if as_json:
        typer.echo(json.dumps(done._asdict()))
        return
    typer.echo(f"{done.kept} of {done.pairs} pairs in {out}: {done.capped} of {done.queries} queries have more than {most}")
    typer.echo(f"{done.unmatched} pairs match no query; {done.others} rows of other splits stay")
