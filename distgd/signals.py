"""SIGINT and SIGTERM during a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, or what means the same: the text says what."""


class Signals:
    """What has been heard, and what comes of it.

    A signal raises `KeyboardInterrupt`, or `Terminated`, wherever the program is; not where it is `patient`, and looks
    at `heard` from time to time itself: there the first one is noted, and the second raises. Where it is `deaf` nothing
    happens.
    """

    def __init__(self, deaf: Callable[[], bool]) -> None:
        self._deaf = deaf
        self.patient = False
        self.heard: KeyboardInterrupt | None = None

    def listen(self) -> None:
        """Set the handlers once more, after somebody else did; raises what others have swallowed meanwhile.

        An exception that a handler raises ends in whatever code is running, and where that is a callback, Python only
        prints it.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)
        if self.heard is not None and not self.patient:
            raise self.heard

    def _hear(self, number: int, _: object) -> None:
        if self._deaf():
            return
        first = self.heard is None
        self.heard = Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt()
        if not (self.patient and first):
            raise self.heard


@contextmanager
def interruptible(deaf: Callable[[], bool]) -> Iterator[Signals]:
    """Hear both signals until the end, where the former handlers come back; in the main thread alone."""
    signals = Signals(deaf)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.listen()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
