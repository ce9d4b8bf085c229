"""The one error users see, and the one sentence for a name we do not have."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

ALIASES = {  # what people write from habit -> what it is called here
    "learning_rate": "lr",
    "wd": "weight_decay",
    "bs": "batch_size",
    "batchsize": "batch_size",
    "num_steps": "steps",
    "max_steps": "steps",
    "temperature": "scale",
    "llm": "backbone",
    "language_model": "backbone",
    "vision_encoder": "vision",
    "image_encoder": "vision",
    "projector": "connector",
    "loss": "objective",
    "optim": "optimizer",
    "output_dir": "out",
    "dataset": "data",
    "embed_dim": "dim",
}


class ZooError(ValueError):
    """The user asked for something the zoo does not have. The message says what to write instead."""

    code = 2  # that the command line exits with


class Failure(ZooError):
    """What was asked for is right and cannot be done all the same: a loss that is not finite, a damaged file."""

    code = 1


class Diverged(Failure):
    """Loss or gradient is not finite, before the step moved any weight; every process says so in the same step."""


class Absent(ZooError):
    """What was asked for may be right, and is not on this machine: a folder of data."""


class Terminated(Failure):
    """A run was asked to stop, by SIGTERM, and has saved where it stands."""

    code = 75  # EX_TEMPFAIL: run it again


def unknown(what: str, got: str, have: Iterable[str]) -> str:
    """Say that ``got`` is no ``what``, with the nearest name that is, and all the names that are."""
    names = sorted(have)
    alias = ALIASES.get(got)
    near = [alias] if alias in names else get_close_matches(str(got), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {what} named {got!r}{hint} (have: {', '.join(names) or 'none'})"
