"""The command line: each command is one call into the library, its errors are one message and an exit code.

Exit codes: 0 ok, 1 failure, 2 usage or recipe error, 3 a quality floor was missed or a loss got slower, 130 interrupted. Results go
to standard output, everything else to standard error. An error that names no remedy, with a traceback, is a bug of ours.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from zoo.errors import Failure, ZooError

app = typer.Typer(
    name="zoo",
    help="Multimodal models as small parts that fit together: clicks in, item vectors out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 ok, 1 failure, 2 usage or recipe error, 3 quality floor missed or loss slower, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
INTERRUPTED = 130  # what typer exits with on Ctrl-C, and what shells expect
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe (zoo list recipes).")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder: it holds model.json and model.safetensors.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in the place of the recipe's own: optimizer.lr=3e-5")
]
DataRoot = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="The folder that holds the folders of data sets (else: ZOO_DATA).")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: throw away what the run folder holds of an earlier run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
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

    _give(make_schema(), out)


@app.command()
def mine(
    clicks: Annotated[Path, typer.Argument(help="clicks.parquet or .csv: user_id, note_id, timestamp.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="How: group=session_id rank_by=cosine top=10")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the pairs go.")] = Path("pairs.parquet"),
    split: Annotated[str | None, typer.Option(help="Only clicks of this split.")] = None,
    since: Annotated[str | None, typer.Option(help="Only clicks from this date on.")] = None,
    until: Annotated[str | None, typer.Option(help="Only clicks before this date.")] = None,
    memory: Annotated[str, typer.Option(help="Spill to disk beyond this.")] = "2GB",
) -> None:
    """Pairs of notes that the same users click.

    Each pair scores s(A->B) = the sum of 1/N_u over the users who clicked both, N_u being the number of notes that user u clicked.
    """
    from zoo.config import checked
    from zoo.data._mining import Mine, mine_file
    from zoo.registry import lookup
    from zoo.source import Source

    given, faults = {}, []
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        source = Source.read(f"setting {setting!r}", value)
        given[key] = source.values
        faults += [source.report(source.faults)] if source.faults else []
        faults += [] if equals else [f"{source.name}: write key=value"]
    if faults:
        raise ZooError("\n".join(faults))
    rule = Mine(**checked(Mine, given, "mine", lookup))
    _give(mine_file(clicks, out, rule, split=split, since=since, until=until, memory=memory), None)


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None, data: DataRoot = None, fresh: Fresh = False) -> None:
    """Train a recipe, from its last checkpoint if there is one."""
    from zoo.recipe import load_recipe
    from zoo.train import train as train_

    settings = load_recipe(recipe, *(overrides or []))
    train_(settings, data_root=_root(data), fresh=fresh)
    typer.echo(str(settings.out))


@app.command()
def run(recipe: RecipeName, overrides: Overrides = None, data: DataRoot = None, fresh: Fresh = False) -> None:
    """From clicks to a report: mine, train, evaluate, compare.

    Trains the recipe's model and every baseline that is an arm of it; what is trained already is not trained again. The last
    line of the output is the verdict. Exit code 3 if a quality floor of the recipe is missed.
    """
    from zoo.run import run as run_

    outcome = run_(recipe, *(overrides or []), data_root=_root(data), fresh=fresh)
    typer.echo(_table([r | {"arm": name} for name, arm in outcome.metrics["arms"].items() for r in arm["records"]]))
    typer.echo(f"report: {outcome.folder / 'report.html'}")
    typer.echo(outcome.verdict)
    if outcome.missed:
        typer.echo("\n".join(outcome.missed), err=True)
        raise typer.Exit(3)


@app.command("eval")
def eval_(
    folder: RunFolder,
    overrides: Overrides = None,
    data: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Recall of a trained run, as its recipe says.

    Overrides come last: zoo eval runs/demo evaluate.split=val
    """
    from zoo.hub import load
    from zoo.run import evaluate, evaluation, missed_floors

    model = load(folder)
    settings = evaluation(folder / "recipe.yaml", *(overrides or []))
    metrics = evaluate(model, recipe=settings, data_root=_root(data))
    records = [m.record() for m in metrics]
    typer.echo(json.dumps(records, indent=1, default=str) if as_json else _table(records))
    if missed := missed_floors(settings, metrics):
        typer.echo("\n".join(missed), err=True)
        raise typer.Exit(3)


@app.command()
def embed(
    folder: RunFolder,
    notes: Annotated[Path | None, typer.Argument(help="A folder with notes.parquet or .csv; else the run's own data.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the vectors go: note_id, vector.")] = Path("embeddings.parquet"),
    data: DataRoot = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Notes at a time.")] = 256,
) -> None:
    """Vectors of all notes, as a parquet file with note_id and vector."""
    from zoo.embed import embed_notes

    typer.echo(f"{embed_notes(folder, out, notes=notes, data_root=_root(data), batch_size=batch_size)} vectors in {out}")


@app.command()
def search(
    folder: RunFolder,
    embeddings: Annotated[Path, typer.Argument(help="What zoo embed wrote.")],
    title: Annotated[str | None, typer.Option(help="Of the query.")] = None,
    topic: Annotated[str | None, typer.Option(help="Of the query.")] = None,
    content: Annotated[str | None, typer.Option(help="Of the query.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image file.")] = None,
    note: Annotated[str | None, typer.Option(help="Instead: the note_id of a note that is in the file.")] = None,
    k: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    as_json: AsJson = False,
) -> None:
    """The notes nearest to a new one, or to one of them."""
    from zoo.embed import search_notes

    query = {key: value for key, value in {"title": title, "topic": topic, "content": content, "image": image}.items() if value is not None}
    found = search_notes(folder, embeddings, query, note=note, k=k)
    typer.echo(json.dumps(found, default=str) if as_json else "\n".join(f"{hit['score']:.4f}  {hit['note_id']}" for hit in found))


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write the report of a run again, as one HTML file."""
    from zoo.report import report as write

    typer.echo(str(write(folder)))


@app.command()
def bench(
    compare: Annotated[
        bool, typer.Option("--compare", help="Set our loss against what this machine stored; exit code 3 if slower.")
    ] = False,
    results: Annotated[Path, typer.Option(metavar="DIR", help="Where make bench keeps results, a file for each machine.")] = Path(
        "benchmarks/results"
    ),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else the GPU if there is one.")] = None,
) -> None:
    """Time, memory and error of the contrastive loss beside other libraries' on this machine, in under a minute.

    Times are ratios: to ours, and to what a matmul of the same run needs for the same arithmetic. On a CPU they are process CPU
    time of one thread.
    """
    from zoo.bench import bench as bench_

    outcome = bench_(device, compared_with=results if compare else None, say=partial(typer.echo, err=True))
    typer.echo(outcome.text)
    if outcome.slower:
        typer.echo("\n".join(outcome.slower), err=True)
        raise typer.Exit(3)


def _root(data: Path | None) -> Path | None:
    """The command line alone reads the environment."""
    return data if data is not None else Path(os.environ["ZOO_DATA"]) if os.environ.get("ZOO_DATA") else None


def _give(value: Any, out: Path | None) -> None:
    if out is None:
        typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))
        return
    from zoo.files import write_json

    typer.echo(str(write_json(out, value)))


def _table(records: list[dict[str, Any]]) -> str:
    columns = [
        c for c in ("arm", "protocol", "subset", "input", "k", "recall", "interval", "queries") if c == "interval" or c in records[0]
    ]
    rows = [columns] + [
        [f"{r['recall']:.3f}" if c == "recall" else f"[{r['low']:.3f}, {r['high']:.3f}]" if c == "interval" else str(r[c]) for c in columns]
        for r in records
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> None:
    """The console script: `app`, with errors as one message and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("zoo").setLevel(logging.INFO)
    try:
        app()
    except ZooError as e:
        _stop(str(e), 1 if isinstance(e, Failure) else 2)
    except OSError as e:  # a full disk, a folder that may not be written
        _stop(str(e), 1)
    except SystemExit as e:
        if e.code == INTERRUPTED:
            trains = sys.argv[1:2] in (["train"], ["run"])
            advice = "; run the same command again to go on from the last checkpoint" if trains else ""
            _stop(f"interrupted{advice}", INTERRUPTED)
        raise


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"zoo: {message}", err=True)
    raise SystemExit(code)
