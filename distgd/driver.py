"""The driver's decisions: who computes what, when to evaluate, what to record, when the run is over.

`handle(source, event, now) -> [effect]`, like every other state machine here: it neither sends nor waits, and time is
an argument. The driver is not on the step's path: shards tell it what was committed, and it grants leases where the
mode has them. What it knows is lost with its process; the files that the trainer writes from its effects are not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from distgd import errors
from distgd import events as ev
from distgd.assignment import Assignment, Cast
from distgd.errors import BadInput, DistgdError, Diverged, ProcessLost, RunFailed
from distgd.evaluations import Best, Evaluations
from distgd.ledger import Ledger, assign
from distgd.stopping import Stop
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
class Keep:
    """The weights of the best evaluation so far are here."""

    best: Best


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over: `error` is None where it was completed or stopped."""

    error: DistgdError | None


Effect = ev.Send | Log | Account | Keep | Finish


class Driver:
    """The state machine; the trainer performs its effects."""

    def __init__(self, cast: Cast, assignment: Assignment, now: float, nodes: tuple[tuple[int, ...], ...] = ()) -> None:
        self.cast = cast
        self._nodes = nodes if len(nodes) > 1 else ()
        self.assignment = assignment
        self.tally = Tally(assignment.optimizer, assignment.schedule, now)
        self.final: dict[int, ev.SnapshotSent] = {}  # the last version, by shard
        self.finished = False
        self.steps = assignment.steps  # where the run ends; fewer once that is decided
        self.ended: str | None = None  # why it ends before the planned steps
        self.timed = False  # whether the step at which it ends depends on how fast everybody was
        self.stopped = False  # whether that was asked for from outside
        self._workers = list(cast.workers)
        self._live = {ev.DRIVER, *cast.everybody}
        self._newest = max(self._live)
        self._generation = 0
        limit = None if assignment.staleness is None else assignment.staleness + 1
        self._ledger = Ledger(assignment.slots(), limit)
        self._requests: deque[int] = deque()  # workers that have room for a lease, in the order they asked
        self._gathered: list[tuple[int, ev.LeaseEnded]] = []  # applied slots that do not make a whole step yet
        self.evaluations = Evaluations(assignment, now)
        self._limit: int | None = None  # the steps that may be committed before the next word
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
                return self._sent(event, now)
            case ev.Limited():
                return self._ends_at(event.steps) if self.ended else []
            case _:
                return []

    def stop(self, stop: Stop) -> list[Effect]:
        """End the run cleanly, as somebody outside asks for."""
        before = self.ended
        effects = self._end_early(f"stopped: {stop.why}")
        self.stopped = self.stopped or self.ended is not before  # one that comes when the run is over changes nothing
        return effects

    # Membership.

    def _announce(self) -> list[Effect]:
        self._generation += 1
        nodes = tuple(tuple(i for i in node if i in self._live and i != self.cast.evaluator) for node in self._nodes)
        beside = [i for node in nodes for i in node if i in self._workers] or self._workers
        table = assign(self.assignment.order.slots, beside) if self.assignment.staged else ()
        live = frozenset(self._live)
        event = ev.MembershipChanged(self.cast.timeline, self._generation, live, self._newest, table, nodes)
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
        if self._over:
            return [log, *self._finale()]
        seconds = self.assignment.seconds
        if seconds is not None and now - self.tally.began >= seconds:
            return [log, *self._end_early(f"stop.seconds: {now - self.tally.began:.1f} s since training began")]
        return [log, *self._evaluate(now)]

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

    # Evaluation.

    def _evaluate(self, now: float) -> list[Effect]:
        """Ask for the next snapshot ahead of time; where training waits for evaluations, let it go on to there."""
        if self.cast.evaluator is None or self.ended:
            return []
        step = self.evaluations.next(self.tally.steps, now)
        self.tally.skipped_evaluations = self.evaluations.skipped
        if step is None:
            return [] if self.evaluations.running else self._let_go_on(self.steps, now)
        asked = self._snapshot(self.evaluations.number, self.assignment.versions(step))
        return [*asked, *self._score(self.evaluations.number), *self._let_go_on(step, now)]

    def _let_go_on(self, steps: int, now: float) -> list[Effect]:
        """Where training waits for evaluations: let `steps` steps be committed and no more, until the next word."""
        if steps == self._limit or not self.assignment.waits:
            return []
        self._limit = steps
        if self.assignment.staged:
            return [ev.Send(self.cast.shards[0], ev.Limit(self.cast.timeline, steps))]
        self._ledger.steps = steps
        return self._grant(now)

    def _snapshot(self, number: int, version: int) -> list[Effect]:
        take = ev.TakeSnapshot(self.cast.timeline, number, version)
        return [ev.Send(self.cast.shards[0], take)] if self.assignment.staged else self._to_shards(take)

    def _score(self, number: int) -> list[Effect]:
        assert self.cast.evaluator is not None
        return [ev.Send(self.cast.evaluator, ev.Evaluate(self.cast.timeline, number))]

    def _evaluated(self, event: ev.Evaluated, now: float) -> list[Effect]:
        metrics = {f"eval/{name}": value for name, value in event.metrics.items()} | {"time/eval": 1e3 * event.seconds}
        step = self.steps if event.number == FINAL else self.assignment.steps_of(event.version)
        log = Log({**self.tally.event("eval", now, metrics), "step": step, "version": event.version})
        try:
            verdict = self.assignment.judge.evaluated(metrics)
        except BadInput as error:
            return [log, Finish(error)]
        scores = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        best = Best(event.number, step, scores) if verdict.best else None
        self.evaluations.evaluated(event.version, best)
        self._scored = self._scored or event.number == FINAL
        pulls = self._to_shards(ev.SnapshotPulled(self.cast.timeline, event.number)) if best else []
        early = (
            self._end_early(verdict.ends, timed=not self.assignment.waits)
            if verdict.ends and event.number != FINAL
            else []
        )
        return [log, *pulls, *early, *([] if best else self._after_evaluation(now))]

    def _sent(self, part: ev.SnapshotSent, now: float) -> list[Effect]:
        """A shard's part of the last version, or of the best one, or of both."""
        if part.number == FINAL:
            self.final[part.shard] = part
        best = self.evaluations.weights(part, len(self.cast.shards))
        return self._end() if best is None else [Keep(best), *self._after_evaluation(now)]

    def _after_evaluation(self, now: float) -> list[Effect]:
        """Go on to the next one, or to the last."""
        return self._last_score() if self._over else self._evaluate(now)

    # The end.

    def _end_early(self, why: str, *, timed: bool = True) -> list[Effect]:
        """End with the steps that have been begun; in sync mode shard 0 says which ones these are."""
        if self.ended or self._over:
            return []
        self.ended, self.timed = why, timed
        if self.assignment.staged:
            return [ev.Send(self.cast.shards[0], ev.Limit(self.cast.timeline, 0))]
        self._ledger.steps = self._ledger.begun
        return self._ends_at(self._ledger.begun)

    def _ends_at(self, steps: int) -> list[Effect]:
        self.steps = min(steps, self.steps)
        return self._finale() if self._over else []

    @property
    def _over(self) -> bool:
        """Whether the last step is committed."""
        return self.tally.steps >= self.steps

    def _finale(self) -> list[Effect]:
        """The last version: its weights come here, and it is always evaluated."""
        last = self._snapshot(FINAL, self.assignment.versions(self.steps))
        pulled = self._to_shards(ev.SnapshotPulled(self.cast.timeline, FINAL))
        return [*last, *pulled, *([] if self.evaluations.running else self._last_score())]

    def _last_score(self) -> list[Effect]:
        """Evaluate the last version, unless that has just been done."""
        if self._scored or self.evaluations.version == self.assignment.versions(self.steps):
            self._scored = True
            return self._end()
        self.evaluations.running = True
        return self._score(FINAL)

    @property
    def whole(self) -> bool:
        """Whether the last version's weights are here, from every shard."""
        return len(self.final) == len(self.cast.shards)

    def _end(self) -> list[Effect]:
        if self.finished or not self._scored or not self.whole or self.evaluations.running:
            return []
        self.finished = True
        return [Finish(None)]


def _failure(name: str, event: ev.ProcessFailed) -> DistgdError:
    kind = getattr(errors, event.kind, RunFailed)
    error: DistgdError = (kind if kind is BadInput else RunFailed)(f"{name}: {event.message}")
    return error


def _diverged(step: int, bad: tuple[int, ...], stats: tuple[ev.SlotStats, ...]) -> Diverged:
    slots = ", ".join(map(str, bad))
    do = "lower optimizer.lr, set optimizer.clip.norm, or look at these samples"
    if step == 0:  # no learning rate has had its part in it
        do = "look at the loss, the initial weights and these samples"
    found = {s.slot: f"loss {s.loss}, squared gradient norm {s.squared_norm}" for s in stats}
    return Diverged(
        f"step {step}, slot {slots}: expected a finite loss and gradient, found {found.get(bad[0], 'neither')}; "
        f"{do}; it was not applied"
    )
