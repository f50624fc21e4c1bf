"""How many slots of a step each worker gets (sync): so that all are done at about the same time.

Who computes a slot changes no bit of a step, so that shares may follow the workers' speed. They change rarely: another
table makes some slots be computed twice in the step in which it arrives, and timings are noisy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from distgd.events import SlotStats

SEEN = 40  # slots of a worker that its speed is judged by
QUICK = 0.25  # of them are quicker than what counts as its speed: who shares a core is slow at times, and not slow
EVERY = 20  # steps until the first look, and between two; twice as many after each change, so that noise calms down
GAIN = 0.2  # of the longest time to compute, which another table must save

Shares = Mapping[int, int]
"""Slots of a step by worker."""


def fair(seconds: Mapping[int, float], slots: int) -> dict[int, int]:
    """The shares whose slowest worker is done first; one slot each before anybody has two.

    Each slot in turn goes to whoever would be done with it first, which is optimal for slots of one size.

    Args:
        seconds: that a slot takes, by worker.

    >>> fair({1: 1.0, 2: 1.0, 3: 3.0}, 7)
    {1: 3, 2: 3, 3: 1}
    """
    shares = dict.fromkeys(seconds, 0)
    for _ in range(slots):
        empty = [worker for worker, count in shares.items() if count == 0]
        who = min(empty or shares, key=lambda worker: (shares[worker] + 1) * seconds[worker])
        shares[who] += 1
    return shares


def longest(shares: Shares, seconds: Mapping[int, float]) -> float:
    """Seconds until the last worker is done."""
    return max(count * seconds[worker] for worker, count in shares.items())


class Speeds:
    """What workers took for their slots lately, and whether other shares are worth it. It outlives no driver.

    Args:
        step: the first one that is to be observed.
    """

    def __init__(self, step: int = 0) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._every = EVERY
        self._next = step + EVERY

    def observe(self, computed: Iterable[SlotStats]) -> None:
        """Count the slots of a step."""
        for stats in computed:
            if stats.samples:
                self._seconds.setdefault(stats.worker, deque(maxlen=SEEN)).append(stats.seconds)

    def better(self, step: int, table: Sequence[int], workers: Sequence[int]) -> dict[int, int] | None:
        """Shares that would save enough; None where the table's are as good, or it is no time to look.

        Args:
            step: so many are done.
            table: who computes each slot now.
            workers: those among whom slots are shared.
        """
        if step < self._next:
            return None
        self._next = step + self._every
        known = {w: _speed(taken) for w in workers if len(taken := self._seconds.get(w, deque())) == SEEN}
        if len(known) < max(2, len(workers)) or set(table) != set(workers) or min(known.values()) <= 0.0:
            return None
        now = {worker: table.count(worker) for worker in workers}
        shares = fair(known, len(table))
        if longest(shares, known) > (1.0 - GAIN) * longest(now, known):
            return None
        self._every *= 2
        self._next = step + self._every
        return shares


def _speed(seconds: Iterable[float]) -> float:
    ordered = sorted(seconds)
    return ordered[int(QUICK * len(ordered))]
