"""Whole runs in virtual time: exactly once, the same bits, bounded staleness, with slow and with lost workers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from simulate import Simulated, config, run, simulate
from torch import Tensor, nn

from distgd import events as ev
from distgd import inprocess
from distgd.inprocess import SLOT_SECONDS, InProcessCluster
from distgd.plan import Plan
from distgd.policy import ApplyPush, Immediate
from distgd.prepare import prepare
from distgd.transport import InMemoryNetwork
from distgd.worker.work import Work

SAMPLES, BATCH, SLOTS = 256, 32, 4  # 4 blocks of 64, so that each of 3 shards holds weights
UPDATE = {"sync": BATCH, "bounded": BATCH // SLOTS, "async": BATCH // SLOTS}  # samples of an update
WIDE = (0.05e-3, 4e-3)  # messages that take as long as slots: pushes overtake news of losses


def counting(
    mode: str, workers: int, servers: int, *, epochs: int = 1, clip: float | None = None, **consistency: Any
) -> Plan:
    return prepare(
        config(
            builtin={"name": "counting", "args": {"samples": SAMPLES}},
            batch={"size": BATCH, "slots": SLOTS},
            stop={"epochs": epochs},
            optimizer={"name": "sgd", "lr": float(UPDATE[mode]), "clip": {"norm": clip}},
            consistency={"mode": mode, **consistency},
            cluster={"workers": workers, "servers": servers},
        )
    )


def slowed(plan: Plan, factor: float = 20.0) -> Callable[[int], float]:
    """The last worker is that much slower."""
    slow = plan.cast().workers[-1]
    return lambda incarnation: SLOT_SECONDS * (factor if incarnation == slow else 1.0)


def covered_once(done: Simulated) -> bool:
    """Whether the ledger's lines have every place of every epoch's order once."""
    order, steps = done.plan.order, done.plan.steps
    places = sorted((line["epoch"], p) for line in done.lines for p in range(line["first"], line["last"] + 1))
    epochs = steps // order.steps_per_epoch
    return places == [(epoch, place) for epoch in range(epochs) for place in range(order.samples)]


@pytest.fixture
def staleness(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every update on every shard, also those of workers that did not live to report it."""
    seen: list[int] = []
    handle = Immediate.handle

    def spy(self: Immediate, event: Any) -> Any:
        decisions = handle(self, event)
        seen.extend(d.staleness for d in decisions if isinstance(d, ApplyPush))
        return decisions

    monkeypatch.setattr(Immediate, "handle", spy)
    return seen


def bounded_run(plan: Plan, seed: int) -> Simulated:
    """The last worker is slow, half of all workers die at times drawn from the seed."""
    rng, workers = random.Random(seed), plan.cast().workers
    lose = {worker: rng.uniform(0.0, 0.03) for worker in rng.sample(workers[:-1], len(workers) // 2)}
    return run(plan, InProcessCluster(seed, slowed(plan), lose))


@pytest.mark.parametrize(("workers", "servers"), list(product((2, 4, 8, 16), (1, 3))))
def test_never_above_the_bound_never_stuck_every_slot_once(
    workers: int, servers: int, staleness: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` fails where a run is stuck."""
    for bound in (0, 1, 2, 4, 16):
        plan = counting("bounded", workers, servers, staleness=bound)
        for seed in range(20):
            monkeypatch.setattr(inprocess, "LATENCY", (WIDE, (50e-6, 150e-6))[seed % 2])
            staleness.clear()
            done = bounded_run(plan, seed)
            assert done.error is None
            assert max(staleness) <= bound, (bound, seed)
            assert max(done.driver.tally.staleness) <= bound
            assert len(staleness) == plan.assignment().versions(plan.steps) * servers
            assert torch.equal(done.state["w"], torch.ones(SAMPLES)), (bound, seed)
            assert covered_once(done)


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("bound", [1, 2, 4])
def test_above_the_bound_without_enforcement(bound: int, servers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the bound is kept by the check, not by luck."""
    monkeypatch.setattr(Immediate, "feasible", lambda self, key: True)
    plan = counting("bounded", 8, servers, staleness=bound)
    assert any(max(bounded_run(plan, seed).driver.tally.staleness) > bound for seed in range(5))


MODES = {"sync": {}, "bounded": {"staleness": 2}, "async": {}}


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_sample_is_applied_exactly_once_an_epoch(
    mode: str, servers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = counting(mode, 4, servers, epochs=3, **MODES[mode])
    first, second, *_ = plan.cast().workers
    dead = [{}, {first: 0.004}, {first: 0.01, second: 0.0101}]
    for seed, lose in enumerate(dead * 2):
        monkeypatch.setattr(inprocess, "LATENCY", (WIDE, (50e-6, 150e-6))[seed % 2])
        done = run(plan, InProcessCluster(seed, slowed(plan), lose))
        assert done.error is None
        assert torch.equal(done.state["w"], torch.full((SAMPLES,), 3.0))
        assert covered_once(done)
        assert done.driver.tally.samples == 3 * SAMPLES
        assert {line["state"] for line in done.lines} == {"applied"}
        assert sum(event["event"] == "fault" for event in done.events) == len(lose)


@pytest.mark.parametrize(("servers", "clip"), list(product([1, 3], [None, 1e6])))
def test_under_a_quorum_zero_weights_are_the_dropped_samples(servers: int, clip: float | None) -> None:
    plan = counting("sync", 4, servers, clip=clip, quorum=3)
    for seed in range(5):
        done = run(plan, InProcessCluster(seed, slowed(plan)))
        order = plan.order
        dropped = [line for line in done.lines if line["state"] == "dropped"]
        samples = {int(i) for line in dropped for i in order.indices(line["step"], line["slot"])}
        assert samples == {int(i) for i in (done.state["w"] == 0.0).nonzero()}
        assert len(samples) == done.driver.tally.dropped > 0
        assert done.driver.tally.samples == SAMPLES - len(samples)
        assert covered_once(done)


class Tiny:
    """A small model with buffers and chance; its weights fill six blocks."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def train_data(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(44, 64, generator=torch.Generator().manual_seed(1))
        return x, x[:, :2].sin()


def tiny(servers: int, slots: int = 5, workers: int = 3) -> Plan:
    return prepare(
        config(
            Tiny(),
            batch={"size": 16, "slots": slots},
            stop={"steps": 6},
            optimizer={"name": "adam", "lr": 0.01, "clip": {"norm": 0.3}},
            cluster={"workers": workers, "servers": servers},
        ),
        Tiny(),
    )


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_a_worker_lost_in_mid_step_changes_no_bit(servers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it dies between two shards: what it pushed to one is kept or covered, the other gets it anew."""
    plain = run(tiny(1, workers=1), InProcessCluster()).sha256
    plan = tiny(servers)
    workers = plan.cast().workers
    for seed in range(30):
        monkeypatch.setattr(inprocess, "LATENCY", (WIDE, (50e-6, 150e-6))[seed % 2])
        rng = random.Random(seed)
        lose = {worker: rng.uniform(0.0, 0.04) for worker in rng.sample(workers, rng.choice([1, 1, 2]))}
        done = run(plan, InProcessCluster(seed, slowed(plan, rng.choice([1.0, 3.0])), lose))
        assert done.error is None
        assert done.sha256 == plain, (seed, lose)


class TestMemory:
    """Without the copies of a wire: what a worker pushed is its own memory, read by shards that are slow to get it."""

    @pytest.fixture(autouse=True)
    def _by_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(InMemoryNetwork, "send", lambda self, envelope: self._on_send(envelope))
        monkeypatch.setattr(inprocess, "LATENCY", (1e-3, 50e-3))

    def test_a_pushed_gradient_is_not_rewritten_before_all_shards_have_answered(self) -> None:
        plain = run(tiny(1, workers=1), InProcessCluster()).sha256
        assert {run(tiny(3), InProcessCluster(seed)).sha256 for seed in range(10)} == {plain}

    @pytest.mark.parametrize("mode", ["bounded", "async"])
    def test_nor_under_a_lease(self, mode: str) -> None:
        for seed in range(5):
            done = run(counting(mode, 3, 3), InProcessCluster(seed))
            assert torch.equal(done.state["w"], torch.ones(SAMPLES))

    @pytest.mark.parametrize("machines", [2, 3])
    def test_nor_where_it_travels_in_parts_and_is_added_by_another(self, machines: int) -> None:
        plain = run(tiny(1, workers=1), InProcessCluster()).sha256
        found = {run(tiny(3), InProcessCluster(seed, machines=machines), bucket=64).sha256 for seed in range(5)}
        assert found == {plain}

    def test_releasing_at_once_would_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The twin: these links are slow enough to tell."""
        push = Work.push

        def careless(self: Work, message: Any, total: Any, *more: Any) -> Any:
            effects = push(self, message, total, *more)
            if total is not None:
                self.release(total)
            return effects

        monkeypatch.setattr(Work, "push", careless)
        assert run(tiny(3), InProcessCluster(0)).sha256 != run(tiny(1, workers=1), InProcessCluster(0)).sha256


class TestTime:
    def test_the_same_seed_is_the_same_run_event_by_event(self) -> None:
        """Another one takes other times."""
        plan = counting("async", 3, 2)
        one, same, other = (run(plan, InProcessCluster(seed)) for seed in (1, 1, 2))
        assert one.events == same.events
        assert one.lines == same.lines
        assert one.events != other.events

    def test_durations_are_those_of_pace(self) -> None:
        plan = counting("sync", 2, 1)
        fast, slow = (run(plan, InProcessCluster(0, lambda _, p=p: p)) for p in (0.01, 1.0))  # type: ignore[misc]
        assert slow.sha256 == fast.sha256
        least = plan.steps * SLOTS / 2  # two slots one after the other on each of two workers
        assert least * 0.01 < fast.driver.tally.last_commit < least * 0.011
        assert least * 1.0 < slow.driver.tally.last_commit < least * 1.1

    def test_a_slow_worker_holds_up_sync_but_not_async(self) -> None:
        def seconds(mode: str, pace: float) -> float:
            plan = counting(mode, 4, 1)
            return run(plan, InProcessCluster(0, slowed(plan, pace))).driver.tally.last_commit

        assert seconds("sync", 10.0) > 5 * seconds("sync", 1.0)
        assert seconds("async", 10.0) < 3 * seconds("async", 1.0)


@dataclass(frozen=True)
class Talker:
    """A process that says its lines to the driver when it is told who is who."""

    lines: int
    role = "talker"

    @property
    def rules(self) -> ev.Stop:
        return ev.Stop(timeline=1)

    def build(self, clock: Callable[[], float], allocate: Any) -> Talker:
        return self

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        return [ev.Send(ev.DRIVER, ev.StatusSent(1, str(i))) for i in range(self.lines)]


def test_messages_keep_their_order_within_a_pair_and_not_across() -> None:
    cluster = InProcessCluster(seed=3)
    cluster.spawn({1: Talker(30), 2: Talker(30)})  # type: ignore[dict-item]
    for talker in (1, 2):
        cluster.send(talker, ev.StatusRequested(1))
    heard: list[tuple[int, str]] = []
    while (arrived := cluster.receive(1.0)) is not None:
        source, message = arrived
        if isinstance(message, ev.StatusSent):
            heard.append((source, message.text))
    for talker in (1, 2):
        assert [text for source, text in heard if source == talker] == [str(i) for i in range(30)]
    assert heard != sorted(heard, key=lambda one: one[0])


def test_nothing_comes_where_nothing_ever_will() -> None:
    cluster = InProcessCluster()
    assert cluster.receive(2.0) is None
    assert cluster.now() == 2.0, "and time has passed"


@pytest.mark.parametrize("mode", MODES)
def test_without_a_checkpoint_a_lost_shard_ends_the_run(mode: str) -> None:
    plan = counting(mode, 2, 2, **MODES[mode])
    assert "shard 1" in str(run(plan, InProcessCluster(0, lose={plan.cast().shards[1]: 0.005})).error)


@pytest.mark.parametrize("mode", MODES)
def test_all_workers_lost_are_replaced(mode: str) -> None:
    plan = counting(mode, 2, 2, **MODES[mode])
    done = run(plan, InProcessCluster(0, lose=dict.fromkeys(plan.cast().workers, 0.005)))
    assert done.error is None
    assert torch.equal(done.state["w"], torch.ones(SAMPLES))
    assert covered_once(done)
    assert [event["event"] for event in done.events if event["event"] in ("fault", "joined")] == ["fault"] * 2 + [
        "joined"
    ] * 2


def test_an_evaluator_does_not_change_the_bits() -> None:
    section: dict[str, Any] = {"batch": {"size": 450, "slots": 4}, "stop": {"epochs": 2}, "cluster": {"servers": 2}}
    seldom, often = (simulate(**section, eval={"every": every}) for every in ({"epochs": 9}, {"steps": 1}))
    assert seldom.sha256 == often.sha256
