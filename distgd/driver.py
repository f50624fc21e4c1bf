"""The driver's decisions: who computes what, when to evaluate, what to record, when the run is over.

`handle(source, event, now) -> [effect]`, like every other state machine here: it neither sends nor waits, and time is
an argument. The driver is not on the step's path: shards tell it what was committed, and it grants leases where the
mode has them. What it knows is lost with its process; the files that the trainer writes from its effects are not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distgd import errors
from distgd import events as ev
from distgd.errors import BadInput, DistgdError, Diverged, ProcessLost, RunFailed
from distgd.ledger import Ledger, assign
from distgd.optim import OptimizerSpec, Schedule
from distgd.sources import Order
from distgd.tally import Tally

FINAL = 1 << 30
"""The number of the run's last snapshot, above all others."""


@dataclass(frozen=True, slots=True)
class Log:
    """An event for trackers and the live line."""

    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Account:
    """A line of the ledger file."""

    line: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over: `error` is None where it was completed."""

    error: DistgdError | None


Effect = ev.Send | Log | Account | Finish


@dataclass(frozen=True)
class Cast:
    """Who plays what: incarnations by role, shards in the order of their index."""

    timeline: int
    shards: tuple[int, ...]
    workers: tuple[int, ...]
    evaluator: int | None

    @property
    def everybody(self) -> tuple[int, ...]:
        """Every incarnation but the driver's, shards first."""
        return (*self.shards, *self.workers, *([self.evaluator] if self.evaluator is not None else []))

    def name(self, incarnation: int) -> str:
        """An incarnation as people know it.

        >>> Cast(1, (1, 2), (3,), 4).name(2)
        'shard 1'
        """
        for role, members in (("worker", self.workers), ("shard", self.shards)):
            if incarnation in members:
                return f"{role} {members.index(incarnation)}"
        return "the evaluator" if incarnation == self.evaluator else f"process {incarnation}"


@dataclass(frozen=True)
class Assignment:
    """What the run is to do: `steps` global batches of `order` in one mode.

    `staged` is sync mode; elsewhere `staleness` is the bound, None in async. Evaluation happens every
    `evaluate_steps` or every `evaluate_seconds`, and at the end.
    """

    order: Order
    steps: int
    staged: bool
    staleness: int | None
    optimizer: OptimizerSpec
    schedule: Schedule
    evaluate_steps: int | None
    evaluate_seconds: float | None

    def versions(self, steps: int) -> int:
        """The version after so many steps: one a step, or one for each slot that holds samples."""
        if self.staged:
            return steps
        epochs, rest = divmod(steps, self.order.steps_per_epoch)
        return epochs * self._updates(self.order.steps_per_epoch) + self._updates(rest)

    def steps_of(self, version: int) -> int:
        """The whole steps in a version."""
        if self.staged:
            return version
        epochs, rest = divmod(version, self._updates(self.order.steps_per_epoch))
        return epochs * self.order.steps_per_epoch + rest // self.order.slots

    def _updates(self, steps: int) -> int:
        """Slots that hold samples in an epoch's first `steps`; only its last batch may be short."""
        if steps < self.order.steps_per_epoch:
            return steps * self.order.slots
        return (steps - 1) * self.order.slots + self.order.filled(steps - 1)

    def slots(self) -> Iterator[tuple[int, int]]:
        """Every (step, slot) that holds samples, in order."""
        return ((t, k) for t in range(self.steps) for k in range(self.order.filled(t)))


class Driver:
    """The state machine; the trainer performs its effects."""

    def __init__(self, cast: Cast, assignment: Assignment, now: float) -> None:
        self.cast = cast
        self.assignment = assignment
        self.tally = Tally(assignment.optimizer, assignment.schedule, now)
        self.final: dict[int, ev.SnapshotSent] = {}  # the last version, by shard
        self.finished = False
        self._workers = list(cast.workers)
        self._live = {ev.DRIVER, *cast.everybody}
        self._newest = max(self._live)
        self._generation = 0
        limit = None if assignment.staleness is None else assignment.staleness + 1
        self._ledger = Ledger(assignment.slots(), limit)
        self._requests: deque[int] = deque()  # workers that have room for a lease, in the order they asked
        self._gathered: list[tuple[int, ev.LeaseEnded]] = []  # applied slots that do not make a whole step yet
        self._evaluations = _Evaluations(assignment, now)
        self._scored = cast.evaluator is None  # whether the last version's evaluation is in

    def start(self) -> list[Effect]:
        """Tell everybody who is who, which sets the workers off."""
        return [*self._evaluate(self.tally.began), *self._announce()]

    def handle(self, source: int, event: Any, now: float) -> list[Effect]:
        """Take one message of incarnation `source`."""
        match event:
            case ev.ProcessLost():
                return self._lost(event, now)
            case ev.ProcessFailed():
                return [Finish(_failure(self.cast.name(source), event))]
            case _ if event.timeline != self.cast.timeline or source not in self._live:
                return []
            case ev.StepCommitted():
                return self._committed(event, now)
            case ev.LeaseRequested():
                self._requests.append(source)
                return self._grant(now)
            case ev.LeaseEnded():
                return self._ended(source, event, now)
            case ev.Evaluated():
                return self._evaluated(event, now)
            case ev.SnapshotSent():
                self.final[event.shard] = event
                return self._end()
            case _:
                return []

    # Membership.

    def _announce(self) -> list[Effect]:
        self._generation += 1
        table = assign(self.assignment.order.slots, self._workers) if self.assignment.staged else ()
        live = frozenset(self._live)
        event = ev.MembershipChanged(self.cast.timeline, self._generation, live, self._newest, table)
        return [ev.Send(to, event) for to in sorted(self._live - {ev.DRIVER})]

    def _lost(self, lost: ev.ProcessLost, now: float) -> list[Effect]:
        if lost.incarnation not in self._live:
            return []
        why = f"{self.cast.name(lost.incarnation)} is gone: {lost.why}"
        self._live.discard(lost.incarnation)
        if lost.incarnation not in self._workers or len(self._workers) == 1:
            return [Finish(ProcessLost(why))]
        self._workers.remove(lost.incarnation)
        self._requests = deque(worker for worker in self._requests if worker != lost.incarnation)
        expired = [lease.number for lease in self._ledger.expire(lost.incarnation)]
        closing = [effect for number in expired for effect in self._expire(lost.incarnation, number)]
        fault = Log(self.tally.event("fault", now, {}, message=why))
        return [fault, *closing, *self._announce(), *self._grant(now)]

    def _expire(self, worker: int, lease: int) -> list[Effect]:
        return self._to_shards(ev.LeaseExpired(self.cast.timeline, worker, lease))

    def _to_shards(self, message: Any) -> list[Effect]:
        return [ev.Send(shard, message) for shard in self.cast.shards]

    # Leases (bounded, async).

    def _grant(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        busy = {lease.worker for lease in self._ledger.open.values()}
        for worker in sorted(self._requests, key=busy.__contains__):  # those without a slot before those with one
            lease = self._ledger.grant(worker, now)
            if lease is None:
                break
            self._requests.remove(worker)
            granted = ev.LeaseGranted(self.cast.timeline, lease.number, lease.step, lease.slot)
            effects.append(ev.Send(worker, granted))
        return effects

    def _ended(self, source: int, ended: ev.LeaseEnded, now: float) -> list[Effect]:
        applied = ended.outcome == "applied"
        if self._ledger.end(ended.lease, applied=applied) is None:
            return []
        if not applied:
            return [*self._expire(source, ended.lease), *self._grant(now)]
        if ended.bad:
            return [Finish(_diverged(ended.step, (ended.slot,), (ended.stats,)))]
        self.tally.versions += 1
        self.tally.samples += ended.stats.samples
        self.tally.staleness.append(max(ended.staleness))
        self._gathered.append((source, ended))
        return [self._account(ended.step, ended.slot, "applied"), *self._grant(now), *self._gather(now)]

    def _gather(self, now: float) -> list[Effect]:
        """Each K applied slots, fewer for a short last batch, are a step on the x-axis."""
        if len(self._gathered) < self.assignment.order.filled(self.tally.steps):
            return []
        part, self._gathered = self._gathered, []
        stale = [max(ended.staleness) for _, ended in part]
        times: dict[int, dict[str, float]] = {}
        for worker, ended in part:
            spent = times.setdefault(worker, {})
            for phase, seconds in ended.times.items():
                spent[phase] = spent.get(phase, 0.0) + seconds
        extra = {"staleness/mean": sum(stale) / len(stale), "staleness/max": float(max(stale))}
        return self._stepped([ended.stats for _, ended in part], times, extra, now)

    # Steps.

    def _committed(self, event: ev.StepCommitted, now: float) -> list[Effect]:
        if not event.applied:
            return [Finish(_diverged(event.step, event.bad, event.stats))]
        dropped = [k for k in range(self.assignment.order.filled(event.step)) if k not in event.slots]
        lines = [self._account(event.step, s.slot, "applied") for s in event.stats if s.samples]
        lines += [self._account(event.step, k, "dropped") for k in dropped]
        self.tally.versions += 1
        self.tally.samples += sum(s.samples for s in event.stats)
        self.tally.dropped += sum(a.line["last"] - a.line["first"] + 1 for a in lines if a.line["state"] == "dropped")
        self.tally.late_slots += event.late
        self.tally.staleness.append(0)
        extra = {"staleness/mean": 0.0, "staleness/max": 0.0, "time/apply": 1e3 * event.apply_seconds}
        if event.norm is not None:
            extra |= {"grad/norm": event.norm, "grad/clip": event.clip}
        if self.tally.dropped:
            extra |= {"quorum/dropped_slots": float(len(dropped)), "quorum/late_slots": float(event.late)}
        known = event.since and self.tally.first_commit is not None
        at = min(now, self.tally.last_commit + event.since) if known else now
        return [*lines, *self._stepped(list(event.stats), event.times, extra, now, at)]

    def _stepped(
        self,
        stats: list[ev.SlotStats],
        times: dict[int, dict[str, float]],
        extra: dict[str, float],
        now: float,
        at: float | None = None,
    ) -> list[Effect]:
        """A step is done; it was `at`, if not now."""
        index = {worker: i for i, worker in enumerate(self.cast.workers)}
        by_index = {index[worker]: spent for worker, spent in times.items() if worker in index}
        log = Log(self.tally.stepped(stats, by_index, extra, now if at is None else at))
        return [log, *(self._evaluate(now) if self.tally.steps < self.assignment.steps else self._finale())]

    def _account(self, step: int, slot: int, state: str) -> Account:
        first, stop = self.assignment.order.places(step, slot)
        return Account(
            {
                "epoch": self.assignment.order.epoch_of(step),
                "step": step,
                "slot": slot,
                "state": state,
                "first": first,
                "last": stop - 1,
                "timeline": self.cast.timeline,
                "generation": self._generation,
                "shard": "all",
            }
        )

    # Evaluation and the end.

    def _evaluate(self, now: float) -> list[Effect]:
        """Ask for the next snapshot ahead of time."""
        if self.cast.evaluator is None:
            return []
        step = self._evaluations.next(self.tally.steps, now)
        self.tally.skipped_evaluations = self._evaluations.skipped
        if step is None:
            return []
        return self._snapshot(self._evaluations.number, self.assignment.versions(step), evaluate=True)

    def _snapshot(self, number: int, version: int, *, evaluate: bool) -> list[Effect]:
        take = ev.TakeSnapshot(self.cast.timeline, number, version)
        asked = [ev.Send(self.cast.shards[0], take)] if self.assignment.staged else self._to_shards(take)
        return [*asked, *(self._score(number) if evaluate else [])]

    def _score(self, number: int) -> list[Effect]:
        assert self.cast.evaluator is not None
        return [ev.Send(self.cast.evaluator, ev.Evaluate(self.cast.timeline, number))]

    def _finale(self) -> list[Effect]:
        """The last version: its weights come here, and it is always evaluated."""
        idle = self.cast.evaluator is not None and not self._evaluations.running
        last = self._snapshot(FINAL, self.assignment.versions(self.assignment.steps), evaluate=idle)
        return [*last, *self._to_shards(ev.SnapshotPulled(self.cast.timeline, FINAL))]

    def _evaluated(self, event: ev.Evaluated, now: float) -> list[Effect]:
        metrics = {f"eval/{name}": value for name, value in event.metrics.items()} | {"time/eval": 1e3 * event.seconds}
        step = self.assignment.steps if event.number == FINAL else self.assignment.steps_of(event.version)
        log = Log({**self.tally.event("eval", now, metrics), "step": step, "version": event.version})
        self._evaluations.running = False
        if event.number == FINAL:
            self._scored = True
            return [log, *self._end()]
        over = self.tally.steps >= self.assignment.steps
        return [log, *(self._score(FINAL) if over else self._evaluate(now))]

    @property
    def whole(self) -> bool:
        """Whether the last version's weights are here, from every shard."""
        return len(self.final) == len(self.cast.shards)

    def _end(self) -> list[Effect]:
        if self.finished or not self._scored or not self.whole:
            return []
        self.finished = True
        return [Finish(None)]


class _Evaluations:
    """Which steps are evaluated: one at a time, asked for ahead; those that come due meanwhile are skipped, counted."""

    def __init__(self, assignment: Assignment, now: float) -> None:
        self.by_steps = assignment.evaluate_steps is not None
        self.interval = float(assignment.evaluate_steps or assignment.evaluate_seconds or 1)
        self.due = self.interval if self.by_steps else now + self.interval
        self.last = assignment.steps
        self.running = False
        self.number = 0
        self.skipped = 0

    def next(self, step: int, now: float) -> int | None:
        """The step to ask for at `step` and `now`, None for none; the last step is asked for by the run's end."""
        at = step if self.by_steps else now
        while self.due < at and (self.running or self.by_steps):
            self.due += self.interval
            self.skipped += 1
        if self.running or (not self.by_steps and now < self.due):
            return None
        wanted = int(self.due) if self.by_steps else step + 1
        if wanted >= self.last:
            return None
        self.due = wanted + self.interval if self.by_steps else now + self.interval
        self.running = True
        self.number += 1
        return wanted


def _failure(name: str, event: ev.ProcessFailed) -> DistgdError:
    kind = getattr(errors, event.kind, RunFailed)
    error: DistgdError = (kind if kind is BadInput else RunFailed)(f"{name}: {event.message}")
    return error


def _diverged(step: int, bad: tuple[int, ...], stats: tuple[ev.SlotStats, ...]) -> Diverged:
    slots = ", ".join(map(str, bad))
    found = {s.slot: f"loss {s.loss}, squared gradient norm {s.squared_norm}" for s in stats}
    return Diverged(
        f"step {step}, slot {slots}: expected a finite loss and gradient, found {found.get(bad[0], 'neither')}; "
        "lower optimizer.lr, set optimizer.clip.norm, or look at these samples; it was not applied"
    )
