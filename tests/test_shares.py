"""Shares of a step's slots by speed."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_recovery import Chaos, right
from test_resume import Ragged, config, events, run, without_pictures

from distgd.events import SlotStats
from distgd.inprocess import InProcessCluster
from distgd.ledger import assign
from distgd.result import Result
from distgd.shares import SEEN, Speeds, fair, longest
from distgd.trainer import launch

__all__ = ["without_pictures"]
SPEEDS = st.dictionaries(st.integers(1, 9), st.floats(1e-3, 10.0), min_size=1, max_size=4)


@given(SPEEDS, st.integers(1, 9))
def test_no_other_shares_are_done_sooner_and_nobody_is_idle(seconds: dict[int, float], slots: int) -> None:
    shares = fair(seconds, slots)
    assert sum(shares.values()) == slots
    assert slots < len(seconds) or min(shares.values()) >= 1
    if slots < len(seconds):
        return
    others = (dict(zip(seconds, counts, strict=True)) for counts in product(range(1, slots + 1), repeat=len(seconds)))
    best = min(longest(other, seconds) for other in others if sum(other.values()) == slots)
    assert longest(shares, seconds) <= best * (1 + 1e-12)


def stats(worker: int, seconds: float) -> SlotStats:
    return SlotStats(0, 4, 4.0, 1.0, 1.0, seconds, worker)


def speeds(**seconds: float) -> Speeds:
    found = Speeds()
    for _ in range(SEEN):
        found.observe(stats(int(name[1:]), took) for name, took in seconds.items())
    return found


def test_a_slow_worker_gets_fewer() -> None:
    assert speeds(w1=1.0, w2=1.0, w3=1.0, w4=3.0).better(100, assign(12, [1, 2, 3, 4]), [1, 2, 3, 4]) == {
        1: 4,
        2: 4,
        3: 3,
        4: 1,
    }


@pytest.mark.parametrize("noise", [1.0, 1.05, 1.1])
def test_what_saves_little_is_left_as_it_is(noise: float) -> None:
    assert speeds(w1=1.0, w2=noise).better(100, assign(20, [1, 2]), [1, 2]) is None


def test_nothing_is_said_of_workers_that_are_not_known_or_have_no_slots() -> None:
    found = speeds(w1=1.0, w2=9.0)
    assert found.better(100, assign(6, [1, 2, 3]), [1, 2, 3]) is None
    assert found.better(200, (1, 1, 1), [1, 2]) is None
    assert found.better(300, (), []) is None
    assert Speeds().better(100, assign(6, [1, 2]), [1, 2]) is None


def test_one_hiccup_is_no_speed() -> None:
    found = speeds(w1=1.0, w2=1.0)
    found.observe([stats(1, 100.0)])
    assert found.better(100, assign(6, [1, 2]), [1, 2]) is None


def test_who_shares_a_core_is_slow_at_times_and_not_slow() -> None:
    found = Speeds()
    for number in range(SEEN):
        found.observe([stats(1, 1.0), stats(2, 3.0 if number % 2 else 1.0)])
    assert found.better(100, assign(6, [1, 2]), [1, 2]) is None


def test_after_each_change_the_next_one_takes_twice_as_long() -> None:
    found, table, looks = Speeds(), (1,) * 3 + (2,) * 3, []
    for step in range(0, 2000, 10):
        slow = len(looks) % 2
        for _ in range(SEEN):
            found.observe([stats(1, 1.0 + 9 * slow), stats(2, 10.0 - 9 * slow)])
        shares = found.better(step, table, [1, 2])
        if shares is not None:
            looks.append(step)
            table = (1,) * shares[1] + (2,) * shares[2]
    assert looks == [20, 60, 140, 300, 620, 1260]


# In a run.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"), **FINER)


FINER: dict[str, Any] = {"batch": {"size": 30, "slots": 10}, "cluster": {"workers": 3}}
SLOW = 3  # the first of the workers


def pace(incarnation: int) -> float:
    return 4e-3 if incarnation == SLOW else 1e-3


def go(path: Path, cluster: InProcessCluster) -> Result:
    given = config(path, **FINER, checkpoint={"every": {"steps": 5}})
    return launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster)


def seconds_of_steps(path: Path, first: int, last: int) -> float:
    at = {event["step"]: event["seconds"] for event in events(path) if event["event"] == "step"}
    return at[last] - at[first]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distgd.shares.EVERY", 6)
    monkeypatch.setattr("distgd.shares.SEEN", 5)


@pytest.mark.parametrize("machines", [1, 2])
def test_a_straggler_costs_less_once_it_is_known_and_no_bit(
    tmp_path: Path, whole: Result, soon: None, machines: int
) -> None:
    result = go(tmp_path, InProcessCluster(0, pace, machines=machines))
    assert right(result, tmp_path, whole, "sync")
    (told,) = [event["message"] for event in events(tmp_path) if event["event"] == "shares"]
    assert "worker 0 1" in told
    before, after = seconds_of_steps(tmp_path, 2, 6), seconds_of_steps(tmp_path, 10, 14)
    assert after < 0.55 * before, "16 ms with four slots, 5 ms with one"


def test_twin_without_shares_it_costs_the_same_for_ever(
    tmp_path: Path, whole: Result, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speeds, "better", lambda *args: None)
    result = go(tmp_path, InProcessCluster(0, pace))
    assert right(result, tmp_path, whole, "sync")
    assert seconds_of_steps(tmp_path, 10, 14) > 0.8 * seconds_of_steps(tmp_path, 2, 6)


def test_equal_workers_keep_equal_shares(tmp_path: Path, whole: Result, soon: None) -> None:
    assert right(go(tmp_path, InProcessCluster(0)), tmp_path, whole, "sync")
    assert not [event for event in events(tmp_path) if event["event"] == "shares"]


class Uneven(Chaos):
    """Some workers are slow, some of those who replace them, too."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, 15.0, ("worker", "server"), most=4)
        self._pace = lambda incarnation: 1e-3 * (1 + 3 * (incarnation * 7 % 3 == 0))


def test_whoever_is_killed_meanwhile(tmp_path: Path, whole: Result, soon: None) -> None:
    killed, changes = 0, 0
    for seed in range(6):
        cluster = Uneven(seed)
        assert right(go(tmp_path / str(seed), cluster), tmp_path / str(seed), whole, "sync")
        killed += len(cluster.killed)
        changes += len([event for event in events(tmp_path / str(seed)) if event["event"] == "shares"])
    assert killed >= 6
    assert changes >= 6
