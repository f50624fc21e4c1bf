"""A machine is about to be taken away: who is there moves before it goes, and the driver's own ends the run in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulate import OddTask, simulate
from test_recovery import right
from test_resume import Ragged, config, events, run, without_pictures

from distgd import Stop, train
from distgd import events as ev
from distgd.checkpoint import Checkpoints
from distgd.errors import Preempted, ProcessLost
from distgd.inprocess import InProcessCluster
from distgd.result import Result
from distgd.trainer import launch

__all__ = ["without_pictures"]
MODES = ["sync", "bounded", "async"]
NOTICE, GONE = 0.02, 0.2  # virtual seconds until a machine is drained, and until it is gone


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


class Draining(InProcessCluster):
    """Three machines. One is drained, so that nobody new is placed there, and is gone later."""

    def __init__(self, machine: int, notices: bool = True) -> None:
        super().__init__(0, pace=lambda _: 0.004, machines=3)
        self._machine, self._drained, self.lost = machine, False, 0
        self._at(NOTICE, self._drain if notices else lambda: None)
        self._at(GONE, self._go)

    def _place(self, incarnation: int, spec: Any) -> None:
        super()._place(incarnation, spec)
        if self._drained and incarnation in self._machines[self._machine]:
            self._machines[self._machine].remove(incarnation)
            self._machines[self._machine - 1].append(incarnation)

    def _there(self) -> list[int]:
        return [i for i in self._machines[self._machine] if i in self._processes]

    def _drain(self) -> None:
        self._drained = True
        for incarnation in self._there():
            self._driver.send(ev.DRIVER, ev.Drained(incarnation))
        if self._now < GONE:
            self._at(self._now + 0.01, self._drain)

    def _go(self) -> None:
        for incarnation in self._there():
            self.lost += 1
            self._die(incarnation)


def go(path: Path, mode: str, cluster: InProcessCluster, **more: Any) -> Result:
    cast = {"cluster": {"workers": 3, "servers": 2}, "checkpoint": {"every": {"steps": 1000}}, **more}
    return launch(config(path, mode, **cast), "x", lambda event: None, task=Ragged(), cluster=cluster)


def said(path: Path) -> list[str]:
    return [event["message"] for event in events(path) if event["event"] == "fault"]


@pytest.mark.parametrize("machine", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_everybody_moves_before_the_machine_goes(tmp_path: Path, whole: Result, mode: str, machine: int) -> None:
    cluster = Draining(machine)
    assert right(go(tmp_path, mode, cluster), tmp_path, whole, mode)
    assert cluster.lost == 0
    assert said(tmp_path)
    assert all("is moved: its machine is drained" in why for why in said(tmp_path))
    shards = sum("shard" in why for why in said(tmp_path))
    assert shards == (machine != 2), "two servers, on the first two machines"


def test_without_a_notice_they_are_lost_there(tmp_path: Path, whole: Result) -> None:
    cluster = Draining(0, notices=False)
    assert right(go(tmp_path, "sync", cluster), tmp_path, whole, "sync")
    assert cluster.lost >= 2
    assert not any("drained" in why for why in said(tmp_path))


def test_a_shard_goes_on_from_a_checkpoint_of_the_moment(tmp_path: Path, whole: Result) -> None:
    """The next regular one is far away: without one made for it, all steps would be done again."""
    go(tmp_path, "sync", Draining(1))
    before = [e["step"] for e in events(tmp_path) if e["event"] == "fault" and "shard" in e["message"]]
    again = [line["step"] for line in ledger(tmp_path) if line["state"] == "rollback"]
    assert len(again) == len(before) == 1
    assert again[0] >= before[0] > 0


def ledger(path: Path) -> list[dict[str, Any]]:
    import json

    (file,) = path.rglob("ledger.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_without_checkpoints_a_run_goes_on_until_its_shard_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ProcessLost, match="shard 1 is gone"):
        go(tmp_path, "sync", Draining(1), checkpoint={"every": None})


def test_the_slots_of_the_moved_are_not_blamed(tmp_path: Path, whole: Result) -> None:
    """Machine after machine is drained, and the same slots lose their worker each time."""

    class Restless(InProcessCluster):
        def __init__(self) -> None:
            super().__init__(0, pace=lambda _: 5.0)
            for turn in range(8):
                self._at(4.0 * (turn + 1), self._drain)

        def _drain(self) -> None:
            for incarnation, process in list(self._processes.items()):
                if process.busy:
                    self._driver.send(ev.DRIVER, ev.Drained(incarnation))

    assert right(go(tmp_path, "sync", Restless()), tmp_path, whole, "sync")


@pytest.mark.parametrize("mode", MODES)
def test_the_drivers_own_machine_ends_the_run_with_a_checkpoint(tmp_path: Path, whole: Result, mode: str) -> None:
    class Own(InProcessCluster):
        def __init__(self) -> None:
            super().__init__(0, pace=lambda _: 0.004)
            self._at(NOTICE, lambda: self._driver.send(ev.DRIVER, ev.Drained(ev.DRIVER)))

    with pytest.raises(Preempted, match=r"the driver's machine is drained; .* --resume auto") as ended:
        go(tmp_path, mode, Own())
    assert ended.value.exit_code == 75
    done = run(tmp_path, "auto", mode=mode) if mode != "sync" else run(tmp_path, "auto")
    assert right(done, tmp_path, whole, mode)


class At(InProcessCluster):
    """Notices, deaths and whatever else at virtual times."""

    def __init__(self, *happens: tuple[float, Callable[[At], object]], pace: float = 0.004) -> None:
        super().__init__(0, pace=lambda _: pace)
        for at, happen in happens:
            self._at(at, lambda happen=happen: happen(self))  # type: ignore[misc]

    def notice(self, incarnation: int) -> None:
        self._driver.send(ev.DRIVER, ev.Drained(incarnation))


def saved(path: Path) -> list[int]:
    return [event["step"] for event in events(path) if event["event"] == "checkpoint"]


def test_a_signal_behind_a_notice_is_no_second_one(tmp_path: Path) -> None:
    """As when a pod is deleted right after its node was drained."""
    kill = (0.055, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted) as ended:
        go(tmp_path, "sync", At((0.05, lambda at: at.notice(ev.DRIVER)), kill))
    assert ended.value.result is not None
    assert saved(tmp_path)[-1:] == [ended.value.result.steps]


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_that_is_lost_while_the_run_leaves_makes_it_stay_no_longer(tmp_path: Path, mode: str) -> None:
    with pytest.raises(Preempted):
        go(tmp_path, mode, At((0.05, lambda at: at.notice(ev.DRIVER)), (0.055, lambda at: at._die(2))))


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_that_is_asked_for_while_a_shard_is_to_move_is_kept(tmp_path: Path, mode: str) -> None:
    def watch(event: dict[str, Any]) -> Stop | None:
        return Stop("enough") if event["event"] == "fault" and "shard" in event["message"] else None

    cast = {"cluster": {"workers": 3, "servers": 2}, "checkpoint": {"every": {"steps": 1000}}}
    at = At((0.2, lambda at: at.notice(2)), pace=0.03)
    result = launch(config(tmp_path, mode, **cast), "x", watch, task=Ragged(), cluster=at)
    assert said(tmp_path)
    assert result.status == "stopped"


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_moves_though_nobody_makes_another_step(tmp_path: Path, whole: Result, mode: str) -> None:
    """All workers are on its machine, too, and the next one comes after that is gone."""

    class Crowded(At):
        here = (2, 3, 4, 5)

        def __init__(self) -> None:
            super().__init__(*((0.06 + 0.05 * turn, Crowded.tell) for turn in range(9)), (0.56, Crowded.go))
            self.lost = 0

        def tell(self) -> None:
            for incarnation in self.here:
                if incarnation in self._processes:
                    self.notice(incarnation)

        def add(self, incarnation: int, spec: Any, *, patient: bool = False) -> None:
            self._place(incarnation, spec)
            self._at(max(self._now + 0.005, 0.8), lambda: self._begin(incarnation, spec))

        def go(self) -> None:
            for incarnation in self.here:
                if incarnation in self._processes:
                    self.lost += 1
                    self._die(incarnation)

    cluster = Crowded()
    assert right(go(tmp_path, mode, cluster), tmp_path, whole, mode)
    assert cluster.lost == 0


def test_a_checkpoint_for_a_move_that_is_refused_is_asked_for_again(
    tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is there for long, and nothing need be done again."""
    commit, refused = Checkpoints.commit, []

    def refusing(self: Checkpoints, name: str, manifest: Any) -> Any:
        if manifest.step > 0 and not refused:
            refused.append(manifest.step)
            raise OSError("timed out")
        return commit(self, name, manifest)

    monkeypatch.setattr(Checkpoints, "commit", refusing)
    notices = ((0.1 + 0.02 * turn, lambda at: at.notice(2) if 2 in at._processes else None) for turn in range(20))
    assert right(go(tmp_path, "sync", At(*notices)), tmp_path, whole, "sync")
    (back,) = [line["step"] for line in ledger(tmp_path) if line["state"] == "rollback"]
    assert back >= refused[0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_node_of_a_real_cluster(tmp_path: Path) -> None:
    """`ray drain-node` for a second node: its processes move to the third; then for the driver's."""
    import ray
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = cluster.add_node(num_cpus=3)
    ray.init(address=cluster.address, log_to_driver=False)
    gcs = GcsClient(address=cluster.address)
    own = ray.get_runtime_context().get_node_id()
    faults: list[str] = []
    back: list[str] = []

    def drain(node: str) -> None:
        accepted, why = gcs.drain_node(node, 2, "the spot market", int(time.time() * 1e3) + 60_000)  # 2: preemption
        assert accepted, why

    def watch(event: dict[str, Any]) -> Stop | None:
        if event["event"] == "step" and event["step"] == 30:
            cluster.add_node(num_cpus=3)
            cluster.wait_for_nodes()
            drain(second.node_id)
        faults.extend([event["message"]] if event["event"] == "fault" else [])
        back.extend([event["message"]] if event["event"] == "joined" else [])
        if len(faults) >= 3 and len(back) >= 2 and event["event"] == "step" and not asked:
            asked.append(event["step"])
            drain(own)
        return None

    asked: list[int] = []
    how: dict[str, Any] = {"batch": {"size": 32, "slots": 5}, "optimizer": {"name": "adam", "lr": 0.01}}
    given = {"run": {"storage": str(tmp_path)}, "tracking": {"uri": "none"}, "stop": {"steps": 10**6}, **how}
    given["cluster"] = {"workers": 3, "servers": 2, "cpus": 1.0}
    task = OddTask(samples=106)
    try:
        with pytest.raises(Preempted, match="the driver's machine is drained") as ended:
            train(given, task=task, on_event=watch)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert all("is moved: its machine is drained" in why for why in faults)
    result = ended.value.result
    assert result is not None
    assert result.steps >= asked[0]
    steps = {"stop": {"steps": result.steps + 5}}
    alone = {"cluster": {"backend": "inprocess", "workers": 1, "servers": 1}}
    goes_on = {**given, **steps, **alone, "run": {**given["run"], "name": Path(result.run_dir).name}}
    done = train(goes_on, task=task, resume="auto")
    assert done.weights_sha256 == simulate(task, **{**how, **steps}).sha256
