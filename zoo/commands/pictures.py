"""Pictures in files: their classes by names alone, and captions of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.commands._app import AsJson, RunFolder, app

Skip = Annotated[bool, typer.Option("--skip-broken", help="Leave out pictures that cannot be decoded.")]
Out = Annotated[Path | None, typer.Option("--out", help="A .csv, .parquet or .json, instead of a table here.")]
Size = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]


@app.command()
def zeroshot(
    folder: RunFolder,
    pictures: Annotated[list[Path], typer.Argument(metavar="FOLDER|FILE...", help="Pictures, or folders of them.")],
    classes: Annotated[Path, typer.Option(help="A text file: the name of a class in each line.")],
    templates: Annotated[
        Path | None, typer.Option(help="A text file: in each line a sentence with {} in the place of the name; else the name alone.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes of each picture, the nearest first.")] = 1,
    out: Out = None,
    batch_size: Size = 64,
    skip_broken: Skip = False,
    as_json: AsJson = False,
) -> None:
    """Tell which of some classes pictures show, by the names of the classes alone.

    A class is the mean of the vectors of its sentences; a picture is of the class that is nearest by cosine.
    """
    from zoo.describe import zeroshot_files
    from zoo.picture_files import find_pictures, read_lines
    from zoo.zeroshot import PLACE

    _ready(out)
    names = read_lines(classes, "names of classes")
    sentences = (PLACE,) if templates is None else read_lines(templates, "templates")
    files = find_pictures(pictures, skip_broken=skip_broken)
    _give(zeroshot_files(folder, files, names, templates=sentences, top=top, batch_size=batch_size), out, as_json)


@app.command()
def caption(
    folder: RunFolder,
    pictures: Annotated[list[Path], typer.Argument(metavar="FOLDER|FILE...", help="Pictures, or folders of them.")],
    method: Annotated[str, typer.Option(help="greedy, beam or nucleus.")] = "beam",
    beams: Annotated[int, typer.Option(min=1, help="Of beam: captions side by side.")] = 3,
    nucleus: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of nucleus: the share of probability that is drawn from.")] = 0.9,
    shortest: Annotated[int, typer.Option(min=0, help="Ids at least.")] = 1,
    longest: Annotated[int, typer.Option(min=1, help="Ids at most.")] = 20,
    prompt: Annotated[str, typer.Option(help="Words that each caption begins with.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of nucleus.")] = 0,
    out: Out = None,
    batch_size: Size = 32,
    skip_broken: Skip = False,
    as_json: AsJson = False,
) -> None:
    """Write a caption of each picture."""
    from zoo.config import checked
    from zoo.describe import caption_files
    from zoo.picture_files import find_pictures
    from zoo.registry import lookup
    from zoo.sections import Decoding

    _ready(out)
    given = {"method": method, "beams": beams, "nucleus": nucleus, "shortest": shortest, "longest": longest}
    how = Decoding(**checked(Decoding, given, "caption", lookup))
    files = find_pictures(pictures, skip_broken=skip_broken)
    _give(caption_files(folder, files, how, prompt=prompt, seed=seed, batch_size=batch_size), out, as_json)


def _ready(out: Path | None) -> None:
    """Whether the file can be written, asked before the work that fills it."""
    if out is None:
        return
    from zoo.files import check_target
    from zoo.picture_files import check_table

    check_table(out)
    check_target(out, "--out")


def _give(records: list[dict[str, Any]], out: Path | None, as_json: bool) -> None:
    if out is not None:
        from zoo.picture_files import write_table

        typer.echo(f"{len(records)} rows in {write_table(records, out)}")
    elif as_json:
        typer.echo(json.dumps(records, indent=1, ensure_ascii=False))
    else:
        shown = [[f"{x:.4f}" if isinstance(x, float) else str(x) for x in record.values()] for record in records]
        widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
        for row in shown:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
