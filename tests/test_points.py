"""A process that is gone at any point of the protocol: before or after each kind of message that it sends.

What a point is follows from a calm run: who sends what, and how often. A worker that is gone after the first of two
`GradientArrived` has pushed to shard 0 alone; a shard that is gone after a `Commit` has decided and not applied, and
before `StepCommitted` it has applied and not told. Time is virtual, everything else is real.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_recovery import DriverKilled, right
from test_resume import Ragged, config, run, without_pictures

from distgd import events as ev
from distgd.audit import audit, read
from distgd.inprocess import InProcessCluster
from distgd.result import Result
from distgd.trainer import launch

__all__ = ["without_pictures"]
SMALL = 64
"""Elements in a message between machines: several a shard."""
STARTING = ("ProcessReady", "Loaded", "Load", "Stop")
"""What is sent before everybody is there, or when the run is over."""


@dataclass(frozen=True)
class Point:
    """When an incarnation is gone: at its `number`-th message of a kind, `after` it has left or before."""

    incarnation: int
    role: str
    kind: str
    number: int
    after: bool

    def __str__(self) -> str:
        return f"{self.role} {'after' if self.after else 'before'} {self.kind} {self.number}"


class Struck(InProcessCluster):
    """A cluster that counts what each incarnation sends, and in which one is gone at a point."""

    def __init__(self, point: Point | None, machines: int) -> None:
        super().__init__(0, machines=machines)
        self._point = point
        self.sent: Counter[tuple[int, str, str]] = Counter()
        self.happened = False

    def send(self, to: int, message: Any) -> None:
        for _ in self._watched(ev.DRIVER, [ev.Send(to, message)]):
            super().send(to, message)

    def _do(self, incarnation: int, effects: Iterable[ev.Effect]) -> None:
        super()._do(incarnation, self._watched(incarnation, effects))

    def _watched(self, incarnation: int, effects: Iterable[ev.Effect]) -> Iterator[ev.Effect]:
        for effect in effects:
            if not self._lives(incarnation):
                return
            number = self._count(incarnation, effect)
            if self._due(incarnation, effect, number, after=False):
                return
            yield effect
            if self._due(incarnation, effect, number, after=True):
                return

    def _count(self, incarnation: int, effect: ev.Effect) -> int:
        if not isinstance(effect, ev.Send):
            return 0
        role = "driver" if incarnation == ev.DRIVER else self._processes[incarnation].actor.spec.role  # type: ignore[attr-defined]
        key = (incarnation, role, type(effect.message).__name__)
        self.sent[key] += 1
        return self.sent[key]

    def _due(self, incarnation: int, effect: ev.Effect, number: int, *, after: bool) -> bool:
        p = self._point
        if (
            p is None
            or not isinstance(effect, ev.Send)
            or (p.incarnation, p.number, p.after)
            != (
                incarnation,
                number,
                after,
            )
        ):
            return False
        if p.kind != type(effect.message).__name__:
            return False
        self._point, self.happened = None, True
        if incarnation == ev.DRIVER:
            raise DriverKilled
        self._die(incarnation)
        return True


def points(folder: Path, mode: str, machines: int, *, every: bool) -> list[Point]:
    """All points of a run; where not `every`, one number of each kind: that in the middle."""
    cluster = Struck(None, machines)
    launch(config(folder, mode, **MORE), "x", lambda event: None, task=Ragged(), cluster=cluster)
    found = []
    for (incarnation, role, kind), count in sorted(cluster.sent.items()):
        if kind in STARTING:
            continue
        numbers = sorted({2, count // 3, count // 2, count - 1, count}) if every else [max(2, count // 2)]
        for number in (n for n in numbers if 1 < n <= count):
            found += [Point(incarnation, role, kind, number, after) for after in (False, True)]
    return found


ALL = (("sync", 1), ("sync", 2), ("bounded", 1), ("async", 1))
MORE: dict[str, Any] = {"checkpoint": {"every": {"steps": 3}}, "cluster": {"workers": 3, "servers": 2}}


def struck(path: Path, mode: str, machines: int, point: Point) -> Result:
    """A run to its end, and in which somebody is gone at a point; the driver's command is given again.

    Raises:
        AssertionError: the point was not met; or a worker's loss has cost a checkpoint.
    """
    cluster = Struck(point, machines)
    given = config(path, mode, **MORE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # who is gone closes nothing
        result = None
        with suppress(DriverKilled):
            result = launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster, resume="auto")
        gc.collect()  # what a killed driver has not written is gone with it
        if result is None:
            again = InProcessCluster(1, machines=machines)
            result = launch(given, "x", lambda event: None, task=Ragged(), cluster=again, resume="auto")
    assert cluster.happened, f"{point} was not met"
    rollbacks = audit(read(path / "runs/a/ledger.jsonl")).rollbacks
    assert rollbacks == 0 or point.role in ("server", "driver"), f"{point}: {rollbacks} rollbacks"
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distgd.rules.BUCKET", SMALL)


@pytest.mark.parametrize(("mode", "machines"), ALL)
def test_whoever_is_gone_at_any_point(
    tmp_path: Path, whole: Result, mode: str, machines: int, small_buckets: None
) -> None:
    found = points(tmp_path / "calm", mode, machines, every=False)
    kinds = {point.kind for point in found}
    assert kinds > {"GradientArrived", "WeightsSent", "PullRequested", "Evaluated", "ShardWritten"}
    assert mode != "sync" or kinds > {"ShardFilled", "Commit", "StepCommitted"}
    assert mode == "sync" or kinds > {"LeaseGranted", "LeaseEnded", "PushAnswered"}
    assert machines == 1 or kinds > {"GradientPart", "WeightsPart"}
    wrong = []
    for number, point in enumerate(found[::3]):  # `scripts/prove faults` takes all of them
        path = tmp_path / str(number)
        result = struck(path, mode, machines, point)
        wrong += [] if right(result, path, whole, mode) else [str(point)]
    assert not wrong
