"""Whether a trained model uses the image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.commands._app import AsJson, DataRoot, app, root_of, where_the_data_is


@app.command()
def diagnose(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    what: Annotated[
        str | None, typer.Option(metavar="A,B", help="Of saliency, gates, permutation, shapley, outputs, gradients; else all.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Whose pairs; else the split that the recipe evaluates on.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="For saliency and gates.")] = 8,
    permutations: Annotated[int, typer.Option(min=1, help="Of the images.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the batches, the permutations and the intervals.")] = 0,
    figure: Annotated[
        Path | None, typer.Option("--saliency-figure", metavar="PNG", help="The shares of all runs by layer, in one picture.")
    ] = None,
    data: DataRoot = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Whether a trained model uses the image: saliency, gates, permutation, Shapley values, gradients.

    Writes diagnosis.json and the report of each run. The last line of a run is the verdict.
    """
    from zoo.diagnose import diagnose as diagnose_
    from zoo.diagnose import saliency_figure
    from zoo.examine import WHAT

    parts = WHAT if what is None else tuple(what.split(","))
    settings: dict[str, Any] = {"split": split, "batches": batches, "permutations": permutations, "seed": seed, "device": device}
    with where_the_data_is(f"zoo diagnose {' '.join(map(str, folders))}", data):
        found = [diagnose_(folder, what=parts, data_root=root_of(data), **settings) for folder in folders]
    if as_json:
        values = [one.found for one in found]
        typer.echo(json.dumps(values if len(values) > 1 else values[0], indent=1, default=str))
    for one in [] if as_json else found:
        typer.echo("\n".join([*_lines(one.found), f"report: {one.folder / 'report.html'}", one.verdict]))
    if figure is not None:
        typer.echo(str(saliency_figure(folders, figure)), err=as_json)


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The findings as a short table: what, and how much."""
    k = found["metric"]["k"]
    for record in found.get("shapley", {}).get("missing", []):
        shown = " + ".join(record["shown"]) or "nothing (chance)"
        yield _line(f"recall@{k}, {record['subset']}", shown, f"{record['recall']:.3f}")
    for record in found.get("permutation", {}).get("records", []):
        yield _line(
            f"recall@{k}, {record['subset']}",
            "images permuted",
            f"{record['permuted']:.3f}  drop {record['drop']['mean']:+.3f}",
            record["drop"],
        )
    for record in found.get("shapley", {}).get("values", []):
        yield _line(f"Shapley value, {record['subset']}", record["modality"], f"{record['mean']:+.3f}", record)
    for record in found.get("outputs", {}).get("records", []):
        yield _line(f"image-only recall@{k}", record["output"], f"{record['recall']:.3f}" if "recall" in record else "absent")
    for record in found.get("gates", {}).get("records", []):
        yield _line(f"gate of {record['output']}, {' + '.join(record['present'])}", record["modality"], f"{record['mean']:.3f}")
    for layer in found.get("saliency", {}).get("layers", []):
        shares = [f"{name} {share:.3f}" for name, share in layer["shares"].items() if share is not None]
        yield _line(f"saliency, layer {layer['layer']}", ", ".join(shares), "")
    for name, share in found.get("gradients", {}).get("mean", {}).items():
        yield _line("gradient share", name, f"{share:.3f}")
    for name, why in found["not_available"].items():
        yield f"{name} not available: {why}"


def _line(what: str, of: str, amount: str, interval: Mapping[str, float] | None = None) -> str:
    span = f" [{interval['low']:+.3f}, {interval['high']:+.3f}]" if interval is not None else ""
    return f"{what:<32}  {of:<22}  {amount}{span}".rstrip()
