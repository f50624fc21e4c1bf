"""Processes that are lost while a run goes on: the same bits in sync mode, every sample once in every mode.

Everything but the processes' being gone is real: the trainer, the driver, shards, workers, files. Time is virtual.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from test_resume import STEPS, Ragged, clean, config, events, run, steps, without_pictures

from distgd.errors import ProcessLost
from distgd.inprocess import InProcessCluster
from distgd.result import Result
from distgd.trainer import launch

__all__ = ["without_pictures"]

STARTED = 0.02
"""Virtual seconds after which everybody has started."""


class Chaos(InProcessCluster):
    """A cluster in which processes of these roles die at random times, `most` at most, `rate` a virtual second."""

    def __init__(self, seed: int, rate: float, roles: tuple[str, ...], most: int = 9) -> None:
        super().__init__(seed)
        self._chance, self._rate, self._roles, self._most = random.Random(seed), rate, roles, most
        self.killed: list[str] = []
        self._at(STARTED + self._chance.expovariate(rate), self._strike)

    def _strike(self) -> None:
        victims = [i for i, process in self._processes.items() if process.actor.spec.role in self._roles]  # type: ignore[attr-defined]
        if victims and len(self.killed) < self._most:
            victim = self._chance.choice(victims)
            self.killed.append(self._processes[victim].actor.spec.role)  # type: ignore[attr-defined]
            self._die(victim)
        self._at(self._now + self._chance.expovariate(self._rate), self._strike)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


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
        assert (result.samples, result.steps) == (whole.samples, STEPS)
        assert clean(path)
        assert steps(path) == list(range(1, STEPS + 1))
        if mode == "sync":
            assert result.weights_sha256 == whole.weights_sha256
            assert result.best == whole.best
    assert killed >= 4


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
