"""Several Ray nodes: processes on different ones reach each other over TCP, and nothing else changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from simulate import OddTask, simulate

from distgd import train
from distgd.cluster import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

HOW: dict[str, Any] = {
    "batch": {"size": 32, "slots": 5},
    "optimizer": {"name": "adam", "lr": 0.01, "clip": {"norm": 0.7}},
    "stop": {"steps": 40},
}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """Two Ray nodes on this machine, with room for two workers and a server on each, or three workers."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)  # Ray remembers the one of an earlier run in this process
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    cluster.add_node(num_cpus=3)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def sections(tmp_path: Path, **more: Any) -> dict[str, Any]:
    cluster = {"workers": 4, "servers": 2, "cpus": 1.0}
    return {"run": {"storage": str(tmp_path)}, "tracking": {"uri": "none"}, "cluster": cluster, **HOW, **more}


def test_the_bits_over_two_nodes_are_those_in_process(
    two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, find = OddTask(samples=106), RayCluster.nodes
    found: list[tuple[int, ...]] = []

    def note(self: RayCluster) -> tuple[tuple[int, ...], ...]:
        found.extend(find(self))
        return find(self)

    monkeypatch.setattr(RayCluster, "nodes", note)
    result = train(sections(tmp_path), task=task)
    assert sorted(map(len, found)) in ([3, 3], [3, 4]), "six processes on two nodes, and an evaluator at times"
    assert result.bits == "promised"
    assert result.weights_sha256 == simulate(task, **HOW).sha256


def test_a_killed_worker_of_either_node_costs_no_bit(two_nodes: None, tmp_path: Path) -> None:
    """The lowest one adds for its node; the highest is on the other."""
    task = OddTask(samples=106)
    for choose in (min, max):
        killed: list[int] = []

        def kill(event: dict[str, Any], choose: Any = choose, killed: list[int] = killed) -> None:
            if event["event"] == "step" and event["step"] >= 10 and not killed:
                everybody = psutil.Process().children(recursive=True)
                workers = [p.pid for p in everybody if p.name().startswith("ray::Worker")]
                killed.append(choose(workers))
                os.kill(killed[0], signal.SIGKILL)

        result = train(sections(tmp_path / choose.__name__), task=task, on_event=kill)
        assert killed
        assert result.weights_sha256 == simulate(task, **HOW).sha256


def test_in_two_bytes_a_number(two_nodes: None, tmp_path: Path) -> None:
    result = train(sections(tmp_path, transport={"dtype": "bfloat16"}), task=OddTask(samples=106))
    assert result.status == "completed"
    assert result.bits == "not promised"
    assert result.metrics["train/loss"] < 2.0


@pytest.mark.parametrize(
    "consistency", [{"mode": "sync", "quorum": 3}, {"mode": "bounded", "staleness": 2}, {"mode": "async"}]
)
def test_modes_that_copy(two_nodes: None, tmp_path: Path, consistency: dict[str, Any]) -> None:
    how = sections(tmp_path, consistency=consistency) | {"stop": {"steps": 10}}
    how["optimizer"] = {"name": "adam", "lr": 0.01}
    assert train(how, task=OddTask(samples=106)).status == "completed"
