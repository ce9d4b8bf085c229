"""The command line: each command is one call into the library, its errors are one message and an exit code.

Exit codes: 0 ok, 1 failure, 2 usage or recipe error, 3 a quality floor was missed or a loss got slower, 75 stopped by SIGTERM,
130 interrupted. Results go to standard output, everything else to standard error. An error that names no remedy, with a traceback, is
a bug of ours.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import NoReturn

import typer

from zoo.commands._app import app
from zoo.errors import Terminated, ZooError
from zoo.interrupt import leave_on_sigterm

# Files that add their commands to the application, in the order of the help.
COMMANDS = (
    "parts",
    "checks",
    "items",
    "pictures",
    "runs",
    "compare",
    "diagnose",
    "export",
    "convert",
    "bench",
    "data",
    "balance",
    "capfilt",
)
STOPPED = {130: "interrupted", Terminated.code: "terminated"}  # 130 is what typer exits with on Ctrl-C, and what shells expect

for file in COMMANDS:
    import_module(f"zoo.commands.{file}")


def main() -> None:
    """The console script: `app`, with errors as one message and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("zoo").setLevel(logging.INFO)
    try:
        with leave_on_sigterm():
            app(prog_name="zoo")
    except ZooError as e:
        _stop(str(e), e.code)
    except OSError as e:  # a full disk, a folder that may not be written
        _stop(str(e), 1)
    except SystemExit as e:
        if e.code not in STOPPED:
            raise
        if said := _said(e):
            _stop(said, e.code)
        trains = sys.argv[1:2] in (["train"], ["run"], ["compare"])
        advice = "; run the same command again to go on from the last checkpoint" if trains else ""
        _stop(f"{STOPPED[e.code]}{advice}", e.code)


def _said(exit: BaseException) -> str:
    """What the Ctrl-C that led to ``exit`` says of itself, such as the step that a run has saved."""
    cause: BaseException | None = exit
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause is not None else ""


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"zoo: {message}", err=True)
    raise SystemExit(code)
