from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgd.cost import (
    BUCKET,
    GAIN,
    WORDS,
    Job,
    Machine,
    Memory,
    Network,
    Node,
    Parts,
    best_shards,
    memory,
    predict,
)

FREE = Machine(cores=8, bandwidth=10e9, bandwidth_all=80e9, message=0.0)
"""Messages cost nothing, and every core has its own bandwidth."""


def job(size: int = 1_000_000, workers: int = 2, shards: int = 1, slot: float = 0.0) -> Job:
    """One slot a worker, Adam, one node, in one tensor."""
    return Job(size, 4, workers, slot, (Node(workers, shards),), pushes=workers, additions=0, state=2)


counts = st.integers(1, 8)
nodes = st.lists(st.tuples(counts, counts), min_size=1, max_size=3).map(lambda each: tuple(Node(*n) for n in each))
jobs = st.builds(
    Job,
    size=st.integers(64, 10**8),
    itemsize=st.sampled_from([4, 8]),
    slots=st.integers(1, 32),
    slot=st.floats(0, 10),
    nodes=nodes,
    pushes=st.integers(1, 32),
    additions=st.integers(0, 16),
    state=st.integers(0, 3),
    tensors=st.integers(1, 500),
)
machines = st.builds(
    lambda cores, one, more, message: Machine(cores, one, one * more, message),
    cores=st.integers(1, 16),
    one=st.floats(1e8, 1e11),
    more=st.floats(1, 16),
    message=st.floats(0, 1e-3),
)
networks = st.builds(Network, bandwidth=st.floats(1e6, 1e11), latency=st.floats(0, 1e-2), pipelined=st.booleans())
factors = st.floats(1, 10)


def total(job: Job, machine: Machine, network: Network) -> float:
    return predict(job, machine, network).total


@given(jobs, machines, networks, st.sampled_from(["size", "slot", "pushes", "additions", "state", "tensors"]), factors)
def test_more_work_is_never_faster(job: Job, machine: Machine, network: Network, name: str, factor: float) -> None:
    value = getattr(job, name)
    more = replace(job, **{name: value * factor if name == "slot" else int(value * factor)})
    assert total(more, machine, network) >= total(job, machine, network) * (1 - 1e-9)


@given(jobs, machines, networks, st.sampled_from(["cores", "bandwidth", "message"]), factors)
def test_a_better_machine_is_never_slower(
    job: Job, machine: Machine, network: Network, name: str, factor: float
) -> None:
    better = {
        "cores": replace(machine, cores=int(machine.cores * factor)),
        "bandwidth": replace(
            machine, bandwidth=machine.bandwidth * factor, bandwidth_all=machine.bandwidth_all * factor
        ),
        "message": replace(machine, message=machine.message / factor),
    }[name]
    assert total(job, better, network) <= total(job, machine, network) * (1 + 1e-9)


@given(jobs, machines, networks, factors)
def test_a_better_network_is_never_slower(job: Job, machine: Machine, network: Network, factor: float) -> None:
    before = total(job, machine, network)
    assert total(job, machine, replace(network, bandwidth=network.bandwidth * factor)) <= before
    assert total(job, machine, replace(network, latency=network.latency / factor)) <= before
    assert total(job, machine, replace(network, pipelined=True)) <= before * (1 + 1e-9)


@given(jobs, machines, networks)
def test_no_part_is_negative_and_the_bound_is_the_largest_share(job: Job, machine: Machine, network: Network) -> None:
    parts = predict(job, machine, network)
    assert all(getattr(parts, each.name) >= 0 for each in fields(Parts))
    assert sum(parts.shares.values()) == pytest.approx(parts.total)
    assert parts.shares.keys() == WORDS.keys()
    assert parts.shares[parts.bound] == max(parts.shares.values())


@given(jobs, machines, networks)
def test_on_one_node_nothing_is_on_the_wire(job: Job, machine: Machine, network: Network) -> None:
    alone = replace(job, nodes=job.nodes[:1])
    parts = predict(alone, machine, network)
    assert (parts.push, parts.pull) == (0, 0)
    assert parts == predict(alone, machine)


def test_several_nodes_need_a_network() -> None:
    with pytest.raises(ValueError, match="2 nodes"):
        predict(replace(job(), nodes=(Node(1, 1), Node(1, 0))), FREE)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_without_compute_and_messages_a_step_is_w_plus_6_passes_over_the_weights(workers: int) -> None:
    assert predict(job(workers=workers), FREE).total == pytest.approx((workers + 6) * 4e6 / 10e9)


def test_sgd_without_momentum_keeps_nothing() -> None:
    assert predict(replace(job(), state=0), FREE).total == pytest.approx((2 + 2) * 4e6 / 10e9)


def test_shards_apply_side_by_side_and_share_the_bandwidth() -> None:
    apply = 8 * 4e6 / 10e9
    assert predict(job(shards=4), FREE).apply == pytest.approx(apply / 4)
    scarce = replace(FREE, bandwidth_all=10e9)
    assert predict(job(shards=4), scarce).apply == pytest.approx(apply)


@pytest.mark.parametrize(
    ("workers", "slots", "cores", "rounds"),
    [(1, 4, 8, 4), (2, 4, 8, 2), (3, 4, 8, 2), (4, 4, 8, 1), (8, 4, 8, 1), (4, 4, 2, 2), (4, 4, 1, 4)],
)
def test_slots_are_computed_in_rounds_and_workers_take_turns(workers: int, slots: int, cores: int, rounds: int) -> None:
    few = replace(job(size=64, workers=workers, slot=1.0), slots=slots)
    assert predict(few, replace(FREE, cores=cores)).compute == pytest.approx(rounds)


def test_slots_side_by_side_share_the_memory() -> None:
    alone, scarce = job(workers=1, slot=1e-3), replace(FREE, bandwidth_all=10e9)
    assert predict(alone, scarce).compute == pytest.approx(1e-3)
    assert predict(job(workers=2, slot=1e-3), FREE).compute == pytest.approx(1e-3)
    assert predict(job(workers=2, slot=1e-3), scarce).compute == pytest.approx(2e-3), "all of the slot is traffic here"


def test_between_two_nodes_a_pipelined_step_moves_the_weights_bytes_once() -> None:
    spread = replace(job(10_000_000, workers=2), nodes=(Node(1, 1), Node(1, 1)))
    network = Network(125e6, 0.0, pipelined=True)
    parts = predict(spread, FREE, network)
    wire = 4 * 10_000_000 / 125e6
    assert parts.push == pytest.approx(wire / 2), "half of each gradient is for the other node"
    assert parts.push + parts.pull + parts.apply == pytest.approx(wire, rel=0.01)


def test_adding_on_the_node_first_makes_what_is_sent_independent_of_its_workers() -> None:
    network = Network(125e6, 0.0, pipelined=True)
    pushes = []
    for workers in (1, 2, 4):
        spread = replace(job(workers=2 * workers), nodes=(Node(workers, 1), Node(workers, 1)))
        pushes.append(predict(spread, FREE, network).push)
        plain = predict(spread, FREE, replace(network, pipelined=False))
        assert plain.push == pytest.approx(workers * pushes[0])
    assert pushes == [pushes[0]] * 3


def test_a_last_bucket_is_sent_when_all_is_applied() -> None:
    spread = replace(job(workers=2), nodes=(Node(1, 1), Node(1, 1)))
    slow = replace(FREE, bandwidth=1e6, bandwidth_all=8e6)
    size = min(BUCKET, spread.bytes // 2)
    assert predict(spread, slow, Network(1e9, 0.0, pipelined=True)).pull == pytest.approx(size / 1e9)


def test_latency_counts_on_the_way_there_and_back() -> None:
    spread = replace(job(), nodes=(Node(1, 1), Node(1, 0)))
    near, far = (predict(spread, FREE, Network(1e9, latency)).total for latency in (0.0, 0.05))
    assert far - near == pytest.approx(0.1)


@given(jobs, machines, networks, st.integers(1, 8))
def test_the_suggestion_is_allowed_and_no_slower(job: Job, machine: Machine, network: Network, most: int) -> None:
    shards, seconds = best_shards(job, machine, most, network)
    now = total(job, machine, network)
    assert 1 <= shards <= most
    assert seconds == pytest.approx(total(job.with_shards(shards), machine, network) if shards != job.shards else now)
    if job.shards <= most and shards != job.shards:
        assert seconds < now * (1 - GAIN / 2)


def test_more_shards_are_suggested_where_cores_and_memory_are_there_for_them() -> None:
    assert best_shards(job(50_000_000), replace(FREE, message=1e-5), 8)[0] > 1
    assert best_shards(job(1_000), replace(FREE, message=1e-5), 8)[0] == 1


@given(jobs, st.integers(1, 12))
def test_shards_are_spread_over_nodes(job: Job, shards: int) -> None:
    spread = job.with_shards(shards)
    each = [node.shards for node in spread.nodes]
    assert spread.shards == shards and max(each) - min(each) <= 1
    assert [node.workers for node in spread.nodes] == [node.workers for node in job.nodes]


def test_memory_is_counted_in_vectors() -> None:
    v = 4_000_000
    held = memory(job(), [1, 2], evaluated=True, shared=True)
    assert held == Memory(weights=v, gradients=3 * v, state=2 * v, copies=2 * v)
    assert held.total == 8 * v
    assert memory(job(), [1, 1], evaluated=False, shared=False).copies == 3 * v
