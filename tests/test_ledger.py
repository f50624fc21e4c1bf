"""Every slot is applied once, at most `limit` leases are under way, and what is lost is granted again."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from distgd.ledger import Ledger, assign


@given(st.integers(1, 40), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 10**6))
def test_every_slot_is_applied_once_whatever_is_lost(slots: int, workers: int, limit: int | None, seed: int) -> None:
    rng = random.Random(seed)
    wanted = [(k // 3, k % 3) for k in range(slots)]
    ledger = Ledger(wanted, limit)
    applied: list[tuple[int, int]] = []
    while ledger.applied < slots:
        assert limit is None or len(ledger.open) <= limit
        move = rng.random()
        if move < 0.6:
            ledger.grant(rng.randrange(workers), now=0.0)
        elif move < 0.7:
            ledger.expire(rng.randrange(workers))
        elif ledger.open:
            number = rng.choice(list(ledger.open))
            succeeded = rng.random() < 0.8
            lease = ledger.end(number, applied=succeeded)
            assert lease is not None
            assert ledger.end(number, applied=True) is None, "a closed lease counts nothing"
            if succeeded:
                applied.append((lease.step, lease.slot))
    assert sorted(applied) == wanted
    assert ledger.grant(0, now=0.0) is None


def test_a_lost_slot_comes_before_new_ones() -> None:
    ledger = Ledger([(0, 0), (0, 1), (0, 2)], None)
    first = ledger.grant(1, now=0.0)
    assert first is not None
    ledger.expire(1)
    again = ledger.grant(2, now=1.0)
    assert again is not None
    assert (again.step, again.slot) == (0, 0)
    assert again.number != first.number


@given(st.integers(1, 64), st.integers(1, 20))
def test_assignment_is_in_runs_and_even(slots: int, workers: int) -> None:
    table = assign(slots, list(range(100, 100 + workers)))
    assert len(table) == slots
    assert list(table) == sorted(table)
    counts = [table.count(worker) for worker in range(100, 100 + workers)]
    assert max(counts) - min(counts) <= 1


def test_new_slots_are_granted_below_the_limit_of_steps_and_lost_ones_in_any_case() -> None:
    ledger = Ledger([(step, slot) for step in range(4) for slot in range(2)], limit=None)
    ledger.steps = 1
    first, second = ledger.grant(7, 0.0), ledger.grant(8, 0.0)
    assert ledger.grant(9, 0.0) is None
    assert ledger.begun == 1
    assert first is not None and second is not None
    ledger.end(first.number, applied=False)
    again = ledger.grant(9, 0.0)
    assert again is not None and (again.step, again.slot) == (0, 0)
    ledger.steps = 2
    assert [lease.step for lease in (ledger.grant(7, 0.0), ledger.grant(7, 0.0)) if lease] == [1, 1]
    assert ledger.grant(7, 0.0) is None
    assert ledger.begun == 2
