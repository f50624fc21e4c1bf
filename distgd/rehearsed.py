"""A process that faults of a plan are meant for: the same process, and what happens to it on purpose.

An actor around an actor. It sees what the inner one sends and writes, and puts a `Strike` in the place where a fault is
due; what the process then does is what it would do without a plan.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distgd import events as ev
from distgd.checkpoint import Writing
from distgd.faults import Fates, Fault, Own, texts
from distgd.injected import Journal
from distgd.process import Actor, Places, Spec, Tells
from distgd.transport import Unreliable
from distgd.transport.segments import Allocate


@dataclass(frozen=True)
class RehearsedSpec:
    """The specification of a process, and what is meant for it.

    Args:
        incarnation, place, index: who it is: the place is its role in words of a plan.
        armed: faults that count from the beginning.
        run_dir: where what was delivered is written down.
    """

    spec: Spec
    incarnation: int
    place: str
    index: int
    faults: tuple[Fault, ...]
    armed: frozenset[int]
    seed: int
    run_dir: str

    @property
    def role(self) -> str:
        return self.spec.role

    @property
    def rules(self) -> Any:
        return self.spec.rules

    def build(self, clock: Callable[[], float], allocate: Allocate) -> Rehearsed:
        """The actor, with another one around it."""
        return Rehearsed(self, self.spec.build(clock, allocate))


class Rehearsed:
    """The outer actor."""

    def __init__(self, spec: RehearsedSpec, actor: Actor) -> None:
        self.spec, self._actor = spec, actor
        self._own = Own(spec.faults, spec.place, spec.index, spec.armed)
        whose = f"{spec.place} {spec.index} {spec.incarnation}"
        self._fates = Fates(spec.faults, spec.place, spec.index, spec.armed, spec.seed, whose)
        self._texts, self._journal = texts(spec.faults), Journal(spec.run_dir)
        self._told: set[int] = set()
        self._over = False
        if isinstance(actor, Places):
            self.place = actor.place
        if isinstance(actor, Tells):
            self.facts = actor.facts

    def carrier(
        self, endpoint: Any, clock: Callable[[], float], after: Callable[[float, Callable[[], None]], None] | None
    ) -> Any:
        """The endpoint that its messages go over."""
        spec = self.spec
        if not Fates.any(spec.faults, spec.place, spec.index):
            return endpoint
        return Unreliable(endpoint, spec.incarnation, self._fates, self._hit, clock, after)

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        if isinstance(event, ev.Inject):
            return self._inject(event.fault)
        return list(self._watched(self._actor.handle(source, event)))

    def perform(self, work: Any, emit: Callable[[ev.Effect], None]) -> Any:
        def watched(effect: ev.Effect) -> None:
            for each in self._watched([effect]):
                emit(each)

        return self._actor.perform(work, watched)

    def _inject(self, number: int) -> list[ev.Effect]:
        self._fates.inject(number)
        strikes = self._own.inject(number)
        return [] if strikes is None else list(self._strikes([strikes]))

    def _watched(self, effects: Iterable[ev.Effect]) -> Iterator[ev.Effect]:
        for effect in effects:
            if self._over:
                return
            match effect:
                case ev.Send(_, message):
                    before, after = self._own.sends(type(message).__name__)
                    yield from self._strikes(before)
                    if not self._over:
                        yield effect
                    yield from self._strikes(after)
                case ev.Update(later):
                    yield ev.Update(self._watched(later))
                case ev.Beside(Writing() as writing) if (number := self._own.writes()) is not None:
                    self._hit(number)
                    yield ev.Beside(_Refused(writing))
                case _:
                    yield effect

    def _strikes(self, numbers: Sequence[int]) -> Iterator[ev.Effect]:
        for number in numbers:
            fault = self.spec.faults[number]
            self._hit(number)
            self._over |= fault.what == "kill"
            yield ev.Strike(fault.what, fault.seconds)

    def _hit(self, number: int) -> None:
        """Write down that a fault was delivered; of messages the first is enough."""
        if number not in self._told or not self.spec.faults[number].of_messages:
            self._told.add(number)
            self._journal.add(self._texts[number], f"{self.spec.place} {self.spec.index}")


class _Refused:
    """A file that a full disk does not take."""

    def __init__(self, writing: Writing) -> None:
        self._writing = writing

    def begin(self) -> None:
        self._writing.refuse(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def finish(self) -> Any:
        return self._writing.finish()
