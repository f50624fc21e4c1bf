"""`cluster.workers: {min, max}`: a run begins with some workers and grows; which changes no bit and no sample."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from simulate import OddTask, simulate
from test_recovery import Chaos, right
from test_resume import Ragged, config, events, run, without_pictures

from distgd import Stop, train
from distgd import events as ev
from distgd.assignment import Cast
from distgd.inprocess import InProcessCluster
from distgd.membership import Membership
from distgd.result import Result
from distgd.sources import Order
from distgd.trainer import launch

__all__ = ["without_pictures"]
MODES = ["sync", "bounded", "async"]
RANGE: dict[str, Any] = {"cluster": {"workers": {"min": 1, "max": 4}}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


def go(path: Path, mode: str, cluster: InProcessCluster) -> Result:
    given = config(path, mode, **RANGE, checkpoint={"every": {"steps": 3}})
    return launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster)


def joined(path: Path) -> list[str]:
    return [event["message"] for event in events(path) if event["event"] == "joined"]


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rooms", [(0.001, 0.02, 0.05), (0.03, 0.03, 0.03), (9.0, 9.0, 9.0)], ids=str)
def test_whenever_there_is_room(
    tmp_path: Path, whole: Result, mode: str, machines: int, rooms: tuple[float, ...]
) -> None:
    later = iter(rooms)
    result = go(tmp_path, mode, InProcessCluster(0, machines=machines, room=lambda: next(later)))
    assert right(result, tmp_path, whole, mode)
    expected = [] if rooms[0] == 9.0 else [f"worker {number} has joined" for number in (1, 2, 3)]
    assert sorted(joined(tmp_path)) == expected


def test_more_workers_are_faster(tmp_path: Path) -> None:
    def seconds(path: Path, room: float) -> float:
        go(path, "sync", InProcessCluster(0, room=lambda: room))
        return max(event["seconds"] for event in events(path) if event["event"] == "step")

    assert seconds(tmp_path / "soon", 0.001) < 0.6 * seconds(tmp_path / "never", 9.0)


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_whoever_is_lost_meanwhile(tmp_path: Path, whole: Result, mode: str, machines: int) -> None:
    """Workers that are there, and such as have not come yet; shards, and so rollbacks while somebody is awaited."""
    killed = 0
    for seed in range(5):
        chance = random.Random(seed)

        class Growing(Chaos):
            def __init__(self, seed: int = seed, chance: random.Random = chance) -> None:
                super().__init__(seed, 30.0, ("worker", "server"), most=6)
                self._room = lambda: chance.expovariate(20.0)
                self._machines = [[] for _ in range(machines)]

        cluster = Growing()
        assert right(go(tmp_path / str(seed), mode, cluster), tmp_path / str(seed), whole, mode), seed
        killed += len(cluster.killed)
    assert killed > 8


class Vanishing(InProcessCluster):
    """What is waited for patiently is lost twice before it is there."""

    def __init__(self) -> None:
        super().__init__(0)
        self.vanished = 0

    def add(self, incarnation: int, spec: Any, *, patient: bool = False) -> None:
        if patient and self.vanished < 2:
            self.vanished += 1
            lost = ev.ProcessLost(incarnation, "its machine went before it was there")
            self._at(self._now + 0.01, lambda: self._tell(lost))
            return
        super().add(incarnation, spec, patient=patient)

    def _tell(self, lost: ev.ProcessLost) -> None:
        self._driver.send(ev.DRIVER, lost)


@pytest.mark.parametrize("mode", MODES)
def test_one_that_is_lost_before_it_came_is_asked_for_again(tmp_path: Path, whole: Result, mode: str) -> None:
    cluster = Vanishing()
    assert right(go(tmp_path, mode, cluster), tmp_path, whole, mode)
    assert cluster.vanished == 2
    assert sorted(joined(tmp_path)) == [f"worker {number} has joined" for number in (1, 2, 3)]


def test_nobody_adds_for_a_machine_before_it_is_there() -> None:
    cast, order = Cast(1, (1, 2), (3, 4, 5), None), Order(samples=100, batch=20, slots=4, seed=0)
    members = Membership(cast, order, True, ((1, 3), (2, 4, 5)), joining=(4,))
    (sent, *_) = members.announce()
    assert sent.message.nodes == ((1, 3), (2, 5))
    assert set(sent.message.table) == {3, 5}
    assert members.arrived(4) == "worker 1 has joined"
    (sent, *_) = members.announce()
    assert sent.message.nodes == ((1, 3), (2, 5, 4)), "the one that was there first adds"
    new = members.replace(4)
    assert members.arrived(new) == "worker 1 is there again"


class Beyond(InProcessCluster):
    """Whoever is waited for patiently gets a machine that was not there at the start; or each its own."""

    def __init__(self, machines: int) -> None:
        super().__init__(0, room=lambda: 0.02)
        self._more = [[] for _ in range(machines)]  # type: list[list[int]]

    def add(self, incarnation: int, spec: Any, *, patient: bool = False) -> None:
        super().add(incarnation, spec, patient=patient)
        if patient:
            self._machines[0].remove(incarnation)
            self._more[incarnation % len(self._more)].append(incarnation)

    def nodes(self) -> tuple[tuple[int, ...], ...]:
        more = [[i for i in machine if i in self._endpoints] for machine in self._more]
        return tuple(tuple(machine) for machine in (self._machines[0], *more) if machine)


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_one_machine_grows_onto_others(tmp_path: Path, whole: Result, mode: str, machines: int) -> None:
    assert right(go(tmp_path, mode, Beyond(machines)), tmp_path, whole, mode)
    assert len(joined(tmp_path)) == 3


ODD: dict[str, Any] = {
    "batch": {"size": 32, "slots": 5},
    "optimizer": {"name": "adam", "lr": 0.01, "clip": {"norm": 0.7}},
}


def on_ray(tmp_path: Path, **more: Any) -> dict[str, Any]:
    cluster = {"workers": {"min": 1, "max": 4}, "servers": 2, "cpus": 1.0}
    return {"run": {"storage": str(tmp_path)}, "tracking": {"uri": "none"}, "cluster": cluster, **more}


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_run_grows_onto_a_machine_that_comes_later(tmp_path: Path) -> None:
    """With room for one worker it begins; three more find room on a second node, and no bit is another."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    said: list[str] = []
    asked: list[int] = []

    def grow(event: dict[str, Any]) -> Stop | None:
        if event["event"] == "step" and event["step"] == 30:
            asked.append(1)
            cluster.add_node(num_cpus=3)
        if event["event"] == "joined":
            said.append(event["message"])
        return Stop("all are there") if len(said) == 3 and event["event"] == "step" else None

    task, how = OddTask(samples=106), {**ODD, "stop": {"steps": 10**6}}
    given = on_ray(tmp_path, **how)
    try:
        result = train(given, task=task, on_event=grow)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(said) == [f"worker {number} has joined" for number in (1, 2, 3)]
    assert asked
    assert result.status == "stopped"
    assert result.weights_sha256 == simulate(task, **{**ODD, "stop": {"steps": result.steps}}).sha256
