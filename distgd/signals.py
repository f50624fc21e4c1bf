"""SIGINT and SIGTERM during a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(deaf: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """SIGTERM ends a run as Ctrl-C does, and neither interrupts what ends the processes.

    Yields what sets the handlers once more, after somebody else did; it raises what others have swallowed meanwhile: an
    exception that a handler raises ends in whatever code is running, and where that is a callback, Python only prints
    it. Elsewhere than in the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    heard = False

    def interrupt(*_: object) -> None:
        nonlocal heard
        if not deaf():
            heard = True
            raise KeyboardInterrupt

    def listen() -> None:
        for number in before:
            signal.signal(number, interrupt)
        if heard:  # and here we are
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
