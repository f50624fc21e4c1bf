"""Slots whose gradient is not finite, or out of proportion: whose fault that is, and what becomes of them.

Nothing of such a slot reaches the weights. It is computed once more, by another worker where there is one. If it is the
same again, data or model are at fault: the run ends, or the slot is skipped. If it is another, the worker that had it
first is at fault, unless that happens to one slot again and again.

In bounded and async mode the second one reads other weights. A slot that is out of proportion only the first time is
the first worker's fault if its norm was more than twice the second's; else the weights have moved, and it counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distgd import events as ev
from distgd.errors import DistgdError, Diverged, RunFailed
from distgd.ledger import Slot
from distgd.membership import FATAL, Membership
from distgd.norms import Norms
from distgd.sources import Order

FAR = 2.0
"""Norms of one slot, under weights a few updates apart, are within this factor."""


@dataclass(frozen=True)
class _Held:
    """A slot that is held back: who computed it, what came of it, what is wrong with it in words.

    `over` says that it is finite, and out of proportion.
    """

    worker: int
    stats: ev.SlotStats
    over: bool
    wrong: str


@dataclass(frozen=True)
class Passed:
    """The slot, in sync mode its whole step, is to count without effect; what to tell."""

    slot: Slot
    message: str


@dataclass(frozen=True)
class Blamed:
    """A worker is at fault, and why."""

    worker: int
    why: str


@dataclass(frozen=True)
class Fatal:
    """The run ends; `step` is the one at which it has diverged, None for another reason."""

    error: DistgdError
    step: int | None = None


Finding = Passed | Blamed | Fatal


class Suspicions:
    """What is held back.

    Args:
        norms: of the slots that have been applied; to be told of them.
        most: slots, or steps in sync mode, that may be skipped; 0 where the first one ends the run.

    Attributes:
        skipped: slots that count without effect, in sync mode the first bad one of each such step; committed state.
        blamed: how many workers each slot has been blamed on; it outlives rollbacks.
        void: steps before this one that are not in the weights count without effect; it outlives rollbacks, too.
        rollbacks: how often the run has gone back because it diverged.
        left_out: slots that are not in the weights for that reason (bounded, async); committed state.
    """

    def __init__(self, order: Order, members: Membership, norms: Norms, *, staged: bool, most: int) -> None:
        self._order, self._members, self._staged, self._most = order, members, staged, most
        self.norms = norms
        self.skipped: set[Slot] = set()
        self.blamed: Counter[Slot] = Counter()
        self.void, self.rollbacks = 0, 0
        self.left_out: set[Slot] = set()
        self._first: dict[Slot, _Held] = {}  # what came of each slot that is held back
        self._asked: dict[Slot, int] = {}  # who is to compute it again (sync)
        self._passed: set[Slot] = set()  # to be leased once more, to count without effect (bounded, async)

    # Sync.

    def poisoned(self, event: ev.Poisoned) -> list[ev.Send]:
        """A step is held back: ask for its first bad slot."""
        stats = event.stats[0]
        self._first[event.step, event.bad[0]] = self._hold(stats.worker, stats, over=self.norms.exceeds(stats))
        return self.ask()

    def ask(self) -> list[ev.Send]:
        """Have slots computed again that nobody who is there has been asked for."""
        workers, sends = self._members.workers, []
        for slot, held in self._first.items() if self._staged else ():
            others = [worker for worker in workers if worker != held.worker] or workers
            if others and self._asked.get(slot) not in workers:
                self._asked[slot] = others[0]
                sends.append(ev.Send(others[0], ev.Examine(self._members.cast.timeline, *slot)))
        return sends

    def examined(self, source: int, event: ev.Examined) -> Finding | None:
        """Somebody has computed a slot again; None where it was not asked for."""
        slot = event.step, event.stats.slot
        if self._asked.get(slot) != source:
            return None
        first = self._first.pop(slot)
        del self._asked[slot]
        same = (first.stats.loss, first.stats.squared_norm) == (event.stats.loss, event.stats.squared_norm)
        if event.bad or (first.over and same):
            return self._pass(slot, event.stats, first, source)
        return self._blame(slot, first, source)

    # Bounded, async.

    def withheld(self, source: int, ended: ev.LeaseEnded) -> Finding | None:
        """A worker found a slot not finite, or out of proportion, and pushed nothing; the second to do so decides."""
        slot = ended.step, ended.slot
        first = self._first.get(slot)
        if first is None:
            self._first[slot] = self._hold(source, ended.stats, over=not ended.bad)
            return None
        if first.worker == source and self._members.workers != [source]:  # it was alone when it got the slot again
            return None
        finding = self._pass(slot, ended.stats, first, source)
        self._passed.add(slot)
        return finding

    def applied(self, source: int, ended: ev.LeaseEnded) -> Finding | None:
        """A slot is in the weights, or counts without effect."""
        slot = ended.step, ended.slot
        if not ended.bad:
            self.norms.observe([ended.stats])
        elif slot not in self.skipped:
            self.left_out.add(slot)
        first = self._first.pop(slot, None)
        self._passed.discard(slot)
        if ended.bad or first is None or first.worker == source or first.worker not in self._members.cast.workers:
            return None
        if first.over and first.stats.squared_norm <= FAR**2 * ended.stats.squared_norm:
            return None
        return self._blame(slot, first, source)

    def not_for(self, worker: int) -> list[Slot]:
        """Slots that others are to compute."""
        if not self._first or self._members.workers == [worker]:
            return []
        return [slot for slot, held in self._first.items() if held.worker == worker and slot not in self._passed]

    def passes(self, slot: Slot) -> bool:
        """Whether a slot is to count without effect."""
        return slot in self._passed or slot[0] < self.void

    # Going back.

    def give_up(self, step: int) -> None:
        """The run goes back to before `step`, and on behind it."""
        self.rollbacks += 1
        self.void = step + 1

    def follow(self, before: Suspicions) -> None:
        """Know what the one before a rollback knew, and what a checkpoint from before it does not say."""
        self.blamed, self.void, self.rollbacks = before.blamed, before.void, before.rollbacks

    def as_dict(self) -> dict[str, Any]:
        """What is committed, for JSON."""
        return {
            "skipped": sorted(map(list, self.skipped)),
            "left_out": sorted(map(list, self.left_out)),
            "norms": self.norms.squares,
            "void": self.void,
            "rollbacks": self.rollbacks,
        }

    def restore(self, given: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave."""
        self.skipped = {(step, slot) for step, slot in given["skipped"]}
        self.left_out = {(step, slot) for step, slot in given["left_out"]}
        self.norms = Norms(self.norms.ratio, given["norms"])
        self.void, self.rollbacks = given["void"], given["rollbacks"]

    @property
    def without(self) -> set[Slot]:
        """Slots that count without effect (bounded, async)."""
        return self.skipped | self.left_out

    # What was found.

    def _hold(self, worker: int, stats: ev.SlotStats, *, over: bool) -> _Held:
        wrong = "not finite"
        if over:
            wrong = f"of norm {stats.squared_norm**0.5:.3g}, which is too large beside the last ones"
        return _Held(worker, stats, over, wrong)

    def _pass(self, slot: Slot, stats: ev.SlotStats, first: _Held, again: int) -> Finding:
        if slot not in self.skipped and len(self.skipped) >= self._most:
            return Fatal(self._diverged(slot, stats, first, again), slot[0])
        self.skipped.add(slot)
        what = f"step {slot[0]}" + ("" if self._staged else f", slot {slot[1]}")
        return Passed(slot, f"{what} is skipped, as slot {slot[1]} is {first.wrong}: {self._samples(slot)}")

    def _blame(self, slot: Slot, first: _Held, again: int) -> Finding:
        self.blamed[slot] += 1
        where, name = f"step {slot[0]}, slot {slot[1]}", self._members.cast.name
        if self.blamed[slot] >= FATAL:
            do = f"see whether loss and model give the same each time ({self._samples(slot)})"
            found = f"{first.wrong} {FATAL} times, by one worker after the other, and not so each time by the next one"
            return Fatal(RunFailed(f"{where}: expected the same from every worker, found {found}; {do}"))
        return Blamed(first.worker, f"it found {where} {first.wrong}, and {name(again)} did not")

    def _samples(self, slot: Slot) -> str:
        first, stop = self._order.places(*slot)
        return f"places {first} to {stop - 1} of epoch {self._order.epoch_of(slot[0])} in the order"

    def _diverged(self, slot: Slot, stats: ev.SlotStats, first: _Held, again: int) -> Diverged:
        do = "lower optimizer.lr, set optimizer.clip.norm, or look at these samples"
        if slot[0] == 0:  # no learning rate has had its part in it
            do = "look at the loss, the initial weights and these samples"
        expected = "a finite loss and gradient"
        if first.over:
            do = "raise consistency.max_grad_norm_ratio, or look at these samples"
            expected = f"a gradient norm of at most {self.norms.limit**0.5:.6g}, {self.norms.ratio:g} times the median"
        by = " and ".join(dict.fromkeys(map(self._members.cast.name, (first.worker, again))))
        skips = f", after {len(self.skipped)} that were skipped" if self.skipped else ""
        return Diverged(
            f"step {slot[0]}, slot {slot[1]}: expected {expected}, found loss {stats.loss}, squared "
            f"gradient norm {stats.squared_norm}, computed twice, by {by}{skips}; {do} ({self._samples(slot)}); it was "
            "not applied"
        )
