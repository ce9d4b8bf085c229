"""Noisy captions in, better ones out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.commands._app import AsJson, DataRoot, Overrides, RecipeName, app, root_of, where_the_data_is


@app.command()
def capfilt(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="For the data set 'capfilt': data.folder.")] = Path("capfilt"),
    captioner: Annotated[Path | None, typer.Option(metavar="RUN", help="Writes a text of each picture; none: nothing is added.")] = None,
    filter: Annotated[Path | None, typer.Option(metavar="RUN", help="Judges each text; none: nothing is thrown away.")] = None,
    data: DataRoot = None,
    trusted: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Pairs to train on that nobody doubts [trusted, where there is such a split].")
    ] = None,
    method: Annotated[str, typer.Option(help="How the captioner writes: nucleus, beam or greedy.")] = "nucleus",
    nucleus: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of probability that it draws from.")] = 0.9,
    longest: Annotated[int, typer.Option(min=1, help="Ids of a text at most.")] = 20,
    prompt: Annotated[str, typer.Option(help="Words that each text begins with.")] = "",
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Smallest chance of a match, for the numbers printed here.")] = 0.5,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what FOLDER holds from other models or settings.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bootstrap the captions of a recipe's data set: a captioner writes texts, a filter throws away those that do not match.

    Training pairs outside the trusted split are noisy. FOLDER keeps every text with what the filter says of it; the data set capfilt
    reads it back: data={name: capfilt, folder: FOLDER}, with arm: both, captioner or filter. What is interrupted goes on when the same
    command is run again.
    """
    from zoo.capfilt import capfilt as do
    from zoo.config import checked
    from zoo.registry import lookup
    from zoo.sections import Decoding

    how = Decoding(**checked(Decoding, {"method": method, "nucleus": nucleus, "longest": longest}, "capfilt", lookup))
    models: dict[str, Any] = {"captioner": captioner, "filter": filter}
    asked: dict[str, Any] = {"trusted": trusted, "prompt": prompt, "threshold": threshold, "batch_size": batch_size, "seed": seed}
    with where_the_data_is(f"zoo capfilt {recipe}", data):
        said = do(recipe, out, *(overrides or []), **models, data_root=root_of(data), how=how, fresh=fresh, **asked)
    if as_json:
        typer.echo(json.dumps(said, indent=1))
        return
    for origin, count in said["texts"].items():
        typer.echo(f"{origin:9}  {count['all']:7} texts, {count['kept']:7} kept")
    if found := said.get("filter"):
        shares = {key: "-" if x is None else f"{x:.3f}" for key, x in found.items()}
        recall, precision = shares["recall"], shares["precision"]
        typer.echo(f"of {found['planted']} wrong texts of the web the filter found {recall}; of what it threw away, {precision} were wrong")
        typer.echo(f"wrong texts among those of the web: {shares['wrong_before']} before, {shares['wrong_after']} after")
    typer.echo(f"{out}: data={{name: capfilt, folder: {out.resolve()}}}")
