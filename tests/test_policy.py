"""Policies as lists of events: what is applied, once, when, and never too stale."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgd.policy import (
    ApplyPush,
    ApplyStep,
    Arrived,
    Closed,
    Decide,
    Decided,
    Decision,
    Drop,
    Event,
    Filled,
    Hold,
    Immediate,
    Limit,
    Limited,
    Made,
    Opened,
    Propose,
    Report,
    Skipped,
    Staged,
    Survived,
    Suspect,
    Withdrawn,
)


def arrived(first: int, stop: int, step: int = 0, **more: object) -> Arrived:
    return Arrived((first, stop), step, (first, stop), **more)  # type: ignore[arg-type]


def staged(slots: int = 4, quorum: int | None = None, shards: int = 1, measure: bool = False) -> Staged:
    return Staged(slots=slots, quorum=quorum or slots, shards=shards, measure=measure)


def slots_of(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


class TestStaged:
    def test_nothing_is_applied_before_the_decision(self) -> None:
        policy = staged()
        assert policy.handle(arrived(0, 2)) == [Hold((0, 2))]
        full = policy.handle(arrived(2, 4))
        assert full == [Hold((2, 4)), Report(0, 0, slots_of(0, 1, 2, 3), frozenset())]
        assert policy.version == 0
        assert policy.handle(Decided(0, slots_of(0, 1, 2, 3), True)) == [ApplyStep(0, slots_of(0, 1, 2, 3), True)]
        assert policy.version == 1

    def test_what_is_covered_is_ignored(self) -> None:
        policy = staged()
        policy.handle(arrived(0, 2))
        assert policy.handle(arrived(0, 2)) == [Drop((0, 2), "covered")]
        assert policy.handle(arrived(1, 2)) == [Drop((1, 2), "covered")]
        policy.handle(arrived(2, 4))
        assert policy.handle(arrived(0, 4)) == [Drop((0, 4), "covered")], "covered by smaller ones, nothing changes"

    def test_a_larger_push_replaces_smaller_ones_while_the_tree_is_not_full(self) -> None:
        policy = staged()
        policy.handle(arrived(0, 1))
        policy.handle(arrived(2, 3))
        decisions = policy.handle(arrived(0, 4))
        assert decisions[:2] == [Drop((0, 1), "covered"), Drop((2, 3), "covered")]
        assert Hold((0, 4)) in decisions

    def test_late_pushes_are_dropped(self) -> None:
        policy = staged(slots=2)
        policy.handle(arrived(0, 2))
        policy.handle(Decided(0, slots_of(0, 1), True))
        assert policy.handle(arrived(0, 1, step=0)) == [Drop((0, 1), "late")]

    def test_shard_0_decides_once_every_shard_is_full(self) -> None:
        policy = staged(shards=3)
        everything = slots_of(0, 1, 2, 3)
        assert policy.handle(Filled(1, 0, 0, everything, frozenset())) == []
        assert policy.handle(Filled(0, 0, 0, everything, frozenset())) == []
        assert policy.handle(Filled(0, 0, 0, everything, frozenset())) == [], "a repeated report counts once"
        assert policy.handle(Filled(2, 0, 0, everything, frozenset())) == [Decide(0, everything, frozenset(), True)]

    def test_a_bad_slot_on_one_shard_holds_the_step_back_on_all_until_it_is_skipped(self) -> None:
        policy = staged(slots=2, shards=2)
        policy.handle(Filled(0, 0, 0, slots_of(0, 1), frozenset()))
        assert policy.handle(Filled(1, 0, 0, slots_of(0, 1), slots_of(1))) == [Suspect(0, slots_of(0, 1), slots_of(1))]
        assert policy.handle(Filled(1, 0, 0, slots_of(0, 1), frozenset())) == []
        assert policy.handle(Limited(0)) == [Limit(1)], "it is under way"
        assert policy.handle(Skipped(1)) == []
        assert policy.handle(Skipped(0)) == [Decide(0, slots_of(0, 1), slots_of(1), apply=False)]
        policy.handle(Decided(0, slots_of(0, 1), False))
        assert policy.handle(Skipped(0)) == [], "said twice, it is done once"

    def test_a_quorum_counts_slots_that_every_shard_holds(self) -> None:
        policy = staged(quorum=2, shards=2)
        policy.handle(Filled(0, 0, 0, slots_of(0, 1), frozenset()))
        assert policy.handle(Filled(1, 0, 0, slots_of(1, 2), frozenset())) == []
        assert policy.handle(Filled(1, 0, 0, slots_of(0, 1, 2), frozenset())) == [
            Decide(0, slots_of(0, 1), frozenset(), True)
        ]

    def test_a_quorum_with_a_norm_takes_one_more_round_over_fixed_slots(self) -> None:
        policy = staged(quorum=2, shards=2, measure=True)
        policy.handle(Filled(0, 0, 0, slots_of(0, 1), frozenset()))
        assert policy.handle(Filled(1, 0, 0, slots_of(0, 1), frozenset())) == [Propose(0, 0, slots_of(0, 1))]
        assert policy.handle(Filled(0, 0, 0, slots_of(0, 1, 2), frozenset())) == [], "the proposal does not grow"
        assert policy.handle(Filled(0, 0, 0, slots_of(0, 1), frozenset())) == []
        assert policy.handle(Filled(1, 0, 0, slots_of(0, 1), frozenset())) == [
            Decide(0, slots_of(0, 1), frozenset(), True)
        ]

    def test_a_decision_waits_for_slots_that_are_still_under_way(self) -> None:
        policy = staged(quorum=2)
        policy.handle(arrived(0, 1))
        assert policy.handle(Decided(0, slots_of(0, 1), True)) == []
        decisions = policy.handle(arrived(1, 2))
        assert decisions[-1] == ApplyStep(0, slots_of(0, 1), True)

    def test_a_withdrawn_attempt_leaves_nothing_behind(self) -> None:
        policy = staged(slots=2)
        policy.handle(arrived(0, 1))
        assert policy.handle(Withdrawn(0, 1)) == [Drop((0, 1), "withdrawn")]
        assert policy.handle(arrived(0, 2)) == [Drop((0, 2), "withdrawn")], "a push of the former attempt"
        assert Hold((0, 2)) in policy.handle(arrived(0, 2, attempt=1))
        assert policy.handle(Withdrawn(0, 1)) == [], "an attempt goes up, and only up"

    @given(st.data())
    def test_any_cover_of_the_slots_in_any_order_fills_the_tree_once(self, data: st.DataObject) -> None:
        slots = data.draw(st.integers(1, 9))
        policy = staged(slots=slots)
        pushes = [(k, k + 1) for k in range(slots)] * data.draw(st.integers(1, 3))
        reports = 0
        for first, stop in data.draw(st.permutations(pushes)):
            reports += sum(isinstance(d, Report) for d in policy.handle(arrived(first, stop)))
        assert reports == 1
        assert policy.held == frozenset(range(slots))


class TestLimit:
    """Steps from a limit on gather and are not decided."""

    ALL = frozenset({0, 1})

    def full(self, policy: Staged, step: int) -> list[object]:
        policy.handle(arrived(0, 2, step))
        return list(policy.handle(Filled(0, step, 0, self.ALL, frozenset())))

    def test_a_step_at_the_limit_is_decided_once_the_limit_is_raised(self) -> None:
        policy = staged(slots=2)
        assert policy.handle(Limited(1)) == [Limit(1)]
        assert self.full(policy, 0) == [Decide(0, self.ALL, frozenset(), True)]
        policy.handle(Decided(0, self.ALL, True))
        assert self.full(policy, 1) == []
        assert policy.handle(Limited(2)) == [Limit(2), Decide(1, self.ALL, frozenset(), True)]

    def test_a_limit_below_what_is_decided_stands_at_it(self) -> None:
        policy = staged(slots=2)
        self.full(policy, 0)
        policy.handle(Decided(0, self.ALL, True))
        assert policy.handle(Limited(0)) == [Limit(1)]
        assert self.full(policy, 1) == []

    def test_a_step_that_is_being_measured_is_under_the_limit(self) -> None:
        policy = staged(slots=3, quorum=2, measure=True)
        policy.handle(arrived(0, 1))
        policy.handle(arrived(1, 2))
        assert policy.handle(Filled(0, 0, 0, self.ALL, frozenset())) == [Propose(0, 0, self.ALL)]
        assert policy.handle(Limited(0)) == [Limit(1)]
        assert policy.handle(Filled(0, 0, 0, self.ALL, frozenset())) == [Decide(0, self.ALL, frozenset(), True)]


def immediate(bound: int | None = None) -> Immediate:
    return Immediate(bound=bound, filled=lambda step: 4)


def let(policy: Immediate, event: Event) -> list[Decision]:
    """What is decided, with all that follows as each update is made."""
    decisions: list[Decision] = []
    todo = policy.handle(event)
    while todo:
        decisions += todo
        todo = policy.handle(Made()) if any(isinstance(d, ApplyPush) for d in todo) else []
    return decisions


def push(worker: int, lease: int, slot: int, step: int = 0) -> Arrived:
    return Arrived((worker, lease), step, (slot, slot + 1))


class TestImmediate:
    def test_async_applies_at_once_and_counts_staleness(self) -> None:
        policy = immediate()
        policy.handle(Opened((1, 1), 0, 0))
        policy.handle(Opened((2, 2), 0, 1))
        assert let(policy, push(1, 1, 0))[-1] == ApplyPush((1, 1), 0, True)
        assert let(policy, push(2, 2, 1))[-1] == ApplyPush((2, 2), 1, True)

    def test_a_bound_holds_what_would_make_another_read_too_stale(self) -> None:
        policy = immediate(bound=0)
        policy.handle(Opened((1, 1), 0, 0))
        policy.handle(Opened((2, 2), 0, 1))
        assert let(policy, push(1, 1, 0)) == [Hold((1, 1))]
        assert let(policy, Closed((2, 2))) == [ApplyPush((1, 1), 0, True)], "the other read is gone"

    def test_a_read_asked_twice_keeps_its_first_version(self) -> None:
        policy = immediate()
        policy.handle(Opened((1, 1), 0, 0))
        policy.handle(Opened((2, 2), 0, 1))
        let(policy, push(2, 2, 1))
        policy.handle(Opened((1, 1), 0, 0))
        assert let(policy, push(1, 1, 0))[-1] == ApplyPush((1, 1), 1, True)

    def test_a_slot_is_applied_once(self) -> None:
        policy = immediate()
        policy.handle(Opened((1, 1), 0, 0))
        policy.handle(Opened((2, 2), 0, 0))
        let(policy, push(1, 1, 0))
        assert let(policy, push(2, 2, 0)) == [Drop((2, 2), "covered")]
        assert policy.reads == {}, "covered closes the read"
        policy.handle(Opened((3, 3), 0, 0))
        assert policy.reads == {}, "no read is opened for a covered slot"

    def test_a_push_without_an_open_read_is_refused(self) -> None:
        policy = immediate(bound=1)
        assert let(policy, push(1, 1, 0)) == [Drop((1, 1), "gone")]
        policy.handle(Closed((2, 2)))
        assert policy.handle(Opened((2, 2), 0, 0)) == [Drop((2, 2), "gone")], "an expired lease opens nothing"

    def test_the_dead_block_nobody(self) -> None:
        policy = immediate(bound=0)
        policy.handle(Opened((1, 1), 0, 0))
        policy.handle(Opened((2, 2), 0, 1))
        let(policy, push(1, 1, 0))
        assert ApplyPush((1, 1), 0, True) in let(policy, Survived(frozenset({1})))

    def test_a_gradient_that_is_not_finite_counts_without_effect(self) -> None:
        policy = immediate()
        policy.handle(Opened((1, 1), 0, 0))
        bad = Arrived((1, 1), 0, (0, 1), bad=slots_of(0))
        assert let(policy, bad)[-1] == ApplyPush((1, 1), 0, apply=False)

    def test_updates_are_let_through_one_by_one(self) -> None:
        """What is applied is what is in the weights, also between two that became feasible together."""
        policy = immediate(bound=2)
        for worker in (1, 2, 3):
            policy.handle(Opened((worker, worker), 0, worker))
        policy.held = {(w, w): push(w, w, w) for w in (1, 2, 3)}
        seen = [policy.handle(Closed((9, 9))), policy.handle(Survived(frozenset({1, 2, 3})))]
        assert [len(policy.applied["slots"]), *map(len, seen)] == [1, 1, 0]
        assert [type(d) for d in policy.handle(Made())] == [ApplyPush]
        assert (policy.version, len(policy.applied["slots"])) == (2, 2)


def bounded_run(bound: int, workers: int, seed: int, *, limit: int, lost: bool = True) -> tuple[int, bool]:
    """Random schedules of one shard; the largest staleness, and whether every slot was applied."""
    rng = random.Random(seed)
    policy = Immediate(bound=bound, filled=lambda step: 4)
    todo = [(t, k) for t in range(6) for k in range(4)][::-1]
    open_leases: dict[tuple[int, int], tuple[int, int]] = {}
    phase: dict[tuple[int, int], str] = {}
    worst = applied = number = 0
    total = len(todo)
    for _ in range(4000):
        moves = [key for key, what in phase.items() if what in ("granted", "reading")]
        if todo and len(open_leases) < limit and (not moves or rng.random() < 0.4):
            number += 1
            key = (rng.randrange(workers), number)
            open_leases[key] = todo.pop()
            phase[key] = "granted"
            continue
        if not moves:
            break
        key = rng.choice(moves)
        step, slot = open_leases[key]
        if lost and rng.random() < 0.05:
            decisions = let(policy, Closed(key))
            todo.append(open_leases.pop(key))
            del phase[key]
        elif phase[key] == "granted":
            decisions = policy.handle(Opened(key, step, slot))
            phase[key] = "reading"
        else:
            decisions = let(policy, Arrived(key, step, (slot, slot + 1)))
            phase[key] = "pushed"
        for decision in decisions:
            if isinstance(decision, ApplyPush):
                worst = max(worst, decision.staleness)
                applied += 1
                open_leases.pop(decision.key)
                phase.pop(decision.key)
    return worst, applied == total


@settings(max_examples=200)
@given(st.sampled_from([0, 1, 2, 4, 16]), st.integers(1, 16), st.integers(0, 10**9))
def test_never_above_the_bound_and_never_stuck(bound: int, workers: int, seed: int) -> None:
    worst, whole = bounded_run(bound, workers, seed, limit=bound + 1)
    assert worst <= bound
    assert whole


def test_without_the_grant_it_gets_stuck() -> None:
    """The twin: the limit of s + 1 slots under way is what prevents the deadlock."""
    assert not all(bounded_run(2, 8, seed, limit=8, lost=False)[1] for seed in range(20))


def test_without_enforcement_it_goes_above_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the check of feasibility is what keeps the bound."""
    monkeypatch.setattr(Immediate, "feasible", lambda self, key: True)
    assert any(bounded_run(1, 8, seed, limit=8)[0] > 1 for seed in range(20))
