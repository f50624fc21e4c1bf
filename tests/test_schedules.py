"""Two thousand random schedules of short runs; `scripts/prove faults --row 1` has ten thousand of longer ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_recovery import schedule
from test_resume import run, without_pictures

from distgd.result import Result

__all__ = ["without_pictures"]

SEEDS, AT_ONCE = 2000, 100
SHORT: dict[str, Any] = {"stop": {"steps": 8}, "eval": {"every": {"steps": 3}}}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("short"), **SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_random_schedules(tmp_path: Path, short: Result, first: int) -> None:
    wrong, happened = [], Counter[str]()
    for seed in range(first, first + AT_ONCE):
        found, what = schedule(tmp_path, short, 10_000 + seed, 3.0, **SHORT)
        wrong += found
        happened += what
    assert not wrong
    assert min(happened[what] for what in ("worker", "server", "driver", "lost", "doubled")) > 0, happened
