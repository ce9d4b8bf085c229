"""What goes wrong in a process that loads data, told as if there were none: by the row's own error, or in one sentence."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

from zoo.errors import Failure, ZooError

T = TypeVar("T")


def loaded(loader: DataLoader[T]) -> Iterator[T]:
    """The batches of a loader.

    Raises:
        Failure: If a worker was killed.
        ZooError: What the worker's own row raised.
    """
    try:
        yield from _begun(loader)
    except ZooError as e:
        if not str(e).startswith("Caught "):
            raise
        raise type(e)(str(e).rpartition(f"{type(e).__name__}: ")[2].strip()) from e  # torch puts the worker's traceback before it
    except (RuntimeError, EOFError, ConnectionError) as e:  # the last two of a batch that a dying worker had begun to send
        if str(e).startswith("Caught ") or (isinstance(e, RuntimeError) and "DataLoader worker" not in str(e)):
            raise
        raise Failure(
            f"a process that loads data ended by itself ({e or type(e).__name__}): most often the machine has run out of memory; lower "
            "run.workers or run.batch_size, and run the same command again to go on from what was saved"
        ) from e


def _begun(loader: DataLoader[T]) -> Iterator[T]:
    """The loader's iterator, which alone shall tell of a dead worker, when a batch is asked for: every few seconds that it waits, it looks.

    Torch tells of it in a signal handler too, and so in whatever line the program then is; again whenever another process ends, as long as
    the iterator is there.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) != before:  # in the main thread, then, and torch does this once
        signal.signal(signal.SIGCHLD, before)
    return batches
