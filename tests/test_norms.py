"""The limit on a slot's norm."""

from __future__ import annotations

from math import inf, nan

import pytest

from distgd.events import SlotStats
from distgd.norms import FEWEST, WINDOW, Norms


def stats(square: float, loss: float = 1.0) -> SlotStats:
    return SlotStats(0, 1, 1.0, loss, square, 0.0)


def test_no_limit_until_enough_is_known() -> None:
    norms = Norms(3.0)
    for _ in range(FEWEST - 1):
        norms.observe([stats(4.0)])
        assert norms.limit == inf
    norms.observe([stats(4.0)])
    assert (norms.median, norms.limit) == (2.0, 36.0)
    assert not norms.exceeds(stats(36.0))
    assert norms.exceeds(stats(36.1))


@pytest.mark.parametrize("strange", [stats(nan), stats(inf), stats(100.0, loss=nan)])
def test_what_is_not_finite_is_another_matter(strange: SlotStats) -> None:
    norms = Norms(3.0, [4.0] * FEWEST)
    assert not norms.exceeds(strange)


def test_the_median_is_that_of_the_last_ones_and_one_outlier_does_not_move_it() -> None:
    norms = Norms(2.0, [1.0] * WINDOW)
    norms.observe([stats(1e12)])
    assert norms.limit == 4.0
    norms.observe([stats(9.0)] * WINDOW)
    assert norms.limit == 36.0
    assert len(norms.squares) == WINDOW


def test_slots_without_a_gradient_do_not_count() -> None:
    norms = Norms(2.0)
    norms.observe([stats(0.0)] * 100)
    assert norms.squares == []


def test_without_a_ratio_nothing_is_kept() -> None:
    norms = Norms(None, [])
    norms.observe([stats(1.0)] * 100)
    assert (norms.squares, norms.limit) == ([], inf)


def test_it_goes_on_where_it_was() -> None:
    norms = Norms(2.0)
    norms.observe([stats(float(k)) for k in range(1, 40)])
    assert Norms(2.0, norms.squares).limit == norms.limit
