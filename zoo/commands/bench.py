"""What the losses cost on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from zoo.commands._app import app


@app.command()
def bench(
    compare: Annotated[
        bool, typer.Option("--compare", help="Set our loss against what this machine stored; exit code 3 if slower.")
    ] = False,
    results: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="A folder of results, a file for each machine; in a checkout, make bench writes benchmarks/results."
        ),
    ] = Path("benchmarks/results"),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else the GPU if there is one.")] = None,
) -> None:
    """Time, memory and error of the contrastive loss beside other libraries' on this machine, in about a minute.

    time/ours and time/matmul are multiples of our time and of what a matmul of the same run needs for the same arithmetic; on a CPU
    they are of process CPU time of one thread. Errors are relative to float64, of the loss and of the gradient of x.
    """
    from zoo.bench import bench as bench_

    outcome = bench_(device, compared_with=results if compare else None, say=partial(typer.echo, err=True))
    typer.echo(outcome.text)
    if outcome.slower:
        typer.echo("\n".join(outcome.slower), err=True)
        raise typer.Exit(3)
