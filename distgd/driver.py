"""The driver's decisions: who computes what, when to evaluate, what to record, when the run is over.

`handle(source, event, now) -> [effect]`, like every other state machine here: it neither sends nor waits, and time is
an argument. The driver is not on the step's path: shards tell it what was committed, and it grants leases where the
mode has them. What it knows is lost with its process; the files that the trainer writes from its effects are not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from distgd import errors
from distgd import events as ev
from distgd.assignment import Assignment, Cast
from distgd.effects import Account, Effect, Finish, Keep, Log, Record, Recover, Refuse, Resumed, Save, Spawn
from distgd.errors import BadInput, DistgdError, ProcessLost, RunFailed
from distgd.evaluations import Best, Evaluations
from distgd.ledger import Ledger, Slot
from distgd.membership import Membership
from distgd.norms import Norms
from distgd.policy import Applied
from distgd.promise import PROMISED, Promise, Verdict
from distgd.saving import Progress, Saving, Whole
from distgd.shares import Speeds
from distgd.stopping import Stop
from distgd.suspicion import Blamed, Fatal, Finding, Passed, Suspicions
from distgd.tally import Tally

LEAD = 1000
"""Steps that shards may be ahead of the driver (sync): what waits to be told stays below a few MB."""


class Driver:
    """The state machine; the trainer performs its effects.

    Args:
        nodes: the live incarnations by machine.
        resumed: where the run goes on, None where it begins.
        joining: those of the cast that are not ready yet.
        promise: of the run's bits; without one nobody is looked at.
    """

    def __init__(
        self,
        cast: Cast,
        assignment: Assignment,
        now: float,
        nodes: tuple[tuple[int, ...], ...] = (),
        resumed: Resumed | None = None,
        joining: Collection[int] = (),
        promise: Promise | None = None,
    ) -> None:
        self.promise = promise or Promise(promises=False, strict=False)
        self.members = Membership(cast, assignment.order, assignment.staged, nodes, joining)
        self.assignment = assignment
        self.tally = Tally(assignment.optimizer, assignment.schedule, now)
        self.final: dict[int, ev.SnapshotSent] = {}  # the last version, by shard
        self.finished = False
        self.steps = assignment.steps  # where the run ends; fewer once that is decided
        self.ended: str | None = None  # why it ends before the planned steps
        self.timed = False  # whether the step at which it ends depends on how fast everybody was
        self.stopped = False  # whether that was asked for from outside
        self._evaluating = -1  # the snapshot that the evaluator has been asked for last
        limit = None if assignment.staleness is None else assignment.staleness + 1
        self._accounted = Applied(assignment.order.filled)  # slots that are in the ledger's file (bounded, async)
        self._ledger = Ledger(assignment.slots(), limit)
        self._requests: deque[int] = deque()  # workers that have room for a lease, in the order they asked
        self._gathered: list[tuple[int, ev.LeaseEnded]] = []  # applied slots that do not make a whole step yet
        self._carried = 0  # such slots of an earlier process
        self._uncounted = range(0)  # steps that are in a checkpoint and were not counted when it was made
        norms = Norms(assignment.norm_ratio)
        self.suspicions = Suspicions(
            assignment.order, self.members, norms, staged=assignment.staged, most=assignment.skips
        )
        self.evaluations = Evaluations(assignment, now)
        self._limit: int | None = None  # the steps that shard 0 may commit before the next word
        self._may = assignment.steps  # the steps that may be committed as far as evaluations go
        self._scored = cast.evaluator is None  # whether the last version's evaluation is in
        self._leaving: DistgdError | None = None  # why the run ends with a checkpoint of what is committed by then
        self._last_asked = False  # whether that checkpoint has been asked for
        self._moving: int | None = None  # a shard that goes to another machine as soon as there is a checkpoint
        if resumed is not None:
            self._restore(resumed, now)
        self.speeds = Speeds(self.tally.steps)
        self.saving = Saving(
            assignment.save_steps,
            assignment.save_seconds,
            shards=len(cast.shards),
            staged=assignment.staged,
            step=self.tally.steps,
            version=self.tally.versions,
            now=now,
        )

    @property
    def cast(self) -> Cast:
        """Who plays what now."""
        return self.members.cast

    def start(self, now: float) -> list[Effect]:
        """Tell everybody who is who, which sets the workers off."""
        return [*self._told_late(now), *self._go(now)]

    def _go(self, now: float) -> list[Effect]:
        if self._over:  # it had ended when it was cut off
            limit = [ev.Send(self.cast.shards[0], ev.Limit(self.cast.timeline, 0))] if self.assignment.staged else []
            return [*limit, *self._announce(), *self._finale(now)]
        return [*self._void(), *self._evaluate(now), *self._let_lead(), *self._save(now), *self._announce()]

    def _told_late(self, now: float) -> list[Effect]:
        """Steps whose last slots nobody told of, as whoever computed them is gone; those that were told are the same.

        What they lost and took is not known any more.
        """
        told: list[Effect] = []
        for step in self._uncounted:
            done = Applied.of({"steps": step, "slots": []}, self.assignment.order.filled)
            place = {"step": step, "version": self.assignment.versions(step), "samples": self.assignment.samples(done)}
            told.append(Log({**self.tally.event("step", now, {}), **place}))
        return told

    def _void(self) -> list[Effect]:
        """After a rollback for a divergence, in sync mode: the steps up to that one count without effect."""
        if not self.assignment.staged or self.suspicions.void <= self.tally.steps:
            return []
        return [ev.Send(self.cast.shards[0], ev.Skip(self.cast.timeline, self.suspicions.void - 1))]

    def _restore(self, resumed: Resumed, now: float) -> None:
        progress, assignment = resumed.progress, self.assignment
        self.tally.restore(progress["tally"], now)
        assignment.judge.restore(progress["judge"])
        self.suspicions.restore(progress["suspicions"])
        if resumed.applied is not None:
            done = resumed.applied
            self.tally.versions = assignment.versions(done.steps) + len(done.beyond)
            self.tally.steps = assignment.steps_of(self.tally.versions)
            self.tally.samples = assignment.samples(done, self.suspicions.without)
            self._carried = self.tally.versions - assignment.versions(self.tally.steps)
            self._uncounted = range(progress["tally"]["steps"] + 1, self.tally.steps + 1)
            begun = max([done.steps, *(step + 1 for step, _ in done.beyond)])
            slots = (slot for slot in assignment.slots() if slot not in done)
            self._ledger = Ledger(slots, self._ledger.limit, begun)
            self._accounted = done
        self.evaluations.restore(progress["evaluations"], self.tally.steps, self.tally.began)
        if progress["ended"] is not None:
            self.ended, self.steps = progress["ended"], self.tally.steps

    def rolled_back(self, resumed: Resumed | None) -> list[Account]:
        """What the ledger is to say of it: what is void, and what is not, whoever had got to know of it."""
        if resumed is None or resumed.applied is None:
            return [self._line({"state": "rollback", "step": resumed.step if resumed else 0})]
        step = min(resumed.progress["accounted"], resumed.applied.steps)
        whole = ((t, k) for t in range(step, resumed.applied.steps) for k in range(self.assignment.order.filled(t)))
        again = [self._account(*slot, self._state(slot)) for slot in (*whole, *resumed.applied.beyond)]
        return [self._line({"state": "rollback", "step": step}), *again]

    def marks(self, again: bool) -> list[Account]:
        """For the ledger at a start: that the bits are not promised, unless its first line says so; `again` if so."""
        said = self.promise.bits == PROMISED or not (again or self.promise.broken)
        return [] if said else [self._line(self.promise.line(self.tally.steps))]

    def progress(self) -> Progress:
        """All that this one would need to go on from here, for JSON."""
        return {
            "tally": self.tally.as_dict(),
            "judge": self.assignment.judge.as_dict(),
            "evaluations": self.evaluations.as_dict(self.tally.began),
            "accounted": self._accounted.steps,
            "ended": self.ended if self._over else None,
            "suspicions": self.suspicions.as_dict(),
        }

    def handle(self, source: int, event: Any, now: float) -> list[Effect]:
        """Take one message of incarnation `source`."""
        match event:
            case ev.ProcessLost():
                return self._lost(event, now)
            case ev.Drained():
                return self._move(event.incarnation, now)
            case ev.Injected():
                return [Log(self.tally.event("injected", now, {}, message=event.text))]
            case ev.ProcessReady() if source in self.members.joining:
                return self._joined(source, event.facts, now)
            case ev.ProcessFailed():
                return [Finish(_failure(self.cast.name(source), event))]
            case _ if source not in self.members.live:
                return [ev.Send(source, ev.Fenced(self.cast.timeline))]
            case _ if event.timeline != self.cast.timeline:
                return []
            case ev.StepCommitted():
                return self._committed(event, now)
            case ev.Poisoned():
                return list(self.suspicions.poisoned(event))
            case ev.Examined():
                return self._judged(self.suspicions.examined(source, event), now)
            case ev.LeaseRequested():
                self._requests.append(source)
                return self._grant(now)
            case ev.LeaseEnded():
                return self._ended(source, event, now)
            case ev.Evaluated():
                return self._evaluated(event, now)
            case ev.SnapshotSent():
                return self._sent(event, now)
            case ev.ShardWritten():
                return self._written(event, now)
            case ev.UpdatesRecorded():
                return self._recorded(event)
            case ev.Limited() if self._leaving is not None:
                return self._save_and_leave(event.steps, now)
            case ev.Limited():
                return self._ends_at(event.steps, now) if self.ended else []
            case _:
                return []

    def stop(self, stop: Stop, now: float) -> list[Effect]:
        """End the run cleanly, as somebody outside asks for."""
        before = self.ended
        effects = self._end_early(f"stopped: {stop.why}", now)
        self.stopped = self.stopped or self.ended is not before  # one that comes when the run is over changes nothing
        return effects

    # Membership.

    def _announce(self) -> list[Effect]:
        return [*self.members.announce(), *self.suspicions.ask()]

    def _lost(self, lost: ev.ProcessLost, now: float) -> list[Effect]:
        gone = lost.incarnation
        if gone not in self.members.live:
            return []
        why = f"{self.cast.name(gone)} is gone: {lost.why}"
        fault = Log(self.tally.event("fault", now, {}, message=why))
        if gone in self.cast.shards:
            return [fault, Recover(gone) if self.saving.on else Finish(ProcessLost(why))]
        return [fault, *self._replace(gone, now)]

    def _move(self, incarnation: int, now: float) -> list[Effect]:
        """The machine of a process is taken away: it goes to another one, a shard from a new checkpoint on."""
        shard = incarnation in self.cast.shards
        if incarnation not in self.members.live or self.ended or self._over or self._leaving is not None:
            return []
        if shard and (self._moving is not None or not self.saving.on):
            return []
        moved = "is moved: its machine is drained"
        told = Log(self.tally.event("fault", now, {}, message=f"{self.cast.name(incarnation)} {moved}"))
        if not shard:
            return [told, Refuse(incarnation), *self._replace(incarnation, now, blame=False)]
        self._moving = incarnation
        return [told, *self._ask_to_save(self.tally.versions, now)]  # one under way may be of a step far ahead

    def _replace(self, gone: int, now: float, *, blame: bool = True) -> list[Effect]:
        """Another process in the place of a worker or the evaluator; its slots go to others at once.

        Args:
            blame: whether the slots that it held may be the reason.
        """
        leased = [(lease.step, lease.slot) for lease in self._ledger.open.values() if lease.worker == gone]
        fatal = self.members.died(gone, leased, self.tally.steps, now) if blame else None
        if fatal is not None:
            return [Finish(fatal)]
        self._requests = deque(worker for worker in self._requests if worker != gone)
        expired = [lease.number for lease in self._ledger.expire(gone)]
        closing = [effect for number in expired for effect in self._expire(gone, number)]
        new = self.members.replace(gone)
        enough = new in self.cast.workers and len(self.members.workers) >= self.assignment.workers
        return [*closing, Spawn(new, enough), *self._announce(), *self._grant(now)]

    def _joined(self, new: int, facts: Mapping[str, str], now: float) -> list[Effect]:
        """A replacement is ready: it gets its share of the slots, or the evaluation that another did not end."""
        verdict = self.promise.judge(self.cast, {new: facts})
        told = self.told(verdict, now)
        if verdict.refused:
            self.members.refuse(new)
            nobody = [] if self.cast.workers else [Finish(self.promise.nobody_left(verdict.refused[new]))]
            return [*told, Refuse(new), *(nobody or self._announce())]
        if verdict.warning is not None:
            told.append(self._line(self.promise.line(self.tally.steps)))
        joined = Log(self.tally.event("joined", now, {}, message=self.members.arrived(new)))
        begun = ev.Send(new, ev.TimelineBegun(self.cast.timeline, self.cast.shards))  # since it was asked for, perhaps
        again = self._score(self._evaluating) if new == self.cast.evaluator and self._evaluating >= 0 else []
        return [joined, *told, begun, *self._announce(), *again]

    def told(self, verdict: Verdict, now: float) -> list[Effect]:
        """What there is to tell of those who have been looked at."""
        refused = [self.tally.event("fault", now, {}, message=why) for why in verdict.refused.values()]
        warning = [self.tally.event("warning", now, {}, message=verdict.warning)] if verdict.warning else []
        return [Log(event) for event in (*refused, *warning)]

    def _expire(self, worker: int, lease: int) -> list[Effect]:
        return self._to_shards(ev.LeaseExpired(self.cast.timeline, worker, lease))

    def _to_shards(self, message: Any) -> list[Effect]:
        return [ev.Send(shard, message) for shard in self.cast.shards]

    # Leases (bounded, async).

    def _grant(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._leaving is not None:
            return []
        busy = {lease.worker for lease in self._ledger.open.values()}
        for worker in sorted(self._requests, key=busy.__contains__):  # those without a slot before those with one
            lease = self._ledger.grant(worker, now, self.suspicions.not_for(worker))
            if lease is None:
                continue
            self._requests.remove(worker)
            skip = self.suspicions.passes((lease.step, lease.slot))
            limit = self.suspicions.norms.limit
            granted = ev.LeaseGranted(self.cast.timeline, lease.number, lease.step, lease.slot, skip, limit)
            effects.append(ev.Send(worker, granted))
        return effects

    def _ended(self, source: int, ended: ev.LeaseEnded, now: float) -> list[Effect]:
        applied = ended.outcome == "applied"
        if self._ledger.end(ended.lease, applied=applied) is None:
            return []
        if not applied:
            closed = self._expire(source, ended.lease)
            verdict = self.suspicions.withheld(source, ended) if ended.outcome == "poisoned" else None
            return [*closed, *self._judged(verdict, now), *self._grant(now), *self._drained(now)]
        quarantined = self._judged(self.suspicions.applied(source, ended), now)
        self.tally.versions += 1
        self.tally.samples += ended.stats.samples
        self.tally.staleness.append(max(ended.staleness))
        self._gathered.append((source, ended))
        self._accounted.add(ended.step, ended.slot)
        line = self._account(ended.step, ended.slot, self._state((ended.step, ended.slot)))
        return [line, *quarantined, *self._grant(now), *self._gather(now), *self._drained(now)]

    def _gather(self, now: float) -> list[Effect]:
        """Each K applied slots, fewer for a short last batch, are a step on the x-axis."""
        if len(self._gathered) + self._carried < self.assignment.order.filled(self.tally.steps):
            return []
        part, self._gathered, self._carried = self._gathered, [], 0
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
        filled = range(self.assignment.order.filled(event.step))
        dropped = [k for k in filled if k not in event.slots]
        state = "applied" if event.applied else "skipped"
        lines = [self._account(event.step, s.slot, state) for s in event.stats if s.samples]
        lines += [self._account(event.step, k, "dropped") for k in dropped]
        self.tally.versions += 1
        if event.applied:
            self.tally.samples += sum(s.samples for s in event.stats)
            self.suspicions.norms.observe(event.stats)
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
        stepped = self._stepped(list(event.stats) if event.applied else [], event.times, extra, now, at)
        return [*lines, *stepped, *self._share(event, now)]

    def _share(self, event: ev.StepCommitted, now: float) -> list[Effect]:
        """Now and then, give slow workers fewer slots."""
        self.speeds.observe(event.stats)
        if self._over or self.ended:
            return []
        better = self.speeds.better(event.step + 1, self.members.table, self.members.workers)
        if better is None:
            return []
        self.members.shares = better
        told = ", ".join(f"{self.cast.name(worker)} {count}" for worker, count in better.items())
        log = Log(self.tally.event("shares", now, {}, message=f"slots of a step from here on: {told}"))
        return [log, *self._announce()]

    def _judged(self, finding: Finding | None, now: float) -> list[Effect]:
        """On a slot that is not finite, or out of proportion."""
        match finding:
            case Fatal(error, step) if step is not None and self.suspicions.rollbacks < self.assignment.rollbacks:
                return self._go_back(error, step, now)
            case Fatal(error):
                return [Finish(error)]
            case Passed((step, _), message):
                skip = [ev.Send(self.cast.shards[0], ev.Skip(self.cast.timeline, step))]
                return [Log(self.tally.event("warning", now, {}, message=message)), *skip[: self.assignment.staged]]
            case Blamed(worker, why) if not self.assignment.staged:
                return [Refuse(worker), *self._lost(ev.ProcessLost(worker, f"quarantined, as {why}"), now)]
            case Blamed(worker, why):
                why = f"{self.cast.name(worker)} is quarantined: {why}"
                fault = Log(self.tally.event("fault", now, {}, message=why))
                do = "keep checkpoints (checkpoint.every), and the run goes on without it"
                return [fault, Recover(worker) if self.saving.on else Finish(RunFailed(f"{why}; {do}"))]
        return []

    def _go_back(self, error: DistgdError, step: int, now: float) -> list[Effect]:
        """The run has diverged at a step: everybody goes back to the last checkpoint, and on behind that step."""
        if not self.saving.on:
            return [Finish(error)]
        self.suspicions.give_up(step)
        of = f"rollback {self.suspicions.rollbacks} of {self.assignment.rollbacks}"
        self.promise.give_up(f"{of} at step {step}, as the run diverged: where it went back to depends on time")
        do = f"all go back to the last checkpoint, and what is left of the steps up to {step} counts without effect"
        return [Log(self.tally.event("fault", now, {}, message=f"{error}; {of}: {do}")), Recover(None)]

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
        whole = self.saving.reached(self.tally.versions, self.progress) if self.assignment.staged else None
        saved: list[Effect] = [log] if whole is None else [log, Save(whole)]
        if self._over:
            return [*saved, *self._finale(now)]
        seconds = self.assignment.seconds
        if seconds is not None and now - self.tally.began >= seconds:
            return [*saved, *self._end_early(f"stop.seconds: {now - self.tally.began:.1f} s since training began", now)]
        return [*saved, *self._evaluate(now), *self._let_lead(), *self._save(now)]

    def _state(self, slot: Slot) -> str:
        """What became of a slot that every shard counts (bounded, async)."""
        return "skipped" if slot in self.suspicions.without else "applied"

    def _account(self, step: int, slot: int, state: str) -> Account:
        first, stop = self.assignment.order.places(step, slot)
        return self._line(
            {
                "epoch": self.assignment.order.epoch_of(step),
                "step": step,
                "slot": slot,
                "state": state,
                "first": first,
                "last": stop - 1,
                "generation": self.members.generation,
                "shard": "all",
            }
        )

    def _line(self, line: dict[str, Any]) -> Account:
        return Account({**line, "timeline": self.cast.timeline})

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
        if steps == self._may or not self.assignment.waits:
            return []
        self._may = steps
        if self.assignment.staged:
            return self._let_lead()
        self._ledger.steps = steps
        return self._grant(now)

    def _let_lead(self) -> list[Effect]:
        """Sync: shard 0 may be `LEAD` steps ahead of what is counted here; a driver that is slow is waited for then.

        Elsewhere leases come from here, so that nobody gets ahead.
        """
        horizon = min(self._may, self.tally.steps + LEAD)
        needless = self._limit is None and horizon >= self.steps
        if not self.assignment.staged or self.ended or self._leaving is not None or needless:
            return []
        if self._limit is not None and horizon - self._limit < (1 if horizon == self._may else LEAD // 2):
            return []
        self._limit = horizon
        return [ev.Send(self.cast.shards[0], ev.Limit(self.cast.timeline, horizon))]

    def _snapshot(self, number: int, version: int) -> list[Effect]:
        take = ev.TakeSnapshot(self.cast.timeline, number, version)
        return [ev.Send(self.cast.shards[0], take)] if self.assignment.staged else self._to_shards(take)

    def _score(self, number: int) -> list[Effect]:
        assert self.cast.evaluator is not None
        self._evaluating = number
        return [ev.Send(self.cast.evaluator, ev.Evaluate(self.cast.timeline, number))]

    def _evaluated(self, event: ev.Evaluated, now: float) -> list[Effect]:
        self._evaluating = -1
        metrics = {f"eval/{name}": value for name, value in event.metrics.items()} | {"time/eval": 1e3 * event.seconds}
        step = self.steps if event.number == ev.FINAL else self.assignment.steps_of(event.version)
        log = Log({**self.tally.event("eval", now, metrics), "step": step, "version": event.version})
        try:
            verdict = self.assignment.judge.evaluated(metrics)
        except BadInput as error:
            return [log, Finish(error)]
        scores = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        best = Best(event.number, step, scores) if verdict.best else None
        self.evaluations.evaluated(event.version, best)
        self._scored = self._scored or event.number == ev.FINAL
        pulls = self._to_shards(ev.SnapshotPulled(self.cast.timeline, event.number)) if best else []
        early = (
            self._end_early(verdict.ends, now, timed=not self.assignment.waits)
            if verdict.ends and event.number != ev.FINAL
            else []
        )
        return [log, *pulls, *early, *([] if best else self._after_evaluation(now))]

    def _sent(self, part: ev.SnapshotSent, now: float) -> list[Effect]:
        """A shard's part of the last version, or of the best one, or of both."""
        if part.number == ev.FINAL:
            self.final[part.shard] = part
        best = self.evaluations.weights(part, len(self.cast.shards))
        return self._end() if best is None else [Keep(best), *self._after_evaluation(now)]

    def _after_evaluation(self, now: float) -> list[Effect]:
        """Go on to the next one, or to the last."""
        return self._last_score() if self._over else self._evaluate(now)

    # Checkpoints.

    def _save(self, now: float) -> list[Effect]:
        """Ask for the next one, if it is time; the last version's is asked for at the end."""
        step = None if self.ended or self._leaving else self.saving.next(self.tally.steps, now)
        return self._ask_to_save(self.assignment.versions(step), now) if step is not None and step < self.steps else []

    def _ask_to_save(self, version: int, now: float) -> list[Effect]:
        """Ask for a checkpoint of `version`, unless it is there or under way."""
        if self.saving.version == version:
            return self._after_saving(now)
        if self.saving.running and self.saving.asked == version:
            return []
        return self._snapshot(self.saving.ask(version, self.tally.versions, self.progress), version)

    def _written(self, part: ev.ShardWritten, now: float) -> list[Effect]:
        if part.error and part.number == self.saving.number and self.saving.running:
            return self.not_saved(part.error, now)
        whole = self.saving.written(part, self.progress)
        if whole is None or not self.assignment.record:
            return [] if whole is None else [Save(whole)]
        self.saving.seal(whole)
        return self._to_shards(ev.RecordsRequested(self.cast.timeline, whole.number))

    def _recorded(self, updates: ev.UpdatesRecorded) -> list[Effect]:
        whole = self.saving.recorded(updates.number, updates.shard)
        return [Record(updates), *([] if whole is None else [Save(whole)])]

    def saved(self, whole: Whole, now: float, seconds: float) -> list[Effect]:
        """A checkpoint is real; making it so took the driver so long."""
        self.saving.ended(whole.parts[0].version if self.assignment.staged else self.saving.asked)
        log = Log(self.tally.event("checkpoint", now, {"time/checkpoint": 1e3 * seconds}, folder=whole.parts[0].folder))
        return [log, *self._after_saving(now)]

    def not_saved(self, why: str, now: float) -> list[Effect]:
        """There will be no such checkpoint: what the disk refused has been said, and training goes on."""
        self.saving.ended(None)
        self._moving = None  # the next notice asks again
        if self._over:
            self.saving.on = False  # and the run ends without it
        log = Log(self.tally.event("warning", now, {}, message=f"no checkpoint: {why}"))
        return [log, *self._after_saving(now)]

    def _after_saving(self, now: float) -> list[Effect]:
        if self._leaving is not None:  # one that was under way before is not the last
            return [Finish(self._leaving)] if self._last_asked else []
        if self._moving is not None and not self.ended and not self._over:
            return [Recover(self._moving)]
        return self._save_last(now) if self._over else self._save(now)

    def _save_last(self, now: float) -> list[Effect]:
        """The last version's checkpoint."""
        if self._saved:
            return self._end()
        self.saving.end_at(self.assignment.versions(self.steps), self.progress())
        return [] if self.saving.running else self._ask_to_save(self.assignment.versions(self.steps), now)

    @property
    def _saved(self) -> bool:
        """Whether no more checkpoint is to come once the run is over."""
        return not self.saving.on or self.saving.version == self.assignment.versions(self.steps)

    def leave(self, why: DistgdError, now: float) -> list[Effect] | None:
        """End the run with `why` after a checkpoint of what is committed by then, nothing of which is done again.

        Returns:
            None where there is nothing to wait for: the run keeps no checkpoints.
        """
        if not self.saving.on or self.finished:
            return None
        if self._over:  # the last one is on its way
            return []
        self._leaving = why
        if self.assignment.staged:
            return [ev.Send(self.cast.shards[0], ev.Limit(self.cast.timeline, 0))]
        return self._drained(now)

    def _drained(self, now: float) -> list[Effect]:
        """Bounded and async: leave once nothing is under way."""
        if self._leaving is None or self._ledger.open:
            return []
        return self._save_and_leave(self.tally.versions, now)

    def _save_and_leave(self, version: int, now: float) -> list[Effect]:
        self._last_asked = True
        return self._ask_to_save(version, now)

    # The end.

    def _end_early(self, why: str, now: float, *, timed: bool = True) -> list[Effect]:
        """End with the steps that have been begun; in sync mode shard 0 says which ones these are."""
        if self.ended or self._over:
            return []
        self.ended, self.timed = why, timed
        if self.assignment.staged:
            return [ev.Send(self.cast.shards[0], ev.Limit(self.cast.timeline, 0))]
        self._ledger.steps = self._ledger.begun
        return self._ends_at(self._ledger.begun, now)

    def _ends_at(self, steps: int, now: float) -> list[Effect]:
        self.steps = min(steps, self.steps)
        return self._finale(now) if self._over else []

    @property
    def _over(self) -> bool:
        """Whether the last step is committed."""
        return self.tally.steps >= self.steps

    def _finale(self, now: float) -> list[Effect]:
        """The last version: its weights come here, and it is always evaluated."""
        last = self._snapshot(ev.FINAL, self.assignment.versions(self.steps))
        pulled = self._to_shards(ev.SnapshotPulled(self.cast.timeline, ev.FINAL))
        return [*last, *pulled, *([] if self.evaluations.running else self._last_score()), *self._save_last(now)]

    def _last_score(self) -> list[Effect]:
        """Evaluate the last version, unless that has just been done."""
        if self._scored or self.evaluations.version == self.assignment.versions(self.steps):
            self._scored = True
            return self._end()
        self.evaluations.running = True
        return self._score(ev.FINAL)

    @property
    def whole(self) -> bool:
        """Whether the last version's weights are here, from every shard."""
        return len(self.final) == len(self.cast.shards)

    def _end(self) -> list[Effect]:
        if self.finished or not self._scored or not self.whole or self.evaluations.running:
            return []
        if not self._saved:
            return []
        self.finished = True
        return [Finish(None)]


def _failure(name: str, event: ev.ProcessFailed) -> DistgdError:
    kind = getattr(errors, event.kind, RunFailed)
    error: DistgdError = (kind if kind is BadInput else RunFailed)(f"{name}: {event.message}")
    return error
