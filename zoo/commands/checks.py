"""Before a run: whether the machine, the recipe and what it needs from elsewhere are as they should be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.commands._app import AsJson, DataRoot, Overrides, RecipeName, app, root_of
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.validate import Report


@app.command()
def validate(
    recipe: RecipeName,
    overrides: Overrides = None,
    data: DataRoot = None,
    rows: Annotated[int, typer.Option("--rows", min=2, help="How many rows are opened, an even number: two make a pair.")] = 32,
    processes: Annotated[int, typer.Option("--processes", min=1, help="GPUs that shall train together.")] = 1,
    deep: Annotated[bool, typer.Option("--deep", help="Shapes of every module.")] = False,
    as_json: AsJson = False,
) -> None:
    """Open some rows, build the model without memory, and print shapes, parameters and the memory of a step.

    Data that is there is loaded whole, as at the start of a run: every image is decoded once, and pairs are mined. Where it is not
    there, rows are made up; --data of an empty folder makes them up too.

    Exit code 2 if the recipe cannot be trained.
    """
    import logging

    from zoo.recipe import load_recipe
    from zoo.validate import plain
    from zoo.validate import validate as look

    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are wanted here
    report = look(load_recipe(recipe, *(overrides or [])), data_root=root_of(data), rows=rows, processes=processes, deep=deep)
    typer.echo(json.dumps(plain(report), indent=1, ensure_ascii=False) if as_json else _written(report))
    if report.faults:
        raise ZooError("\n".join(report.faults))


@app.command()
def doctor(data: DataRoot = None, as_json: AsJson = False) -> None:
    """Look at this machine: versions, devices, extras, disk, caches, and what is known to break. Exit code 1 if something is bad."""
    from zoo.doctor import examine

    root = root_of(data)
    found = examine(data_root=root, environment=os.environ)
    if as_json:
        typer.echo(json.dumps([check._asdict() for check in found], indent=1, ensure_ascii=False))
    else:
        typer.echo("\n".join(f"{c.status:4}  {c.name}: {c.says}" + (f"\n      -> {c.remedy}" if c.remedy else "") for c in found))
    if any(check.status == "bad" for check in found):
        raise typer.Exit(1)


@app.command()
def fetch(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")] = None,
    overrides: Overrides = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="TAR", help="Write all of it into one file, to carry elsewhere.")
    ] = None,
    unpack: Annotated[Path | None, typer.Option("--unpack", metavar="TAR", help="Put a bundle into place, here.")] = None,
    into: Annotated[
        Path | None, typer.Option("--into", metavar="DIR", help="With --unpack: DIR/hub and DIR, else the hub's own cache and this folder.")
    ] = None,
) -> None:
    """Download what a recipe reads from a hub, for machines without a network.

    \b
    zoo fetch RECIPE --bundle all.tar      where there is a network
    zoo fetch --unpack all.tar             where there is none
    """
    from zoo.fetch import hub_cache

    if (recipe is None) == (unpack is None) or (unpack is not None and bundle is not None) or (unpack is None and into is not None):
        raise ZooError("write either zoo fetch RECIPE [--bundle TAR], or zoo fetch --unpack TAR [--into DIR]")
    if unpack is not None:
        from zoo.bundle import unpack as put

        place = put(unpack, into / "hub" if into is not None else hub_cache(), into if into is not None else Path())
        where = f"HF_HUB_CACHE={into / 'hub'} " if into is not None else ""
        typer.echo(f"{len(place.files)} files\ntrain with: {where}HF_HUB_OFFLINE=1 zoo train {place.recipe}")
        return
    from zoo.fetch import bundle as pack
    from zoo.fetch import fetch as get
    from zoo.recipe import load_recipe

    assert recipe is not None
    settings = load_recipe(recipe, *(overrides or []))
    found = get(settings, hub_cache())
    typer.echo("\n".join(f"{f.remote.role:10} {f.remote.repo}  {f.folder}" for f in found) or "this recipe reads nothing from a hub")
    if bundle is not None:
        typer.echo(str(pack(settings, Path(recipe).stem, found, hub_cache(), bundle)))


def _written(report: Report) -> str:
    """The report as lines for a reader."""
    texts, contrast = report.texts, report.contrast
    limit = f"at most {texts.limit}, {texts.cut} rows are cut" if texts.limit is not None else "no limit"
    lines = [f"NOTE {note}" for note in report.notes]
    lines += ["", f"rows      {report.rows} ({report.data})"]
    lines += ["missing   " + ", ".join(f"{key} {share:.0%}" for key, share in report.missing.items())]
    lines += [f"text      median {texts.median}, longest {texts.longest} tokens; {limit}"] if texts.longest else []
    if contrast is not None:
        lines += [
            f"contrast  {contrast.positives} rows with a positive, each against {contrast.negatives:.1f} negatives on average, "
            f"{contrast.fewest} at least; {contrast.known} further pairs are known to belong together"
        ]
    lines += ["", *_columns([["module", "", "shape"], *(row for line in report.shapes for row in _shape_rows(line))])]
    counts = {p.name: [p.parameters, p.trained, p.parameters - p.trained, p.adapters] for p in report.parts}
    counts["total"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    parts = [[name, *(f"{count:,}" for count in row)] for name, row in counts.items()]
    lines += ["", *_columns([["module", "parameters", "trained", "frozen", "adapters"], *parts])]
    unit, size = ("GiB", 1 << 30) if max(m.total for m in report.memory.values()) >= 1 << 30 else ("MiB", 1 << 20)
    memory = [[way, *(f"{part / size:.2f}" for part in (*m, m.total))] for way, m in report.memory.items()]
    lines += ["", *_columns([[f"{unit} on one GPU", "weights", "gradients", "optimizer", "activations", "total"], *memory])]
    lines += ["not counted: CUDA context, workspaces of kernels, fragmentation (10 to 20 %)"]
    return "\n".join(lines).strip()


def _shape_rows(line: Any) -> list[list[str]]:
    """One row a tensor, the module's name on the first."""
    rows = [
        [f"{'<-' if given else '->'} {name}", shape]
        for given in (True, False)
        for name, shape in (line.given if given else line.gave).items()
    ]
    return [[line.module if i == 0 else "", *row] for i, row in enumerate(rows)]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
