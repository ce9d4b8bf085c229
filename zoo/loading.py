"""What goes wrong in a process that loads data, told as if there were none: by the row's own error, or in one sentence."""

from __future__ import annotations

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
        yield from loader
        return
    except ZooError as e:
        if not str(e).startswith("Caught "):
            raise
        raise type(e)(str(e).rpartition(f"{type(e).__name__}: ")[2].strip()) from e  # torch puts the worker's traceback before it
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        said = str(e)
    # Out of the block, so that the error and all that led to it are gone: their frames hold the loader, and as long as that is there,
    # torch tells of its dead worker again whenever another process ends.
    raise Failure(
        f"a process that loads data ended by itself ({said}): most often the machine has run out of memory; lower run.workers or "
        "run.batch_size, and run the same command again to go on from what was saved"
    )
