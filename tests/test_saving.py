"""When a checkpoint is asked for: each step of the cadence once, whoever is ahead of whom."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distgd.saving import Saving


def saving(every: int, step: int = 0) -> Saving:
    return Saving(every, None, shards=2, staged=False, step=step, version=5 * step, now=0.0)


@given(st.integers(1, 7), st.integers(0, 20), st.lists(st.integers(0, 3), max_size=40))
def test_every_step_of_the_cadence_is_asked_for_once_and_ahead(every: int, first: int, ahead: list[int]) -> None:
    """Also where the files are there before the driver has counted that step."""
    wanted, step, asked = saving(every, first), first, list[int]()
    for steps in ahead:
        due = wanted.next(step, 0.0)
        assert due is not None
        assert due > step
        assert due % every == 0
        asked.append(due)
        step += steps
    assert asked == sorted(set(asked))


def test_none_is_asked_for_while_one_is_under_way() -> None:
    wanted = saving(2)
    assert wanted.next(0, 0.0) == 2
    wanted.ask(10, 0, dict)
    assert wanted.next(1, 0.0) is None
    wanted.ended(10)
    assert wanted.next(1, 0.0) == 4
