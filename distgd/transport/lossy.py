"""A network that loses, doubles, delays and reorders, on one thread; sessions put right what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from distgd.transport.inmemory import Envelope
from distgd.transport.session import Session

AGAIN = 2e-3  # virtual seconds until what is not confirmed is sent again


@dataclass(frozen=True)
class Loss:
    """What a network does: the fraction of messages that it loses, that it doubles; seconds that one takes, at most."""

    lost: float = 0.1
    doubled: float = 0.1
    delay: float = 1e-3

    def ways(self, chance: Random) -> list[float]:
        """When each copy of a message arrives, in seconds; none where it is lost."""
        if chance.random() < self.lost:
            return []
        doubled = chance.random() < self.doubled
        return [chance.uniform(0.0, self.delay) for _ in range(1 + doubled)]


class LossyNetwork:
    """Carries envelopes from one living process to another, once and in order.

    Args:
        ways: when each copy of an envelope arrives, in seconds, none where it is lost; `again` where it was sent
            before. A confirmation is no envelope: None.
        after: have something happen in so many virtual seconds.
        deliver: takes an envelope that has arrived.
        lives: whether there is such a process.

    Attributes:
        counted: how often something was lost, doubled, refused as taken before or too early, sent again.
    """

    def __init__(
        self,
        ways: Callable[[Envelope | None, bool], list[float]],
        after: Callable[[float, Callable[[], None]], None],
        deliver: Callable[[Envelope], None],
        lives: Callable[[int], bool],
    ) -> None:
        self._ways, self._after, self._deliver, self._lives = ways, after, deliver, lives
        self._sessions: dict[tuple[int, int], Session[Envelope]] = {}
        self._waiting: set[tuple[int, int]] = set()  # pairs that look again whether all is confirmed
        self.counted: Counter[str] = Counter()

    def send(self, envelope: Envelope) -> None:
        """Take a message."""
        way = envelope.source, envelope.destination
        number = self._session(way).add(envelope)
        self._carry(self._ways(envelope, False), lambda: self._arrived(way, number, envelope))
        self._look_later(way)

    def _session(self, way: tuple[int, int]) -> Session[Envelope]:
        return self._sessions.setdefault(way, Session())

    def _carry(self, ways: list[float], arrive: Callable[[], None]) -> None:
        self.counted["lost"] += not ways
        self.counted["doubled"] += len(ways) > 1
        for late in ways:
            self._after(late, arrive)

    def _arrived(self, way: tuple[int, int], number: int, envelope: Envelope) -> None:
        source, to = way
        if not self._lives(to):
            return
        back = self._session((to, source))
        if back.take(number):
            self._deliver(envelope)
        else:
            self.counted["refused"] += 1
        told = back.told()
        self._carry(self._ways(None, False), lambda: self._session(way).confirmed(told))

    def _look_later(self, way: tuple[int, int]) -> None:
        if way not in self._waiting:
            self._waiting.add(way)
            self._after(AGAIN, lambda: self._look(way))

    def _look(self, way: tuple[int, int]) -> None:
        self._waiting.discard(way)
        rest = self._session(way).rest()
        if not rest or not all(map(self._lives, way)):
            return
        for number, envelope in rest:
            self.counted["again"] += 1
            arrive = partial(self._arrived, way, number, envelope)
            self._carry(self._ways(envelope, True), arrive)
        self._look_later(way)
