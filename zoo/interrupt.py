"""SIGTERM and Ctrl-C as requests: a run finishes its step, saves, and says how to go on."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from zoo.errors import Terminated

logger = logging.getLogger("zoo.train")
AGAIN = "run the same command again to go on from there"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context manager in which SIGTERM and the first Ctrl-C are noted; a second Ctrl-C acts at once.

    Signals reach the main thread alone: in any other, nothing is changed.
    """

    def __init__(self) -> None:
        self.signal = 0  # the number of the one that came, 0: none

    def __enter__(self) -> Interruption:
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("stopping after this step, to save it; Ctrl-C once more stops at once")


@contextmanager
def leave_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM leaves at once, as Ctrl-C does, so that what is open is closed; an `Interruption` inside goes before it.

    Raises:
        SystemExit: With the code of `Terminated`, since nothing takes it for a fault that it could mend.
    """

    def leave(*_: object) -> None:
        raise SystemExit(Terminated.code)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(number: int, message: str) -> None:
    """Leave a run that has been saved, in the way of the signal that ended it.

    Raises:
        KeyboardInterrupt: For SIGINT.
        Terminated: For SIGTERM.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    raise Terminated(message)


def in_worker(_: int) -> None:
    """Make a data loader's worker leave signals to the process that owns it; a scheduler or a terminal sends them to both.

    A worker that fell to one would be taken for a fault while its owner saves. It ends when it has no owner, or is told that all is done.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
