"""Several machines: the same bits wherever processes are and whoever dies, and each machine sends and receives once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulate import Simulated, config, run, simulate
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distgd import events as ev
from distgd.inprocess import InProcessCluster
from distgd.layout import ALIGN
from distgd.prepare import prepare

STEPS, SLOTS = 4, 8
FIRST_WORKER = 4  # after the driver and three shards


class Net:
    """A small net with buffers; 1,000 numbers in blocks enough for three shards."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    def train_data(self) -> Any:
        chance = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(96, 20, generator=chance), torch.randint(3, (96,), generator=chance))


def net(**sections: Any) -> Simulated:
    return simulate(Net(), batch={"size": 32, "slots": SLOTS}, stop={"steps": STEPS}, **sections)


@pytest.fixture(scope="module")
def alone() -> str:
    """One worker, one server, one machine."""
    return net().sha256


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.integers(1, 6),
    servers=st.integers(1, 3),
    machines=st.integers(1, 4),
    bucket=st.sampled_from([1, 3, 16, 1000]),
    seed=st.integers(0, 10**6),
)
def test_the_bits_are_the_same_wherever_processes_are(
    alone: str, workers: int, servers: int, machines: int, bucket: int, seed: int
) -> None:
    cluster = {"workers": workers, "servers": servers}
    done = net(cluster=cluster, machines=machines, bucket=bucket * ALIGN, seed=seed)
    assert done.error is None
    assert done.sha256 == alone


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    machines=st.integers(2, 3),
    lost=st.dictionaries(st.integers(FIRST_WORKER, FIRST_WORKER + 5), st.floats(0.0, 0.02), max_size=5),
    seed=st.integers(0, 10**6),
    slow=st.integers(1, 9),
)
def test_a_lost_worker_takes_nothing_along_whether_it_added_for_its_machine_or_not(
    alone: str, machines: int, lost: dict[int, float], seed: int, slow: int
) -> None:
    done = net(
        cluster={"workers": 6, "servers": 3},
        machines=machines,
        bucket=2 * ALIGN,
        seed=seed,
        lose=lost,
        pace=lambda incarnation: 1e-3 * (slow if incarnation == FIRST_WORKER + 1 else 1),
    )
    assert done.error is None
    assert done.sha256 == alone
    applied = Counter((line["step"], line["slot"]) for line in done.lines if line["state"] == "applied")
    assert set(applied.values()) == {1}
    assert len(applied) == STEPS * SLOTS


class Wiretap(InProcessCluster):
    """Counts the numbers that go from one machine to another."""

    def __init__(self, machines: int) -> None:
        super().__init__(0, machines=machines)
        self.carried: Counter[tuple[str, int, int]] = Counter()

    def _sent(self, envelope: Any) -> None:
        where = {i: place for place, node in enumerate(self.nodes()) for i in node}
        pair = where.get(envelope.source, -1), where.get(envelope.destination, -1)
        message = envelope.message
        values = getattr(message, "gradient", None)
        values = getattr(message, "weights", None) if values is None else values
        snapshot = isinstance(message, ev.SnapshotSent)  # the evaluator's
        if values is not None and not snapshot and -1 not in pair and pair[0] != pair[1]:
            self.carried[type(message).__name__, *pair] += values.size
        super()._sent(envelope)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_machine_sends_its_gradients_once_and_receives_the_weights_once(servers: int) -> None:
    sections = {"batch": {"size": 32, "slots": 4}, "stop": {"steps": STEPS}}
    plan = prepare(config(Net(), cluster={"workers": 4, "servers": servers}, **sections), Net())
    cluster = Wiretap(2)
    assert run(plan, cluster, bucket=2 * ALIGN).error is None
    sizes = [part.size for part in plan.layout.slices(servers)]
    assert {kind for kind, *_ in cluster.carried} == {"GradientPart", "WeightsPart"}
    for (kind, source, target), carried in cluster.carried.items():
        of_shard = sizes[target if kind == "GradientPart" else source]
        times = STEPS if kind == "GradientPart" else STEPS + 1  # version 0 has no gradient
        assert carried == times * of_shard, (kind, source, target)


def test_the_same_bits_with_empty_slots_and_a_clipped_norm() -> None:
    """A last batch of fewer samples than slots, and clipping, which adds a whole mean before the decision."""
    sections: dict[str, Any] = {
        "batch": {"size": 7, "slots": 7},
        "data": {"limit": 23} if False else {},
        "stop": {"steps": 6},
        "optimizer": {"name": "adam", "lr": 0.01, "clip": {"norm": 0.5}},
    }
    one = simulate(builtin="counting", **sections)
    many = simulate(builtin="counting", cluster={"workers": 5, "servers": 3}, machines=3, bucket=ALIGN, **sections)
    assert one.error is None and many.error is None
    assert one.sha256 == many.sha256


def test_in_half_the_bytes_it_learns_the_same_to_a_rounding() -> None:
    exact = net()
    cluster = {"workers": 4, "servers": 2}
    halved = net(cluster=cluster, machines=2, bucket=2 * ALIGN, transport={"dtype": "bfloat16"})
    assert halved.error is None
    assert halved.plan.bits == "not promised"
    for name, value in exact.state.items():
        close = torch.nn.functional.cosine_similarity(
            value.double().flatten(), halved.state[name].double().flatten(), dim=0
        )
        assert close > 0.999, name
    assert exact.sha256 != halved.sha256


def test_modes_that_copy_send_whole_vectors_between_machines() -> None:
    for consistency in ({"mode": "sync", "quorum": 3}, {"mode": "bounded", "staleness": 2}, {"mode": "async"}):
        done = simulate(
            builtin="counting",
            batch={"size": 8, "slots": 4},
            stop={"epochs": 1},
            consistency=consistency,
            cluster={"workers": 4, "servers": 2},
            machines=2,
        )
        assert done.error is None
        assert not any(isinstance(m, ev.GradientPart) for m in done.events)
