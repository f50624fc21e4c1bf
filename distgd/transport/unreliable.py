"""What one process sends, over a way on which messages are late, lost, doubled and overtaken, on purpose.

The way lies between the process and its endpoint: sessions of both ends put right here what happens on it, so that each
message leaves once and in order, and late. So it is the same for every kind of connection, and for one that loses
nothing, as within a machine.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from distgd.faults import Fates
from distgd.transport.endpoint import Place
from distgd.transport.inmemory import Envelope
from distgd.transport.lossy import LossyNetwork

LATENCY = 1e-4  # seconds that what is doubled or overtaken takes besides
LEAVING = 1.0  # seconds that what is under way at the end may take to leave

Happen = Callable[[], None]


class Door(Protocol):
    """What a process needs of an endpoint."""

    def send(self, to: int, message: Any) -> None: ...

    def receive(self, timeout: float) -> tuple[int, Any] | None: ...

    def close(self) -> None: ...


class Timers:
    """Things to come, by a clock that is read."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Happen]] = []

    def after(self, seconds: float, happen: Happen) -> None:
        """Have something happen in so many seconds."""
        heapq.heappush(self._heap, (self._clock() + seconds, next(self._order), happen))

    def run(self) -> float:
        """Let happen what is due; seconds until the next."""
        while self._heap and self._heap[0][0] <= self._clock():
            heapq.heappop(self._heap)[2]()
        return self._heap[0][0] - self._clock() if self._heap else math.inf


class Unreliable:
    """An endpoint whose messages go over such a way.

    Args:
        me: whose it is.
        fates: what becomes of each message.
        hit: is told of each fault that hits one.
        clock: seconds.
        after: has something happen in so many seconds; None where `receive` is to see to it.
    """

    def __init__(
        self,
        inner: Any,
        me: int,
        fates: Fates,
        hit: Callable[[int], None],
        clock: Callable[[], float],
        after: Callable[[float, Happen], None] | None = None,
    ) -> None:
        self._inner, self._me, self._fates, self._hit, self._clock = inner, me, fates, hit, clock
        self._timers = Timers(clock)
        self._after = after or self._timers.after
        self._free: dict[int, float] = {}  # when what is sent to somebody may leave, at the earliest
        self._ways: list[float] = []  # of the message that is being sent for the first time
        self._under_way = 0
        self._lossy = LossyNetwork(self._carried, self._after, self._left, lambda incarnation: True)

    def send(self, to: int, message: Any) -> None:
        """Send on; late, where that is its fate or that of one before it."""
        fate = self._fates.first(type(message).__name__)
        for number in fate.hits:
            self._hit(number)
        astray = LATENCY if fate.astray == 0.0 else fate.astray
        ways = [] if fate.lost else [astray, 2 * astray] if fate.doubled else [fate.astray]
        now = self._clock()
        due = self._free[to] = max(now + fate.late, self._free.get(to, 0.0))
        self._under_way += 1
        if due <= now:
            self._carry(Envelope(self._me, to, message), ways)
        else:
            self._after(due - now, lambda: self._carry(Envelope(self._me, to, message), ways))

    def _carry(self, envelope: Envelope, ways: list[float]) -> None:
        self._ways = ways
        self._lossy.send(envelope)

    def _carried(self, envelope: Envelope | None, again: bool) -> list[float]:
        if envelope is None:
            return [0.0]
        if not again:
            return self._ways
        return [] if self._fates.lost_again(type(envelope.message).__name__) else [0.0]

    def _left(self, envelope: Envelope) -> None:
        self._under_way -= 1
        self._inner.send(envelope.destination, envelope.message)

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """What the endpoint has; meanwhile what is under way goes on."""
        until = self._clock() + timeout
        while True:
            following = self._timers.run()
            arrived: tuple[int, Any] | None = self._inner.receive(max(0.0, min(following, until - self._clock())))
            if arrived is not None or self._clock() >= until:
                return arrived

    def meet(self, machine: str, places: Mapping[int, Place]) -> None:
        """As the endpoint."""
        self._inner.meet(machine, places)

    def close(self) -> None:
        """Let what is under way leave, and close the endpoint."""
        until = self._clock() + LEAVING
        while self._under_way and self._clock() < until:
            self._inner.receive(max(0.0, min(self._timers.run(), until - self._clock())))
        self._inner.close()
