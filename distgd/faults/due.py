"""Which faults are due now. Chance is seeded and time an argument, so that the same plan gives the same run.

Faults are known by their places in the plan.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from distgd.faults.fault import MLFLOW_DOWN, Fault, texts


def chance_of(faults: Sequence[Fault], number: int, seed: int, whose: object = "") -> random.Random:
    """The chance of one fault: its own, whatever the rest of the plan draws."""
    fault = faults[number]
    return random.Random(f"{seed if fault.seed is None else fault.seed} {texts(faults)[number]} {whose}")


class Coming:
    """What steps and time bring.

    Args:
        done: how often faults have been delivered in an earlier process of the run.

    Attributes:
        armed: faults whose step is committed; what they wait for else is a process's to see.
        next: when `passed` has something to say again, infinity for never.
    """

    def __init__(self, faults: Sequence[Fault], seed: int, done: Mapping[int, int]) -> None:
        self._faults = faults
        self._left = {
            number: math.inf if fault.times is None else fault.times - done.get(number, 0)
            for number, fault in enumerate(faults)
        }
        self._chance = {n: chance_of(faults, n, seed, done.get(n, 0)) for n in range(len(faults))}
        self._strikes: dict[int, float] = {}  # when each that comes at random is due
        self.armed = {n for n, fault in enumerate(faults) if not fault.coming and not fault.step and self._left[n] > 0}
        self._waiting = {n for n in self._left if n not in self.armed and self._left[n] > 0}

    @property
    def next(self) -> float:
        return min(self._strikes.values(), default=math.inf)

    def at_start(self) -> list[int]:
        """Outages of MLflow before the first step: it is opened before anybody is there."""
        found = [n for n in sorted(self._waiting) if (f := self._faults[n]).what == MLFLOW_DOWN and not f.step]
        found = [n for n in found if self._faults[n].rate is None]
        self._waiting.difference_update(found)
        return found

    def stepped(self, steps: int, now: float) -> list[int]:
        """So many steps are committed: faults that begin to count; those that come at random come with `passed`."""
        begun = sorted(n for n in self._waiting if self._faults[n].step <= steps)
        self._waiting.difference_update(begun)
        found = []
        for number in begun:
            fault = self._faults[number]
            if not fault.coming:
                self.armed.add(number)
            if fault.coming and fault.rate is not None:
                self._draw(number, now)
            else:
                found.append(number)
        return found

    def passed(self, now: float) -> list[int]:
        """Faults that chance has brought by now."""
        found = []
        for number in sorted(n for n, at in self._strikes.items() if at <= now):
            found.append(number)
            self._left[number] -= 1
            del self._strikes[number]
            if self._left[number] > 0:
                self._draw(number, now)
        return found

    def victim(self, number: int, there: Sequence[int]) -> int | None:
        """Whom of those who may be meant it strikes; None of nobody."""
        return self._chance[number].choice(there) if there else None

    def _draw(self, number: int, now: float) -> None:
        rate = self._faults[number].rate
        assert rate is not None
        self._strikes[number] = now + self._chance[number].expovariate(rate)


class Own:
    """What one process brings upon itself by what it sends, and what it was told is due.

    Args:
        armed: faults that count already.
    """

    def __init__(self, faults: Sequence[Fault], role: str, index: int, armed: Collection[int]) -> None:
        self._faults = faults
        mine = [n for n, fault in enumerate(faults) if not fault.of_messages and fault.meets(role, index)]
        self._mine = {n for n in mine if faults[n].message is not None}
        self._counts: dict[int, int] = {n: 0 for n in self._mine if n in armed}
        self._refused: Counter[int] = Counter()  # writes that are to be refused

    def inject(self, number: int) -> int | None:
        """It is due, or armed; the fault, if it strikes at once."""
        if number in self._mine:
            self._counts.setdefault(number, 0)
            return None
        if self._faults[number].what == "disk full":
            self._refused[number] = self._faults[number].times or 1
            return None
        return number if self._faults[number].what in ("kill", "stop") else None

    def sends(self, kind: str) -> tuple[list[int], list[int]]:
        """A message of a kind is about to leave: faults that strike before, and when it has left."""
        before: list[int] = []
        after: list[int] = []
        for number, count in list(self._counts.items()):
            fault = self._faults[number]
            if fault.message != kind:
                continue
            self._counts[number] = count + 1
            if count + 1 == fault.number:
                del self._counts[number]
                self._mine.discard(number)
                (after if fault.sent else before).append(number)
        return before, after

    def writes(self) -> int | None:
        """A file is about to be written: the fault that refuses it."""
        number = next(iter(self._refused), None)
        if number is not None:
            self._refused[number] -= 1
            self._refused += Counter()  # drops those that are used up
        return number


@dataclass(frozen=True)
class Fate:
    """What becomes of a message.

    Args:
        late: seconds that it, and with it all that is sent behind it, waits.
        lost, doubled: at its first way; what is lost is sent again.
        astray: seconds that it may take, so that others overtake it.
        hits: the faults that did it.
    """

    late: float = 0.0
    lost: bool = False
    doubled: bool = False
    astray: float = 0.0
    hits: tuple[int, ...] = ()


@dataclass
class _Meant:
    """A fault of messages that counts, and how often it has been delivered."""

    fault: Fault
    chance: random.Random
    seen: int = 0
    hits: int = 0

    def meets(self, kind: str) -> bool:
        fault = self.fault
        if fault.message not in (None, kind) or (fault.times is not None and self.hits >= fault.times):
            return False
        self.seen += 1
        if fault.rate is not None:
            hit = self.chance.random() < fault.rate
        else:
            hit = fault.message is None or self.seen == fault.number
        self.hits += hit
        return hit


@dataclass
class Fates:
    """What becomes of the messages of one process.

    Args:
        armed: faults that count already.
        whose: of whom the chance is; each process has its own.
    """

    faults: Sequence[Fault]
    role: str
    index: int
    armed: Collection[int]
    seed: int
    whose: object
    _meant: dict[int, _Meant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number in sorted(self.armed):
            self.inject(number)

    @staticmethod
    def any(faults: Sequence[Fault], role: str, index: int) -> bool:
        """Whether the plan has a fault for the messages of a process."""
        return any(fault.of_messages and fault.meets(role, index) for fault in faults)

    def inject(self, number: int) -> None:
        """It is armed."""
        fault = self.faults[number]
        if fault.of_messages and fault.meets(self.role, self.index) and number not in self._meant:
            self._meant[number] = _Meant(fault, chance_of(self.faults, number, self.seed, self.whose))

    def first(self, kind: str) -> Fate:
        """Of a message that is sent for the first time."""
        hits = tuple(number for number, meant in self._meant.items() if meant.meets(kind))
        if not hits:
            return Fate()
        by = {self.faults[number].what: self.faults[number].seconds or 0.0 for number in hits}
        return Fate(by.get("delay", 0.0), "drop" in by, "duplicate" in by, by.get("reorder", 0.0), hits)

    def lost_again(self, kind: str) -> bool:
        """Whether one that is sent again is lost, too; what hit one message alone does not hit it twice."""
        drops = [m for m in self._meant.values() if m.fault.what == "drop" and m.fault.rate is not None]
        return any(meant.meets(kind) for meant in drops)
