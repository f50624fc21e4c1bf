"""The driver by hand: whose slots go where, what is evaluated and recorded, and how a run ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from distgd import events as ev
from distgd.assignment import Assignment, Cast
from distgd.driver import Driver
from distgd.effects import Account, Finish, Log, Resumed, Save, Spawn
from distgd.errors import BadInput, Diverged, ProcessLost, RunFailed
from distgd.optim import OptimizerSpec, Schedule
from distgd.policy import Applied
from distgd.sources import Order

ORDER = Order(samples=22, batch=8, slots=4, seed=0)  # 3 steps an epoch; the last has 6 samples
RAGGED = Order(samples=10, batch=8, slots=4, seed=0)  # 2 steps; the last has 2 samples, so 2 of its slots are empty
SHARDS, WORKERS, EVALUATOR = (1, 2), (3, 4, 5), 6
CAST = Cast(1, SHARDS, WORKERS, EVALUATOR)
ALONE = Cast(1, SHARDS, WORKERS, None)


class Stage:
    """A driver, and everything that it wants done."""

    def __init__(
        self,
        *,
        staged: bool = True,
        bound: int | None = None,
        steps: int = 6,
        every: int | None = 2,
        seconds: float | None = None,
        order: Order = ORDER,
        cast: Cast = ALONE,
    ) -> None:
        self.order = order
        optimizer, schedule = OptimizerSpec("SGD", {"lr": 0.5}), Schedule("constant")
        assignment = Assignment(order, steps, staged, bound, optimizer, schedule, every, seconds)
        self.driver = Driver(cast, assignment, 0.0)
        self.now = 0.0
        self.effects: list[Any] = list(self.driver.start(self.now))

    def give(self, source: int, event: Any) -> list[Any]:
        effects = self.driver.handle(source, event, self.now)
        self.effects += effects
        return effects

    def commit(self, step: int, slots: Any = range(4), *, bad: tuple[int, ...] = (), late: int = 0) -> list[Any]:
        slots = tuple(slots)
        times = {WORKERS[0]: {"compute": 0.1}}
        return self.give(
            SHARDS[0],
            ev.StepCommitted(1, step, not bad, slots, bad, self.stats(step, slots), times, late, 1.0, 1.0, 0.0),
        )

    def stats(self, step: int, slots: tuple[int, ...]) -> tuple[ev.SlotStats, ...]:
        counts = {k: int(np.subtract(*self.order.places(step, k)[::-1])) for k in slots}
        return tuple(
            ev.SlotStats(k, n, float(n), float("nan") if n == 0 else 0.25, 1.0, 0.1) for k, n in counts.items()
        )

    def end(self, worker: int, lease: ev.LeaseGranted, outcome: str = "applied", **more: Any) -> list[Any]:
        (stats,) = self.stats(lease.step, (lease.slot,))
        ended = ev.LeaseEnded(
            1, lease.lease, lease.step, lease.slot, outcome, more.pop("bad", False), (0, 2), stats, {"compute": 0.1}
        )
        return self.give(worker, ended)

    def request(self, worker: int) -> list[Any]:
        return self.give(worker, ev.LeaseRequested(1))

    def sent(self, kind: type, effects: list[Any] | None = None) -> list[tuple[int, Any]]:
        found = self.effects if effects is None else effects
        return [(e.to, e.message) for e in found if isinstance(e, ev.Send) and isinstance(e.message, kind)]

    def lines(self) -> list[dict[str, Any]]:
        return [e.line for e in self.effects if isinstance(e, Account)]

    def logs(self, kind: str) -> list[dict[str, Any]]:
        return [e.event for e in self.effects if isinstance(e, Log) and e.event["event"] == kind]

    def finish(self) -> list[Finish]:
        return [e for e in self.effects if isinstance(e, Finish)]

    def deliver_final(self) -> list[Any]:
        weights = np.zeros(1)
        return [
            e
            for i, shard in enumerate(SHARDS)
            for e in self.give(shard, ev.SnapshotSent(1, ev.FINAL, i, 6, weights, None))
        ]

    def evaluated(self, number: int, version: int) -> list[Any]:
        return self.give(EVALUATOR, ev.Evaluated(1, number, version, {"loss": 0.5}, 0.1))


class TestGoingOn:
    def test_a_step_of_which_only_the_shards_knew_is_told(self) -> None:
        """Its slots are in a checkpoint, and whoever computed the last ones was gone before it said so."""
        before = Stage(staged=False, bound=2)
        progress = before.driver.progress()
        done = Applied(ORDER.filled)
        for slot in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0)]:
            done.add(*slot)
        driver = Driver(ALONE, before.driver.assignment, 9.0, resumed=Resumed(0, 8, progress, done))
        told = [e.event for e in driver.start(9.0) if isinstance(e, Log)]
        assert [(e["event"], e["step"], e["version"], e["samples"]) for e in told] == [
            ("step", 1, 4, 8),
            ("step", 2, 8, 16),
        ]
        assert not [e for e in Driver(ALONE, before.driver.assignment, 9.0).start(9.0) if isinstance(e, Log)]


class TestMembership:
    def test_all_are_told_who_is_who_at_the_start(self) -> None:
        stage = Stage(cast=CAST)
        told = stage.sent(ev.MembershipChanged)
        assert [to for to, _ in told] == [1, 2, 3, 4, 5, 6]
        (message,) = {m for _, m in told}
        assert message.live == frozenset(range(7))
        assert message.newest == 6
        assert message.table == (3, 3, 4, 5)

    def test_the_slots_of_the_lost_go_to_the_others(self) -> None:
        stage = Stage()
        effects = stage.give(4, ev.ProcessLost(4, "killed"))
        told = stage.sent(ev.MembershipChanged, effects)
        assert [to for to, _ in told] == [1, 2, 3, 5], "the one that is to come is told once it is there"
        assert {m.table for _, m in told} == {(3, 3, 5, 5)}
        assert {m.number for _, m in told} == {2}
        assert all(4 not in m.live and m.newest == 6 for _, m in told)
        (fault,) = stage.logs("fault")
        assert fault["message"] == "worker 1 is gone: killed"

    def test_lost_twice_is_lost_once(self) -> None:
        stage = Stage()
        stage.give(4, ev.ProcessLost(4, "killed"))
        assert stage.give(4, ev.ProcessLost(4, "killed")) == []

    def test_a_replacement_has_its_place_and_gets_slots_once_it_is_ready(self) -> None:
        stage = Stage()
        effects = stage.give(4, ev.ProcessLost(4, "killed"))
        assert [e.incarnation for e in effects if isinstance(e, Spawn)] == [6]
        assert stage.driver.cast.name(6) == "worker 1"
        effects = stage.give(6, ev.ProcessReady(1, {}))
        assert {m.table for _, m in stage.sent(ev.MembershipChanged, effects)} == {(3, 3, 6, 5)}
        (joined,) = stage.logs("joined")
        assert joined["message"] == "worker 1 is there again"
        assert stage.give(6, ev.ProcessReady(1, {})) == []

    def test_a_replacement_that_is_lost_is_replaced_again(self) -> None:
        stage = Stage()
        stage.give(4, ev.ProcessLost(4, "killed"))
        effects = stage.give(6, ev.ProcessLost(6, "killed"))
        assert [e.incarnation for e in effects if isinstance(e, Spawn)] == [7]
        assert stage.give(6, ev.ProcessReady(1, {})) == [ev.Send(6, ev.Fenced(1))]
        assert stage.driver.cast.workers == (3, 7, 5)

    def test_with_no_worker_left_nobody_computes_until_one_comes(self) -> None:
        stage = Stage()
        for worker in WORKERS:
            effects = stage.give(worker, ev.ProcessLost(worker, "killed"))
        assert {m.table for _, m in stage.sent(ev.MembershipChanged, effects)} == {(-1, -1, -1, -1)}
        effects = stage.give(7, ev.ProcessReady(1, {}))
        assert {m.table for _, m in stage.sent(ev.MembershipChanged, effects)} == {(7, 7, 7, 7)}
        assert not stage.finish()

    @pytest.mark.parametrize(("apart", "ends"), [(3.0, True), (0.1, False)])
    def test_a_slot_that_ends_three_workers_ends_the_run_unless_machines_went_together(
        self, apart: float, ends: bool
    ) -> None:
        stage = Stage()
        for worker in WORKERS:
            stage.now += apart
            stage.give(worker, ev.ProcessLost(worker, "killed"))
        assert bool(stage.finish()) == ends
        if ends:
            assert str(stage.finish()[0].error).startswith("step 0, slot 0: expected a worker to survive it, found 3")

    def test_a_commit_between_says_that_it_was_not_the_slot(self) -> None:
        stage = Stage()
        for step, worker in enumerate([*WORKERS, 6, 7, 8]):
            stage.now += 3.0
            stage.give(worker, ev.ProcessLost(worker, "killed"))
            stage.give(6 + step, ev.ProcessReady(1, {}))
            if step % 2:
                stage.commit(step // 2)
        assert not stage.finish()

    def test_a_shard_lost_without_a_checkpoint_ends_the_run(self) -> None:
        stage = Stage(cast=CAST)
        stage.give(2, ev.ProcessLost(2, "out of memory"))
        (finish,) = stage.finish()
        assert isinstance(finish.error, ProcessLost)
        assert "shard 1 is gone: out of memory" in str(finish.error)

    def test_another_evaluator_does_what_the_lost_one_did_not_end(self) -> None:
        stage = Stage(cast=CAST)
        stage.commit(0)
        (asked,) = [m for _, m in stage.sent(ev.Evaluate)]
        effects = stage.give(EVALUATOR, ev.ProcessLost(EVALUATOR, "out of memory"))
        assert [e.incarnation for e in effects if isinstance(e, Spawn)] == [7]
        effects = stage.give(7, ev.ProcessReady(1, {}))
        assert stage.sent(ev.Evaluate, effects) == [(7, asked)]

    @pytest.mark.parametrize(("kind", "expected"), [("BadInput", BadInput), ("KeyError", RunFailed)])
    def test_a_process_that_failed_ends_the_run_with_its_error(self, kind: str, expected: type) -> None:
        stage = Stage()
        stage.give(3, ev.ProcessFailed(1, kind, "no such file"))
        (finish,) = stage.finish()
        assert type(finish.error) is expected
        assert "worker 0: no such file" in str(finish.error)

    def test_the_dead_are_told_and_other_timelines_are_not_heard(self) -> None:
        stage = Stage(staged=False)
        stage.give(4, ev.ProcessLost(4, "killed"))
        assert stage.request(4) == [ev.Send(4, ev.Fenced(1))]
        assert stage.give(3, ev.LeaseRequested(2)) == []


class TestLeases:
    def granted(self, effects: list[Any]) -> dict[int, ev.LeaseGranted]:
        sent = [e for e in effects if isinstance(e, ev.Send)]
        return {e.to: e.message for e in sent if isinstance(e.message, ev.LeaseGranted)}

    def test_at_most_one_more_than_the_bound_are_under_way(self) -> None:
        stage = Stage(staged=False, bound=1)
        grants = [self.granted(stage.request(worker)) for worker in WORKERS]
        assert [sorted(g) for g in grants] == [[3], [4], []]
        assert sorted(self.granted(stage.end(3, grants[0][3]))) == [5]

    def test_a_worker_without_a_slot_goes_before_one_that_asks_ahead(self) -> None:
        stage = Stage(staged=False, bound=1)
        first = self.granted(stage.request(3))[3]
        self.granted(stage.request(4))
        stage.request(4)
        stage.request(5)
        assert sorted(self.granted(stage.end(3, first))) == [5]

    def test_the_leases_of_the_lost_are_closed_and_granted_again(self) -> None:
        stage = Stage(staged=False)
        mine, ahead = (self.granted(stage.request(3))[3] for _ in range(2))
        stage.request(4)
        effects = stage.give(3, ev.ProcessLost(3, "killed"))
        closed = stage.sent(ev.LeaseExpired, effects)
        assert sorted((to, m.worker, m.lease) for to, m in closed) == [
            (shard, 3, lease.lease) for shard in SHARDS for lease in (mine, ahead)
        ]
        again = [self.granted(stage.request(w))[w] for w in (4, 5)]
        assert [(g.step, g.slot) for g in again] == [(0, 0), (0, 1)]
        assert {g.lease for g in again}.isdisjoint({mine.lease, ahead.lease})

    def test_what_the_lost_asked_for_is_not_granted(self) -> None:
        stage = Stage(staged=False, bound=0)
        stage.request(3)
        stage.request(4)
        assert self.granted(stage.give(4, ev.ProcessLost(4, "killed"))) == {}
        assert self.granted(stage.give(3, ev.ProcessLost(3, "killed"))) == {}
        assert sorted(self.granted(stage.request(5))) == [5]

    def test_a_refused_lease_is_closed_on_all_shards_and_granted_again(self) -> None:
        stage = Stage(staged=False, bound=0)
        lease = self.granted(stage.request(3))[3]
        stage.request(3)
        effects = stage.end(3, lease, "gone")
        assert [to for to, _ in stage.sent(ev.LeaseExpired, effects)] == list(SHARDS)
        again = self.granted(effects)[3]
        assert (again.step, again.slot) == (lease.step, lease.slot)
        assert stage.lines() == []

    def test_an_end_told_twice_counts_once(self) -> None:
        stage = Stage(staged=False)
        lease = self.granted(stage.request(3))[3]
        stage.end(3, lease)
        assert stage.end(3, lease) == []
        assert len(stage.lines()) == 1

    @pytest.mark.parametrize("order", [ORDER, RAGGED])
    def test_every_slot_with_samples_is_granted_once_and_steps_are_counted(self, order: Order) -> None:
        stage = Stage(staged=False, steps=2 * order.steps_per_epoch, order=order)
        while grants := self.granted(stage.request(3)):
            stage.end(3, grants[3])
        assert covers(stage, epochs=2)
        assert stage.driver.tally.steps == 2 * order.steps_per_epoch
        assert stage.driver.tally.samples == 2 * order.samples
        assert stage.driver.tally.versions == stage.driver.assignment.versions(2 * order.steps_per_epoch)
        assert [e["metrics"]["staleness/max"] for e in stage.logs("step")] == [2.0] * stage.driver.tally.steps
        assert {m.version for _, m in stage.sent(ev.TakeSnapshot)} == {stage.driver.tally.versions}


def covers(stage: Stage, epochs: int) -> bool:
    places = Counter((line["epoch"], p) for line in stage.lines() for p in range(line["first"], line["last"] + 1))
    return places == Counter((e, p) for e in range(epochs) for p in range(stage.order.samples))


class TestLedgerLines:
    @pytest.mark.parametrize("order", [ORDER, RAGGED])
    def test_they_have_every_place_once_an_epoch(self, order: Order) -> None:
        stage = Stage(steps=2 * order.steps_per_epoch, order=order)
        for step in range(2 * order.steps_per_epoch):
            stage.commit(step)
        assert covers(stage, epochs=2)
        assert {line["state"] for line in stage.lines()} == {"applied"}

    def test_what_a_quorum_left_out_is_dropped(self) -> None:
        stage = Stage(steps=3)
        for step, slots in enumerate([(0, 1, 3), (1, 2, 3), (0, 1, 2, 3)]):
            stage.commit(step, slots, late=step)
        assert covers(stage, epochs=1)
        dropped = [(line["step"], line["slot"]) for line in stage.lines() if line["state"] == "dropped"]
        assert dropped == [(0, 2), (1, 0)]
        tally = stage.driver.tally
        assert (tally.dropped, tally.samples, tally.late_slots) == (4, 18, 3)

    def test_lines_name_timeline_and_generation(self) -> None:
        stage = Stage()
        stage.commit(0)
        stage.give(4, ev.ProcessLost(4, "killed"))
        stage.commit(1)
        assert [line["generation"] for line in stage.lines()] == [1] * 4 + [2] * 4
        assert {line["timeline"] for line in stage.lines()} == {1}


class TestPoison:
    def poisoned(self, stage: Stage, step: int, slot: int, worker: int) -> list[Any]:
        (stats,) = self.stats(stage, step, slot, worker)
        return stage.give(SHARDS[0], ev.Poisoned(1, step, (slot,), (stats,)))

    @staticmethod
    def stats(stage: Stage, step: int, slot: int, worker: int) -> tuple[ev.SlotStats, ...]:
        return tuple(replace(s, loss=float("nan"), worker=worker) for s in stage.stats(step, (slot,)))

    def examined(self, stage: Stage, step: int, slot: int, *, bad: bool) -> list[Any]:
        ((who, asked),) = stage.sent(ev.Examine)[-1:]
        assert (asked.step, asked.slot) == (step, slot)
        (stats,) = self.stats(stage, step, slot, who)
        return stage.give(who, ev.Examined(1, step, bad, stats))

    def test_another_worker_is_asked_and_where_it_finds_the_same_the_run_ends(self) -> None:
        stage = Stage()
        stage.commit(0)
        self.poisoned(stage, 1, 2, worker=WORKERS[0])
        ((who, _),) = stage.sent(ev.Examine)
        assert who != WORKERS[0]
        self.examined(stage, 1, 2, bad=True)
        (finish,) = stage.finish()
        assert isinstance(finish.error, Diverged)
        assert str(finish.error).startswith("step 1, slot 2: expected a finite loss")
        assert {line["step"] for line in stage.lines()} == {0}

    def test_who_is_asked_and_lost_is_not_waited_for(self) -> None:
        stage = Stage()
        self.poisoned(stage, 0, 2, worker=WORKERS[0])
        ((who, _),) = stage.sent(ev.Examine)
        stage.give(who, ev.ProcessLost(who, "killed"))
        assert [to for to, _ in stage.sent(ev.Examine)] != [who]
        assert len(stage.sent(ev.Examine)) == 2

    def test_an_answer_of_somebody_else_says_nothing(self) -> None:
        stage = Stage()
        self.poisoned(stage, 0, 2, worker=WORKERS[0])
        (stats,) = self.stats(stage, 0, 2, WORKERS[0])
        assert stage.give(WORKERS[0], ev.Examined(1, 0, True, stats)) == []

    def test_a_lease_is_given_to_another_worker_and_the_second_one_decides(self) -> None:
        stage = Stage(staged=False)
        lease = TestLeases().granted(stage.request(WORKERS[0]))[WORKERS[0]]
        stage.end(WORKERS[0], lease, "poisoned", bad=True)
        assert stage.finish() == []
        mine = TestLeases().granted(stage.request(WORKERS[0]))[WORKERS[0]]
        assert (mine.step, mine.slot) != (lease.step, lease.slot)
        again = TestLeases().granted(stage.request(WORKERS[1]))[WORKERS[1]]
        assert (again.step, again.slot, again.skip) == (lease.step, lease.slot, False)
        stage.end(WORKERS[1], again, "poisoned", bad=True)
        (finish,) = stage.finish()
        assert isinstance(finish.error, Diverged)
        assert str(finish.error).startswith("step 0, slot 0: ")
        assert stage.lines() == []


class TestEvaluation:
    def asked(self, stage: Stage) -> list[int]:
        """Versions asked for besides the last, each of shard 0 alone."""
        asked = stage.sent(ev.TakeSnapshot)
        assert {to for to, _ in asked} == {SHARDS[0]}
        return [m.version for _, m in asked if m.number != ev.FINAL]

    def test_it_is_asked_for_ahead_of_time(self) -> None:
        stage = Stage(cast=CAST, every=2)
        assert self.asked(stage) == [2]
        assert [(to, m.number) for to, m in stage.sent(ev.Evaluate)] == [(EVALUATOR, 1)]

    def test_one_at_a_time_and_what_comes_due_meanwhile_is_skipped_and_counted(self) -> None:
        stage = Stage(cast=CAST, every=2, steps=12)
        for step in range(7):
            stage.commit(step)
        assert self.asked(stage) == [2]
        stage.evaluated(1, 2)
        assert self.asked(stage) == [2, 8], "4 and 6 came due while 2 was evaluated"
        assert stage.driver.tally.skipped_evaluations == 2

    def test_an_evaluation_is_logged_at_its_own_step(self) -> None:
        stage = Stage(cast=CAST, every=2)
        for step in range(3):
            stage.commit(step)
        stage.evaluated(1, 2)
        (event,) = stage.logs("eval")
        assert (event["step"], event["version"], event["metrics"]["eval/loss"]) == (2, 2, 0.5)

    def test_by_seconds_it_is_asked_for_the_step_after(self) -> None:
        stage = Stage(cast=CAST, every=None, seconds=10.0, steps=9)
        stage.commit(0)
        assert stage.sent(ev.TakeSnapshot) == []
        stage.now = 11.0
        stage.commit(1)
        assert self.asked(stage) == [3]
        stage.now = 35.0
        stage.commit(2)
        stage.evaluated(1, 3)
        assert stage.driver.tally.skipped_evaluations == 2, "21 and 31 came due while it ran"
        assert self.asked(stage) == [3]
        stage.now = 42.0
        stage.commit(3)
        assert self.asked(stage) == [3, 5]

    @pytest.mark.parametrize("every", [1, 2, 3, 4, 6, 100])
    @pytest.mark.parametrize("speed", ["at once", "at the end"])
    def test_the_last_version_is_evaluated_exactly_once(self, every: int, speed: str) -> None:
        stage = Stage(cast=CAST, every=every)
        done = 0
        for step in range(6):
            stage.commit(step)
            while speed == "at once" and len(asked := stage.sent(ev.Evaluate)) > done:
                self.score(stage, asked[done][1].number, step)
                done += 1
        while len(asked := stage.sent(ev.Evaluate)) > done:
            self.score(stage, asked[done][1].number, 5)
            done += 1
        stage.deliver_final()
        steps = [event["step"] for event in stage.logs("eval")]
        assert steps.count(6) == 1
        assert steps == sorted(set(steps))
        assert stage.finish() == [Finish(None)]

    @staticmethod
    def score(stage: Stage, number: int, step: int) -> None:
        versions = {m.number: m.version for _, m in stage.sent(ev.TakeSnapshot)}
        stage.evaluated(number, min(versions[number], 6))

    @pytest.mark.parametrize("last", ["weights", "evaluation"])
    def test_the_run_is_over_when_weights_and_evaluation_are_in(self, last: str) -> None:
        stage = Stage(cast=CAST, every=100)
        for step in range(6):
            stage.commit(step)
        assert [to for to, m in stage.sent(ev.SnapshotPulled) if m.number == ev.FINAL] == list(SHARDS)
        acts = [stage.deliver_final, lambda: stage.evaluated(ev.FINAL, 6)]
        for act in acts if last == "evaluation" else acts[::-1]:
            assert not stage.finish()
            act()
        assert stage.finish() == [Finish(None)]

    def test_without_an_evaluator_the_weights_are_enough(self) -> None:
        stage = Stage()
        for step in range(6):
            stage.commit(step)
        stage.deliver_final()
        assert stage.finish() == [Finish(None)]
        assert stage.sent(ev.Evaluate) == []

    def test_in_bounded_mode_all_shards_are_asked_for_the_version_of_a_step(self) -> None:
        stage = Stage(cast=CAST, staged=False, every=2, order=RAGGED)
        asked = stage.sent(ev.TakeSnapshot)
        assert sorted(to for to, _ in asked) == list(SHARDS)
        assert {m.version for _, m in asked} == {6}, "4 slots of the first step and 2 of the short one"


@pytest.mark.parametrize("order", [ORDER, RAGGED])
def test_versions_and_steps_are_inverse(order: Order) -> None:
    for staged in (True, False):
        assignment = Stage(staged=staged, order=order).driver.assignment
        for step in range(7):
            assert assignment.steps_of(assignment.versions(step)) == step


def test_who_leaves_waits_for_the_checkpoint_of_all_that_is_committed_and_not_for_one_before() -> None:
    stage = Stage(steps=9)
    assignment = replace(stage.driver.assignment, save_steps=2)
    stage.driver = Driver(ALONE, assignment, 0.0)
    stage.effects = stage.driver.start(0.0)
    stage.commit(0)

    def write(version: int) -> list[Any]:
        (_, ask) = stage.sent(ev.TakeSnapshot)[-1]
        parts = [ev.ShardWritten(1, ask.number, i, f"v{version}-t1", "f", "0", 1, version, 0, "", "") for i in (0, 1)]
        return [effect for i, part in enumerate(parts) for effect in stage.give(SHARDS[i], part)]

    assert stage.driver.leave(RunFailed("asked to"), 0.0)
    stage.commit(1)
    (before,) = [e for e in [*write(2), *stage.effects] if isinstance(e, Save)][:1]
    stage.effects += stage.driver.saved(before.whole, 0.0, 0.0)
    assert not stage.finish()
    stage.commit(2)
    stage.give(SHARDS[0], ev.Limited(1, 3))
    assert stage.sent(ev.TakeSnapshot)[-1][1].version == 3
    (last,) = [e for e in write(3) if isinstance(e, Save)]
    assert [type(e) for e in stage.driver.saved(last.whole, 0.0, 0.0)] == [Log, Finish]
