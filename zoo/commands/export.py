"""A trained model for programs that have no torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from zoo.commands._app import RunFolder, app


@app.command()
def export(
    folder: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="The file; what its inputs are stands in <out>.json.")] = Path("model.onnx"),
    output: Annotated[str | None, typer.Option(help="Which embedding; else the main one.")] = None,
) -> None:
    """Write a trained model as ONNX: prepared tensors in, item vectors out.

    Nothing is left in place unless onnxruntime gives the vectors that torch gives. Needs the extra onnx.
    """
    from zoo.export import export_onnx
    from zoo.hub import load

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of what its optimiser leaves as it is
    typer.echo(str(export_onnx(load(folder), out, output=output)))
