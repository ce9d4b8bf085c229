"""What the commands share: the application, arguments that come again, and how results are printed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.errors import Absent

app = typer.Typer(
    name="zoo",
    help="Multimodal models as small parts that fit together: clicks or labels in, item vectors or classes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 ok, 1 failure, 2 usage or recipe error, 3 quality floor missed or loss slower, 75 terminated, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
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


def root_of(data: Path | None) -> Path | None:
    """The command line alone reads the environment."""
    return data if data is not None else Path(os.environ["ZOO_DATA"]) if os.environ.get("ZOO_DATA") else None


@contextmanager
def where_the_data_is(command: str, data: Path | None) -> Iterator[None]:
    """Let the message of a data set that is not found, no place being named, begin with the ``command`` that names one."""
    try:
        yield
    except Absent as e:
        if root_of(data) is not None:
            raise
        raise Absent(f"write: {command} --data DIR\n{e}") from e


def give(value: Any, out: Path | None) -> None:
    """Print a value as JSON, or write it to ``out`` and print where."""
    if out is None:
        typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))
        return
    from zoo.files import write_json

    typer.echo(str(write_json(out, value)))


def table(records: list[dict[str, Any]]) -> str:
    """Records of metrics, one or more, as aligned text: a row each."""
    from zoo.metric import LABELLED, measure_name

    classes = all(r["protocol"] in LABELLED for r in records)
    names = ("arm", "subset", "input", "recall") if classes else ("arm", "protocol", "subset", "input", "k", "recall")
    columns = [*(c for c in names if c in records[0]), "interval", "queries"]
    heads = [{"recall": measure_name(records[0]["protocol"], 1), "queries": "rows"}.get(c, c) if classes else c for c in columns]
    rows = [heads] + [
        [f"{r['recall']:.3f}" if c == "recall" else f"[{r['low']:.3f}, {r['high']:.3f}]" if c == "interval" else str(r[c]) for c in columns]
        for r in records
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
