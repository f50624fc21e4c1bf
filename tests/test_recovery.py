"""Processes that are lost while a run goes on: the same bits in sync mode, every sample once in every mode.

Everything but the processes' being gone is real: the trainer, the driver, shards, workers, files. Time is virtual.
"""

from __future__ import annotations

import gc
import random
import warnings
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_resume import STEPS, Ragged, clean, config, events, run, steps, without_pictures

from distgd import events as ev
from distgd.audit import audit, read
from distgd.errors import DeadlineExceeded, ProcessLost, RunFailed
from distgd.inprocess import InProcessCluster
from distgd.promise import Promise
from distgd.result import Result
from distgd.stopping import Stop
from distgd.trainer import launch
from distgd.transport import Loss

__all__ = ["without_pictures"]

STARTED = 0.02
"""Virtual seconds after which everybody has started."""


class DriverKilled(BaseException):
    """The driver is gone without a word: nobody catches this."""


class Chaos(InProcessCluster):
    """A cluster in which processes of these roles die at random times, `most` at most, `rate` a virtual second.

    The network does what `loss` says. The driver, where it is among the roles, dies without a word, too.
    """

    def __init__(self, seed: int, rate: float, roles: tuple[str, ...], most: int = 9, loss: Loss | None = None) -> None:
        super().__init__(seed, loss=loss)
        self._chance, self._rate, self._roles, self._most = random.Random(seed), rate, roles, most
        self.killed: list[str] = []
        self._at(STARTED + self._chance.expovariate(rate), self._strike)

    def _strike(self) -> None:
        victims: list[int] = [] if "driver" not in self._roles else [ev.DRIVER]
        victims += [i for i, process in self._processes.items() if process.actor.spec.role in self._roles]  # type: ignore[attr-defined]
        if victims and len(self.killed) < self._most:
            victim = self._chance.choice(victims)
            if victim == ev.DRIVER:
                self.killed.append("driver")
                raise DriverKilled
            self.killed.append(self._processes[victim].actor.spec.role)  # type: ignore[attr-defined]
            self._die(victim)
        self._at(self._now + self._chance.expovariate(self._rate), self._strike)


def through_all(
    path: Path,
    seed: int,
    mode: str,
    every: int,
    rate: float,
    roles: tuple[str, ...],
    loss: Loss | None,
    **more: Any,
) -> tuple[Result, Counter[str]]:
    """A run to its end, whoever is killed, the driver included, and what happened to it."""
    happened: Counter[str] = Counter()
    given = config(path, mode, checkpoint={"every": {"steps": every}}, **more)
    for start in range(40):
        cluster = Chaos(1000 * seed + start, rate, roles, most=max(0, 12 - happened.total()), loss=loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # who is killed closes nothing
            try:
                result = launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster, resume="auto")
            except (DriverKilled, RunFailed) as error:
                if isinstance(error, RunFailed) and "did not start" not in str(error):  # lost before it began
                    raise
                result = None
            if result is None:
                gc.collect()  # behind the exception, which holds what the driver had open
        happened.update(cluster.killed)
        if result is not None:
            happened.update(cluster.lossy.counted if cluster.lossy else {})
            return result, happened
    raise AssertionError("40 starts, and no end")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


def right(result: Result, path: Path, whole: Result, mode: str) -> bool:
    """Every sample once, each step logged once, and in sync mode the bits of a run that nothing happened to."""
    done = (result.samples, result.steps) == (whole.samples, whole.steps) and clean(path, whole.steps)
    done &= steps(path) == list(range(1, whole.steps + 1))
    return done and (mode != "sync" or (result.weights_sha256, result.best) == (whole.weights_sha256, whole.best))


ROLES = [("worker",), ("server",), ("evaluator",), ("worker", "server", "evaluator")]


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
@pytest.mark.parametrize("roles", ROLES, ids="+".join)
def test_whoever_is_lost_and_whenever(tmp_path: Path, whole: Result, mode: str, roles: tuple[str, ...]) -> None:
    killed = 0
    for seed in range(6):
        path = tmp_path / str(seed)
        cluster = Chaos(seed, (10.0, 30.0, 60.0)[seed % 3], roles)
        given = config(path, mode, checkpoint={"every": {"steps": (2, 5, 30)[seed // 3]}})
        result = launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster)
        killed += len(cluster.killed)
        assert right(result, path, whole, mode)
    assert killed >= 4


ALL = ("worker", "server", "evaluator", "driver")


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_messages_that_are_lost_doubled_late_and_out_of_order(tmp_path: Path, whole: Result, mode: str) -> None:
    for seed in range(3):
        result, happened = through_all(tmp_path / str(seed), seed, mode, 5, 1e-9, ALL, Loss())
        assert min(happened[what] for what in ("lost", "doubled", "refused", "again")) > 20
        assert right(result, tmp_path / str(seed), whole, mode)


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_everything_at_once(tmp_path: Path, whole: Result, mode: str) -> None:
    """Lost and doubled messages, deaths of any role, the driver's among them, which then goes on."""
    killed: Counter[str] = Counter()
    for seed in range(8):
        path, every, rate = tmp_path / str(seed), (2, 5, 30)[seed % 3], (10.0, 30.0)[seed % 2]
        result, happened = through_all(path, seed, mode, every, rate, ALL, Loss())
        assert right(result, path, whole, mode), f"seed {seed}"
        killed += happened
    assert min(killed[role] for role in ALL) > 0, killed


def test_a_network_that_sends_nothing_again_ends_the_run_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of sessions."""
    monkeypatch.setattr("distgd.transport.session.Session.rest", lambda session: [])
    with pytest.raises(DeadlineExceeded):
        through_all(tmp_path, 0, "sync", 5, 1e-9, ALL, Loss())


def test_survivors_are_not_restarted_and_the_ledger_says_that_all_went_back(tmp_path: Path, whole: Result) -> None:
    built: list[Any] = []

    class Counted(Ragged):
        def model(self) -> Any:
            built.append(1)
            return super().model()

    def go(path: Path, lose: dict[int, float]) -> Result:
        built.clear()
        cluster = InProcessCluster(0, lose=lose)
        return launch(config(path), "x", lambda event: None, task=Counted(), cluster=cluster)

    assert go(tmp_path / "calm", {}).weights_sha256 == whole.weights_sha256
    models = len(built)
    assert go(tmp_path / "lost", {2: 0.04}).weights_sha256 == whole.weights_sha256
    assert len(built) == models, "no worker has built its model anew"
    (fault,) = [event["message"] for event in events(tmp_path / "lost") if event["event"] == "fault"]
    assert fault == "shard 1 is gone: lost by plan"
    ledger = (tmp_path / "lost/runs/a/ledger.jsonl").read_text()
    assert ledger.count('"rollback"') == 1
    assert '"timeline": 2' in ledger


def test_without_checkpoints_a_lost_shard_ends_the_run(tmp_path: Path) -> None:
    cluster = InProcessCluster(0, lose={2: 0.04})
    given = config(tmp_path, checkpoint={"every": None})
    with pytest.raises(ProcessLost, match="shard 1 is gone"):
        launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster)


def test_buffers_that_are_kept_over_a_rollback_would_show(
    tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a worker that takes its own buffers for the checkpoint's computes other bits."""
    from distgd.worker import actor

    begin = actor.Worker._begin

    def keeping(self: Any, spec: Any, token: int) -> None:
        begin(self, spec, token)
        if token:
            kept = property(lambda work: 10**6, lambda work, value: None)
            self.work.__class__ = type("Work", (self.work.__class__,), {"buffers_version": kept})

    monkeypatch.setattr(actor.Worker, "_begin", keeping)
    cluster = InProcessCluster(0, lose={2: 0.04})
    result = launch(config(tmp_path), "x", lambda event: None, task=Ragged(), cluster=cluster)
    assert result.weights_sha256 != whole.weights_sha256


class Uneven(InProcessCluster):
    """Two shards are lost, one behind the other; their successors are ready so much later."""

    def __init__(self, *later: float) -> None:
        super().__init__(0, pace=lambda _: 0.004)
        self._later = list(later)
        self._at(0.060, lambda: self._die(1))
        self._at(0.061, lambda: self._die(2))

    def add(self, incarnation: int, spec: Any, *, patient: bool = False) -> None:
        self._place(incarnation, spec)
        later = self._later.pop(0) if self._later else 0.005
        self._at(self._now + later, lambda: self._begin(incarnation, spec))


@pytest.mark.parametrize("later", [(0.1, 0.01), (0.02, 0.1)], ids=str)
@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_both_successors_of_two_shards_are_waited_for_and_looked_at(
    tmp_path: Path, whole: Result, mode: str, later: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, seen = Promise.judge, set()

    def judged(self: Promise, cast: Any, facts: Any) -> Any:
        seen.update(facts)
        return judge(self, cast, facts)

    monkeypatch.setattr(Promise, "judge", judged)
    given = config(tmp_path, mode, checkpoint={"every": {"steps": 3}})
    result = launch(given, "x", lambda event: None, task=Ragged(), cluster=Uneven(*later))
    assert right(result, tmp_path, whole, mode)
    assert seen >= set(range(1, 9))


@dataclass(frozen=True)
class Counted:
    """A specification whose process takes its memory by way of a count, in numbers by incarnation."""

    spec: Any
    incarnation: int
    taken: Counter[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)

    def build(self, clock: Any, allocate: Any) -> Any:
        def counted(size: int, dtype: str) -> Any:
            self.taken[self.incarnation] += size
            return allocate(size, dtype)

        return self.spec.build(clock, counted)


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_going_back_takes_no_new_memory_from_those_who_live(tmp_path: Path, whole: Result, mode: str) -> None:
    """Peers keep mapped what they were shown once: a soak on Ray found a gradient more in each timeline."""

    class Counting(Chaos):
        def __init__(self, rate: float, most: int) -> None:
            super().__init__(3, rate, ("server",), most=most)
            self.taken: Counter[int] = Counter()

        def _begin(self, incarnation: int, spec: Any) -> None:
            super()._begin(incarnation, Counted(spec, incarnation, self.taken))

    def most(path: Path, cluster: Counting) -> int:
        given = config(path, mode, checkpoint={"every": {"steps": 3}})
        result = launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster)
        assert right(result, path, whole, mode)
        return max(cluster.taken.values())

    calm, struck = Counting(1e-9, 0), Counting(60.0, 10)
    assert most(tmp_path / "struck", struck) <= 1.5 * most(tmp_path / "calm", calm)
    assert len(struck.killed) > 5


class Starved(InProcessCluster):
    """The driver is slower than everything else: it hears a message when nothing else is left to happen.

    Attributes:
        most: the messages that have waited for it at once.
    """

    def __init__(self) -> None:
        super().__init__(0)
        self.most = 0
        self._unheard: deque[tuple[int, Any]] = deque()

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        while (arrived := super().receive(timeout if not self._unheard else 0.1)) is not None:
            self._unheard.append(arrived)
            self.most = max(self.most, len(self._unheard))
        return self._unheard.popleft() if self._unheard else None


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_what_waits_for_a_slow_driver_is_bounded(
    tmp_path: Path, whole: Result, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting(path: Path) -> int:
        cluster = Starved()
        result = launch(config(path, mode), "x", lambda event: None, task=Ragged(), cluster=cluster)
        assert (result.samples, result.steps) == (whole.samples, STEPS)
        assert mode != "sync" or result.weights_sha256 == whole.weights_sha256
        return cluster.most

    monkeypatch.setattr("distgd.driver.LEAD", 6)
    most = waiting(tmp_path / "bounded")
    assert most <= 6 + 12, "the steps that shards may be ahead, and a few answers"
    if mode == "sync":
        monkeypatch.setattr("distgd.driver.LEAD", STEPS)
        assert waiting(tmp_path / "not") > most, "the twin"


def test_a_stop_that_is_asked_for_at_a_fault_is_kept(tmp_path: Path) -> None:
    def watch(event: dict[str, Any]) -> Stop | None:
        return Stop("seen enough") if event["event"] == "fault" else None

    given = config(tmp_path, checkpoint={"every": {"steps": 5}})
    result = launch(given, "x", watch, task=Ragged(), cluster=Chaos(1, 60.0, ("server",), most=1))
    assert (result.status, result.ended_by) == ("stopped", "stopped: seen enough")
    assert result.steps < STEPS
    assert audit(read(tmp_path / "runs/a/ledger.jsonl")).clean
