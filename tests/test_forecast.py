from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import psutil
import pytest
import torch

from distgd import cost, machine
from distgd import forecast as predicting
from distgd.config import load
from distgd.forecast import Forecast, forecast, most_shards, slot_seconds
from distgd.plan import Plan
from distgd.prepare import prepare

HERE = cost.Machine(cores=4, bandwidth=10e9, bandwidth_all=20e9, message=3e-5)


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure", lambda: HERE)
    monkeypatch.setattr(predicting, "SECONDS", 0.01)


def plan(*overrides: str, **sections: Any) -> Plan:
    given = {"task": "digits", "stop": {"steps": 3}, "batch": {"size": 8, "slots": 4}}
    return prepare(load({**given, **sections}, overrides))


def test_a_forecast_is_told_in_words_and_in_numbers() -> None:
    found = forecast(plan())
    text = "\n".join(found.lines())
    assert [line.split()[0] for line in found.lines()] == ["memory", "speed", "bound", "servers"]
    assert found.parts is not None and cost.WORDS[found.parts.bound] in text
    numbers = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert numbers["step_s"] == pytest.approx(sum(numbers["parts_s"].values()))
    assert numbers["bound_by"] in cost.WORDS
    assert numbers["machine"] == {each.name: getattr(HERE, each.name) for each in fields(HERE)}
    assert numbers["bytes_node"]["total"] == sum(v for k, v in numbers["bytes_node"].items() if k != "total")


def test_it_is_the_models_word_on_the_plans_own_numbers() -> None:
    found = forecast(plan("cluster.workers=2", "cluster.servers=3", "optimizer.name=adam"))
    assert found.job is not None and found.job.slot > 0
    assert (found.job.workers, found.job.shards, found.job.slots) == (2, 3, 4)
    assert (found.job.pushes, found.job.additions) == (2, 1), "a worker adds its two slots and pushes the sum"
    assert found.job.state == 2 and found.job.tensors == 4
    assert found.parts == cost.predict(found.job, HERE)


@pytest.mark.parametrize(
    ("optimizer", "vectors"), [({"name": "sgd"}, 0), ({"name": "sgd", "momentum": 0.9}, 1), ({"name": "adam"}, 2)]
)
def test_what_the_optimizer_keeps_is_counted(optimizer: dict[str, Any], vectors: int) -> None:
    found = forecast(plan(optimizer=optimizer))
    assert found.memory.state == vectors * found.memory.weights


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["consistency.mode=async"], "sync"),
        (["consistency.mode=bounded"], "sync"),
        (["consistency.quorum=3"], "quorum"),
        (["cluster.gpus=1"], "GPU"),
        (["cluster.backend=inprocess"], "one thread"),
    ],
)
def test_what_is_not_modelled_is_said(overrides: list[str], why: str) -> None:
    found = forecast(plan(*overrides))
    assert found.parts is None and why in found.unknown
    assert any("not predicted" in line and found.unknown in line for line in found.lines())
    numbers = found.as_dict()
    assert numbers["unknown"] == found.unknown and numbers["step_s"] is None and numbers["bytes_node"]["total"] > 0


@pytest.mark.parametrize("cores", [1, 2, 4, 64])
def test_no_more_servers_are_suggested_than_there_are_cores_and_pieces(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "measure", lambda: replace(HERE, cores=cores, bandwidth=1e3, bandwidth_all=1e6))
    small = plan(task={"name": "synthetic", "args": {"parameters": 128, "tensors": 1}})
    assert most_shards(small, cores) == min(2, cores), "a shard holds 64 elements at least"
    assert forecast(small).shards <= min(2, cores)
    assert forecast(plan()).shards <= cores


def test_a_better_number_of_servers_is_suggested_with_its_gain() -> None:
    found = forecast(plan("cluster.servers=4"))
    assert found.parts is not None
    assert found.shards == 1 and found.shards_seconds < found.parts.total
    assert "cluster.servers=1" in found.lines()[-1]
    assert "cluster.servers=" not in forecast(plan("cluster.servers=1")).lines()[-1]


@pytest.mark.parametrize("bound", cost.WORDS)
def test_every_bound_has_words_and_advice(bound: str) -> None:
    known = forecast(plan())
    assert known.job is not None
    none = cost.Parts(0, 0, 0, 0, 0, 0, 0)
    name = {"compute": "compute", "memory": "apply", "network": "push", "messages": "messages"}[bound]
    told = Forecast(HERE, known.memory, known.job, replace(none, **{name: 1.0}), 1, 1.0).lines()
    assert any(cost.WORDS[bound] in line for line in told)


def test_workers_are_advised_up_to_cores_and_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "slot_seconds", lambda _: 1.0)

    def advice(workers: int, slots: int) -> str:
        return forecast(plan(f"cluster.workers={workers}", f"batch.slots={slots}")).lines()[2]

    assert "up to 4 here" in advice(2, 8)
    assert "batch.slots" in advice(2, 2)
    assert "more cores than the 4" in advice(4, 8)


def test_nothing_is_started_and_the_plan_is_as_it_was() -> None:
    before, threads = plan(), torch.get_num_threads()
    weights, children = before.replica.flat.clone(), psutil.Process().children(recursive=True)
    assert slot_seconds(before) > 0
    forecast(before)
    assert torch.equal(before.replica.flat, weights)
    assert torch.get_num_threads() == threads
    assert psutil.Process().children(recursive=True) == children
    import ray

    assert not ray.is_initialized()
