"""A process that stood still, was replaced, and goes on: what it sends late and writes late has no effect.

`end` cannot reach it, as on a machine that is cut off; else it would be killed before that. Time is virtual.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_recovery import right
from test_resume import Ragged, config, run, without_pictures

from distgd import events as ev
from distgd.inprocess import InProcessCluster
from distgd.process import SILENCE
from distgd.result import Result
from distgd.trainer import launch

__all__ = ["without_pictures"]


class Unreachable(InProcessCluster):
    """A stopped process cannot be ended.

    Attributes:
        zombies: those that should have been.
        sent: by them, since then, by kind of message.
        told: how often one of them was told that it is fenced.
        left: those of them that are still there at the end of the run.
    """

    def __init__(self, machines: int) -> None:
        super().__init__(0, machines=machines)
        self.zombies: set[int] = set()
        self.sent: list[str] = []
        self.told = 0
        self.left: set[int] = set()

    def end(self, incarnation: int) -> None:
        process = self._processes.get(incarnation)
        if process is not None and self._now < process.resumes:
            self.zombies.add(incarnation)
        else:
            super().end(incarnation)

    def _sent(self, envelope: Any) -> None:
        if envelope.source in self.zombies:
            self.sent.append(type(envelope.message).__name__)
        super()._sent(envelope)

    def _deliver(self, envelope: Any) -> None:
        self.told += envelope.destination in self.zombies and isinstance(envelope.message, ev.Fenced)
        super()._deliver(envelope)

    def close(self) -> None:
        self.left = self.zombies & set(self._processes)
        super().close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


WHEN = {
    "worker 0": [
        "{step: 6}",
        "{message: GradientArrived, number: 9}",
        "{message: GradientArrived, number: 9, sent: true}",
    ],
    "server 0": ["{step: 6}", "{message: WeightsSent, number: 12}", "{message: ShardWritten, number: 2}"],
    "server 1": ["{step: 6}", "{message: WeightsSent, number: 12}", "{message: ShardWritten, number: 2}"],
    "evaluator": ["{step: 6}", "{message: Evaluated, number: 2}"],
}
LEASED = ["{message: LeaseEnded, number: 9}", "{message: PullRequested, number: 9, sent: true}"]
SYNC = {
    "worker 0": ["{message: PullRequested, number: 2, sent: true}"],
    "server 0": ["{message: Commit, number: 8}", "{message: StepCommitted, number: 8}"],
    "server 1": ["{message: ShardFilled, number: 8}"],
}
CASES = [
    (mode, machines, whom, when)
    for mode, machines in (("sync", 1), ("sync", 2), ("bounded", 1), ("async", 1))
    for whom, whens in WHEN.items()
    for when in [*whens, *(SYNC.get(whom, []) if mode == "sync" else LEASED if whom == "worker 0" else [])]
]


LATE = (1e-3, 8e-3, 2.5e-2)
"""Virtual seconds from the loss until it goes on: before, while and after another one takes its place."""


def stood_still(path: Path, mode: str, machines: int, whom: str, when: str, late: float) -> tuple[Result, Unreachable]:
    """A run in which one process stands still until it was replaced, and goes on so much later."""
    plan = path / "plan.yaml"
    plan.write_text(f"- {{what: stop, whom: {whom}, when: {when}, seconds: {SILENCE + late}}}")
    cluster = Unreachable(machines)
    given = config(path, mode, faults={"plan": str(plan)})
    result = launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster)
    return result, cluster


@pytest.mark.parametrize(
    ("mode", "machines", "whom", "when", "late"), [(*case, LATE[i % len(LATE)]) for i, case in enumerate(CASES)]
)
def test_who_was_replaced_and_goes_on_changes_nothing_and_is_told(
    tmp_path: Path, whole: Result, mode: str, machines: int, whom: str, when: str, late: float
) -> None:
    result, cluster = stood_still(tmp_path, mode, machines, whom, when, late)
    assert right(result, tmp_path, whole, mode)
    (zombie,) = cluster.zombies
    assert zombie not in cluster.left or not cluster.told
    SENT.append(cluster.sent)
    TOLD[whom] += bool(cluster.told)


SENT: list[list[str]] = []
TOLD: Counter[str] = Counter()


def test_what_they_sent_late_was_of_every_kind_and_most_were_told_before_their_heart_beat() -> None:
    """Behind the others: without them there is nothing to see."""
    if len(SENT) < len(CASES):
        pytest.skip("not all of them have been there")
    late = {"GradientArrived", "GradientPart", "WeightsSent", "WeightsPart", "Commit", "ShardFilled", "StepCommitted"}
    late |= {
        "ShardWritten",
        "SnapshotSent",
        "Evaluated",
        "LeaseEnded",
        "LeaseRequested",
        "PullRequested",
        "PushAnswered",
    }
    assert late <= {kind for kinds in SENT for kind in kinds}
    assert min(TOLD[whom] for whom in WHEN) > 2, TOLD
