"""MLflow's store that does not answer for a while, on purpose: a fault of the run's plan (`distgd.faults`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from distgd.records import Event, RunEnd, RunInfo
from distgd.tracking.store import Store


class Outage:
    """Says when the store is down; `store` makes one that then answers nothing."""

    def __init__(self) -> None:
        self._until = -math.inf

    def begin(self, seconds: float | None) -> None:
        """It is down from now on, for so many seconds; with None for good."""
        self._until = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raise what an unreachable store would have raised."""
        if time.monotonic() < self._until:
            raise ConnectionError("the store is down, as the plan of faults has it")

    def store(self, info: RunInfo) -> Store:
        """A run in a store that may be down."""
        return _Reached(info, self)


class _Reached(Store):
    def __init__(self, info: RunInfo, outage: Outage) -> None:
        super().__init__(info)
        self._outage = outage

    def open(self) -> None:
        self._outage.check()
        super().open()

    def describe(self) -> None:
        self._outage.check()
        super().describe()

    def behind(self, every: int) -> list[Event]:
        self._outage.check()
        return super().behind(every)

    def write(self, events: Iterable[Event]) -> None:
        self._outage.check()
        super().write(events)

    def closing(self, end: RunEnd) -> list[tuple[str, Callable[[], None]]]:
        def checked(call: Callable[[], None]) -> Callable[[], None]:
            def then() -> None:
                self._outage.check()
                call()

            return then

        return [(what, checked(call)) for what, call in super().closing(end)]
