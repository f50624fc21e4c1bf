"""Two thousand random schedules; `scripts/prove faults --row 1` plays ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest
import schedules

AT_ONCE = 400


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(10_000, 12_000, AT_ONCE))
def test_whatever_happens(tmp_path: Path, first: int) -> None:
    bad, happened = schedules.play(tmp_path, range(first, first + AT_ONCE))
    assert not bad
    for what in ("worker", "server", "evaluator", "driver", "lost", "doubled", "refused"):
        assert happened[what] > AT_ONCE / 4, happened


def test_a_seed_replays_its_schedule(tmp_path: Path) -> None:
    first, second = (schedules.play(tmp_path / name, range(12)) for name in "ab")
    assert first == second
    assert first[1].total() > 100
