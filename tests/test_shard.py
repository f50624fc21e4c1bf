"""Shards wired by hand: nothing applies before the decision, every slot once, the same bits on any number of them."""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distgd import events as ev
from distgd.layout import BUCKET, Layout, block_squares, squared_norm
from distgd.optim import OptimizerSpec, PieceOptimizer, Schedule, clip_scale
from distgd.policy import Immediate, Policy, Staged
from distgd.reduce import Node, Sum, Tree, nodes, split
from distgd.rules import ShardRules
from distgd.shard import Shard

LAYOUT = Layout.of([("a", (100,)), ("b", (3, 50)), ("c", (7,))], "float32")  # 2 + 3 + 1 blocks
ADAM = OptimizerSpec("Adam", {"lr": 0.1})
SGD = OptimizerSpec("SGD", {"lr": 1.0})
HALVING = Schedule("exponential", gamma=0.5)
FLAT = Schedule("constant")
LAST = 100
A, B, NEWCOMER = 11, 12, 13  # workers
WEIGHTS = {0: 3.0, 1: 0.0, 2: 5.0, 3: 2.0, 4: 4.0}  # of slots; slot 1 is empty


def initial() -> Tensor:
    flat = LAYOUT.zeros()
    for i, view in enumerate(LAYOUT.views(flat).values()):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(i)))
    return flat


def mean_of(step: int, slot: int) -> Tensor:
    flat = LAYOUT.zeros()
    for i, view in enumerate(LAYOUT.views(flat).values()):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(1000 * step + 10 * slot + i)))
    return flat


def slot_sum(step: int, slot: int) -> Sum[Tensor]:
    weight = WEIGHTS[slot]
    return Sum(mean_of(step, slot) * weight if weight else None, weight, owned=True)


def _plus(left: Sum[Tensor], right: Sum[Tensor]) -> Sum[Tensor]:
    assert left.value is not None and right.value is not None
    return Sum(left.value + right.value, 0.0, True)


def node_sum(step: int, node: Node) -> Sum[Tensor]:
    first, stop = node
    if stop - first == 1:
        return slot_sum(step, first)
    middle = split(first, stop)
    left, right = node_sum(step, (first, middle)), node_sum(step, (middle, stop))
    if left.value is None or right.value is None:
        return Sum(right.value if left.value is None else left.value, left.weight + right.weight, True)
    return Sum(left.value + right.value, left.weight + right.weight, True)


def rules(shards: int, *, staged: bool = True, clip: float | None = None, scale_lr: bool = False) -> ShardRules:
    return ShardRules(1, tuple(range(1, shards + 1)), len(WEIGHTS), LAST, staged, clip, scale_lr)


def members(number: int, *workers: int, newest: int = B) -> ev.MembershipChanged:
    return ev.MembershipChanged(1, number, frozenset({ev.DRIVER, 1, 2, 3, *workers}), newest, ())


def performed(effects: Iterable[ev.Effect], stored: list[ev.Store] | None = None) -> Iterator[ev.Send]:
    """What is sent, updates being made; what is for files goes to `stored`."""
    for effect in effects:
        if isinstance(effect, ev.Update):
            yield from performed(effect.effects, stored)
        elif isinstance(effect, ev.Store) and stored is not None:
            stored.append(effect)
        else:
            assert isinstance(effect, ev.Send)
            yield effect


class Wire:
    """Shards and what is under way between them; a pair keeps its order, pairs overtake each other."""

    def __init__(
        self,
        shards: int = 1,
        *,
        seed: int = 0,
        quorum: int | None = None,
        clip: float | None = None,
        optimizer: OptimizerSpec = ADAM,
        policy: Policy | None = None,
        scale_lr: bool = False,
        schedule: Schedule = HALVING,
        bucket: int = BUCKET,
    ) -> None:
        self.random = random.Random(seed)
        self.rules = replace(rules(shards, staged=policy is None, clip=clip, scale_lr=scale_lr), bucket=bucket)
        self.quorum = quorum or len(WEIGHTS)
        self.links: dict[tuple[int, int], deque[Any]] = defaultdict(deque)
        self.heard: dict[int, list[Any]] = defaultdict(list)  # what driver and workers got
        self.stored: list[ev.Store] = []
        self.shards = []
        for part in LAYOUT.slices(shards):
            weights = initial()[part.start : part.stop].clone()
            pieces = [(p.name, weights[p.start : p.start + p.size]) for p in part.pieces]
            rule = policy or Staged(slots=len(WEIGHTS), quorum=self.quorum, shards=shards, measure=clip is not None)
            buffers = np.zeros(8, dtype=np.uint8) if part.index == 0 else None
            eager = self.quorum == len(WEIGHTS)
            made = Shard(
                self.rules, part, weights, buffers, PieceOptimizer(optimizer, pieces), rule, schedule, eager=eager
            )
            made.handle(ev.DRIVER, members(1, A, B))
            self.shards.append(made)

    @property
    def weights(self) -> Tensor:
        return torch.cat([shard.weights for shard in self.shards])

    def versions(self) -> set[int]:
        return {shard.version for shard in self.shards}

    def give(self, source: int, event: Any, shard: int = 0) -> list[ev.Effect]:
        """Deliver at once and deliver what follows."""
        effects = list(performed(self.shards[shard].handle(source, event), self.stored))
        self._post(shard + 1, effects)
        self.drain()
        return list[ev.Effect](effects)

    def post(self, source: int, shard: int, event: Any) -> None:
        self.links[source, shard + 1].append(event)

    def drain(self) -> None:
        """Deliver everything, in an order of the seed."""
        while ready := sorted(link for link, queue in self.links.items() if queue):
            source, to = self.random.choice(ready)
            event = self.links[source, to].popleft()
            self._post(to, self.shards[to - 1].handle(source, event))

    def _post(self, source: int, effects: Iterable[ev.Effect]) -> None:
        for effect in performed(effects, self.stored):
            if effect.to in self.rules.incarnations:
                self.links[source, effect.to].append(effect.message)
            else:
                self.heard[effect.to].append(effect.message)

    def push(self, step: int, node: Node, *, bad: tuple[int, ...] = (), buffers: int | None = None) -> list[Any]:
        """One worker's messages for every shard."""
        total = node_sum(step, node)
        messages = []
        for shard in self.shards:
            part = shard.part
            value = None if total.value is None else total.value[part.start : part.stop].numpy().copy()
            packed = np.full(8, buffers, dtype=np.uint8) if buffers is not None and part.index == 0 else None
            stats = tuple(ev.SlotStats(k, int(WEIGHTS[k]), WEIGHTS[k], 0.5, 1.0, 0.1) for k in range(*node))
            messages.append(
                ev.GradientArrived(
                    1, step, 0, *node, step, total.weight, bad, -1, value, packed, () if part.index else stats
                )
            )
        return messages

    def push_all(self, step: int, nodes_: Iterable[Node], **more: Any) -> None:
        for node in nodes_:
            for index, message in enumerate(self.push(step, node, **more)):
                self.post(A, index, message)
        self.drain()

    def committed(self) -> list[ev.StepCommitted]:
        return [m for m in self.heard[ev.DRIVER] if isinstance(m, ev.StepCommitted)]


class Plain:
    """The same mathematics without shards, messages or policies."""

    def __init__(self, clip: float | None = None, optimizer: OptimizerSpec = ADAM) -> None:
        self.weights = initial()
        self.clip = clip
        whole = LAYOUT.slices(1)[0]
        pieces = [(p.name, self.weights[p.start : p.start + p.size]) for p in whole.pieces]
        self._optimizer = PieceOptimizer(optimizer, pieces)
        self._pieces = whole.pieces

    def step(self, step: int, slots: Collection[int]) -> None:
        tree: Tree[Tensor] = Tree(len(WEIGHTS), _plus, eager=False)
        for k in slots:
            tree.put((k, k + 1), slot_sum(step, k))
        total = tree.total(slots)
        grad = LAYOUT.zeros() if total.value is None else total.value / total.weight
        if self.clip is not None:
            grad.mul_(clip_scale(squared_norm(block_squares(grad)), self.clip))
        self._optimizer.step([grad[p.start : p.start + p.size] for p in self._pieces], HALVING.factor(step))


EVERY = range(len(WEIGHTS))
ALL = (0, len(WEIGHTS))
SINGLE = [(k, k + 1) for k in EVERY]
NODES = [*SINGLE, *(parent for parent, _, _ in nodes(len(WEIGHTS)))]


class TestStageThenCommit:
    @settings(max_examples=60)
    @given(st.integers(1, 3), st.sampled_from([None, 0.5, 1e9]), st.integers(0, 10**9))
    def test_any_interleaving_gives_the_bits_of_plain_mathematics(
        self, shards: int, clip: float | None, seed: int
    ) -> None:
        """Workers push overlapping nodes, twice, out of order, and some of it never arrives on some shard."""
        wire, plain = Wire(shards, seed=seed, clip=clip), Plain(clip)
        rng = random.Random(seed)
        for step in range(3):
            pushes = [(rng.choice([A, B]), node) for node in [*NODES, *NODES] if rng.random() < 0.6]
            rng.shuffle(pushes)
            for worker, node in pushes:
                for index, message in enumerate(wire.push(step, node)):
                    if rng.random() < 0.8:
                        wire.post(worker, index, message)
            wire.drain()
            wire.push_all(step, [rng.choice([ALL, *([ALL] * 3)]), *SINGLE])  # who lives computes what is missing
            plain.step(step, EVERY)
            assert wire.versions() == {step + 1}
            assert torch.equal(wire.weights, plain.weights)
        assert [c.step for c in wire.committed()] == [0, 1, 2]
        assert all(c.slots == tuple(EVERY) and c.applied for c in wire.committed())

    def test_nothing_changes_weights_before_every_shard_is_full(self) -> None:
        wire = Wire(3)
        before = wire.weights.clone()
        for node in SINGLE:
            for index, message in enumerate(wire.push(0, node)[:2]):
                wire.post(A, index, message)
        wire.push_all(0, SINGLE[:4])
        assert wire.versions() == {0}
        assert torch.equal(wire.weights, before)
        assert wire.shards[2].describe().endswith("waits for slots [4]")
        wire.post(B, 2, wire.push(0, (4, 5))[2])
        wire.drain()
        assert wire.versions() == {1}
        assert not torch.equal(wire.weights, before)

    def test_the_others_are_told_before_shard_0_steps(self) -> None:
        wire = Wire(2)
        before = wire.weights.clone()
        for index, message in enumerate(wire.push(0, ALL)):
            wire.post(A, index, message)
        shards = wire.shards
        shards[0].handle(A, wire.links[A, 1].popleft())
        (report,) = shards[1].handle(A, wire.links[A, 2].popleft())
        assert isinstance(report, ev.Send)
        told, update = shards[0].handle(2, report.message)
        assert isinstance(told, ev.Send) and isinstance(told.message, ev.Commit)
        assert isinstance(update, ev.Update)
        assert torch.equal(wire.weights, before)
        assert [type(each.message) for each in performed([update])] == [ev.StepCommitted]
        assert not torch.equal(shards[0].weights, before[: len(shards[0].weights)])

    @pytest.mark.parametrize("taken", [0, 1, 3])
    def test_whoever_asks_in_the_middle_of_an_update_gets_the_version_that_it_makes(self, taken: int) -> None:
        """Parts go to another machine while the rest is stepped; what is left is done before anything is handled."""
        wire, plain = Wire(1, bucket=64), Plain()
        shard = wire.shards[0]
        elsewhere = replace(members(2, A, B), nodes=((1, A), (B,)))
        wire.give(ev.DRIVER, elsewhere)
        wire.give(B, ev.PullRequested(1, 1, 0, holds=0))
        (update,) = shard.handle(A, wire.push(0, ALL)[0])
        assert isinstance(update, ev.Update)
        first = [next(update.effects) for _ in range(taken)]
        rest = list(performed(shard.handle(A, ev.PullRequested(1, 0, 0))))
        assert not list(update.effects), "it has been made"
        plain.step(0, EVERY)
        assert torch.equal(wire.weights, plain.weights)
        sent = [e.message for e in performed([*first, *rest]) if e.to == B]
        assert [type(m) for m in sent] == [*[ev.WeightsPart] * (len(plain.weights) // 64), ev.WeightsSent]
        assert torch.equal(torch.from_numpy(np.concatenate([m.weights for m in sent[:-1]])), plain.weights)
        assert rest[-1].to == A and rest[-1].message.version == 1

    def test_what_is_covered_is_ignored_and_counts_once(self) -> None:
        wire, plain = Wire(2), Plain()
        wire.push_all(0, [(0, 2), (0, 1), (0, 2), (1, 2), (2, 4), (0, 4), (2, 3), (4, 5)])
        plain.step(0, EVERY)
        assert torch.equal(wire.weights, plain.weights)
        wire.push_all(0, [ALL, (4, 5)])
        assert torch.equal(wire.weights, plain.weights), "a push of a decided step changes nothing"
        assert sorted(s.slot for s in wire.committed()[0].stats) == list(EVERY), "nobody's statistics count twice"

    def test_statistics_of_replaced_pushes_do_not_count(self) -> None:
        wire, plain = Wire(2), Plain()
        wire.push_all(0, [(0, 1), (2, 3), (0, 4), (4, 5)])
        plain.step(0, EVERY)
        assert torch.equal(wire.weights, plain.weights)
        assert [s.slot for s in wire.committed()[0].stats] == list(EVERY)

    def test_a_step_of_empty_slots_steps_with_a_zero_gradient(self) -> None:
        wire = Wire(2, optimizer=SGD, quorum=1)
        before = wire.weights.clone()
        wire.push_all(0, [(1, 2)])
        assert wire.versions() == {1}
        assert torch.equal(wire.weights, before)

    def test_the_record_names_who_computed_and_what_it_took(self) -> None:
        wire = Wire()
        for worker, node in ((A, (0, 4)), (B, (4, 5))):
            message = replace(wire.push(0, node)[0], times={worker: {"compute": 0.25}})
            wire.give(worker, message)
        (committed,) = wire.committed()
        assert committed.times == {A: {"compute": 0.25}, B: {"compute": 0.25}}


class TestQuorum:
    @settings(max_examples=60)
    @given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([None, 0.5]), st.integers(0, 10**9))
    def test_any_arrival_gives_one_decision_and_the_bits_of_one_shard(
        self, shards: int, quorum: int, clip: float | None, seed: int
    ) -> None:
        wire, plain = Wire(shards, seed=seed, quorum=quorum, clip=clip), Plain(clip)
        rng = random.Random(seed)
        for step in range(3):
            for index in range(shards):
                order = SINGLE[:]
                rng.shuffle(order)
                for node in order:
                    wire.post(rng.choice([A, B]), index, wire.push(step, node)[index])
            wire.drain()
            slots = wire.committed()[-1].slots
            plain.step(step, slots)
            assert len(slots) >= quorum
            assert wire.versions() == {step + 1}
            assert torch.equal(wire.weights, plain.weights)
            assert tuple(s.slot for s in wire.committed()[-1].stats) == slots
        assert len(wire.committed()) == 3

    def test_late_slots_are_dropped_and_counted_with_the_next_step(self) -> None:
        wire = Wire(2, quorum=2)
        wire.push_all(0, SINGLE[:2])
        assert wire.versions() == {1}
        wire.push_all(0, SINGLE[2:])
        wire.push_all(1, SINGLE[:2])
        assert [c.late for c in wire.committed()] == [0, 3]

    def test_a_norm_is_that_of_the_decided_slots(self) -> None:
        wire = Wire(3, quorum=3, clip=0.5)
        wire.push_all(0, [(3, 4), (0, 1), (4, 5)])
        (committed,) = wire.committed()
        total = sum(mean_of(0, k).double() * WEIGHTS[k] for k in committed.slots)
        norm = float((total / sum(WEIGHTS[k] for k in committed.slots)).norm())
        assert committed.norm == pytest.approx(norm, rel=1e-6)
        assert committed.clip == pytest.approx(0.5 / norm, rel=1e-3)


class TestNotFinite:
    @pytest.mark.parametrize("shards", [1, 2, 3])
    @pytest.mark.parametrize("quorum", [None, 5])
    def test_a_bad_slot_skips_the_step_on_all_shards_and_is_named(self, shards: int, quorum: int | None) -> None:
        wire = Wire(shards, quorum=quorum, clip=1.0)
        before = wire.weights.clone()
        wire.push_all(0, [(0, 1), (1, 2), (3, 4), (4, 5)])
        wire.push_all(0, [(2, 3)], bad=(2,))
        (held,) = [m for m in wire.heard[ev.DRIVER] if isinstance(m, ev.Poisoned)]
        assert (held.step, held.bad, [s.slot for s in held.stats]) == (0, (2,), [2])
        assert (wire.versions(), wire.committed()) == ({0}, [])
        wire.give(ev.DRIVER, ev.Skip(1, 0))
        (committed,) = wire.committed()
        assert not committed.applied
        assert committed.bad == (2,)
        assert wire.versions() == {1}, "a skipped step counts as a version"
        assert torch.equal(wire.weights, before)
        wire.push_all(1, [ALL])
        assert wire.committed()[1].applied
        assert not torch.equal(wire.weights, before)

    def test_buffers_of_a_skipped_step_are_not_committed(self) -> None:
        wire = Wire()
        wire.push_all(0, [ALL], bad=(3,), buffers=9)
        wire.give(ev.DRIVER, ev.Skip(1, 0))
        assert wire.versions() == {1}
        assert (wire.shards[0].buffers_version, wire.shards[0].buffers[0]) == (0, 0)  # type: ignore[index]


class TestBuffers:
    def test_they_are_committed_with_slot_0_only(self) -> None:
        wire = Wire(2, quorum=1)
        wire.push_all(0, [(2, 3)], buffers=7)
        assert wire.shards[0].buffers_version == 0
        wire.push_all(1, [(0, 1)], buffers=8)
        assert (wire.shards[0].buffers_version, wire.shards[0].buffers[0]) == (1, 8)  # type: ignore[index]
        assert wire.shards[1].buffers is None

    def test_they_are_sent_to_readers_whose_own_are_older(self) -> None:
        wire = Wire()
        wire.push_all(0, [ALL], buffers=8)
        for known, sent in ((0, True), (1, False)):
            (answer,) = wire.give(A, ev.PullRequested(1, 1, known))
            assert isinstance(answer, ev.Send)
            assert (answer.message.buffers is not None) is sent
            assert answer.message.buffers_version == 1


class TestPulls:
    def test_a_pull_waits_for_its_version(self) -> None:
        wire = Wire()
        assert wire.give(A, ev.PullRequested(1, 2, 0)) == []
        wire.push_all(0, [ALL])
        assert wire.heard[A] == []
        wire.push_all(1, [ALL])
        (sent,) = wire.heard[A]
        assert sent.version == 2
        assert np.array_equal(sent.weights, wire.shards[0].weights.numpy())
        wire.push_all(2, [ALL])
        assert len(wire.heard[A]) == 1, "answered once"
        assert np.shares_memory(sent.weights, wire.shards[0].weights.numpy()), "all compute before any shard applies"

    def test_under_a_quorum_an_answer_is_a_copy(self) -> None:
        """Others may still compute with it when the shard applies."""
        wire = Wire(quorum=len(WEIGHTS) - 1)
        wire.give(A, ev.PullRequested(1, 0, 0))
        (sent,) = wire.heard[A]
        assert not np.shares_memory(sent.weights, wire.shards[0].weights.numpy())

    @pytest.mark.parametrize("bound", [None, 3])
    def test_under_leases_an_answer_is_a_copy_of_one_version(self, bound: int | None) -> None:
        """Others' pushes are applied while it is read."""
        wire = Wire(policy=Immediate(bound=bound, filled=lambda step: len(WEIGHTS)))
        wire.give(A, ev.PullRequested(1, 0, 0, 1, 0, 0))
        (sent,) = wire.heard[A]
        assert not np.shares_memory(sent.weights, wire.shards[0].weights.numpy())

    def test_an_older_version_is_answered_with_the_present_one(self) -> None:
        wire = Wire()
        wire.push_all(0, [ALL])
        wire.give(A, ev.PullRequested(1, 0, 0))
        assert wire.heard[A][0].version == 1

    def test_the_dead_get_no_answer(self) -> None:
        wire = Wire()
        wire.give(B, ev.PullRequested(1, 1, 0))
        wire.give(ev.DRIVER, members(2, A))
        wire.push_all(0, [ALL])
        assert wire.heard[B] == []


class TestFencing:
    def test_the_dead_are_told_and_change_nothing(self) -> None:
        wire = Wire()
        wire.give(ev.DRIVER, members(2, A))
        for event in (*wire.push(0, ALL), ev.PullRequested(1, 0, 0)):
            assert wire.give(B, event) == [ev.Send(B, ev.Fenced(1))]
        assert wire.versions() == {0}
        wire.push_all(0, [ALL])
        assert wire.versions() == {1}

    def test_the_dead_of_another_timeline_and_those_without_a_machine_are_told(self) -> None:
        wire = Wire()
        wire.give(ev.DRIVER, replace(members(2, A), nodes=((A,), tuple(wire.rules.incarnations))))
        for timeline in (0, 1):
            assert wire.give(B, ev.PullRequested(timeline, 0, 0)) == [ev.Send(B, ev.Fenced(1))]

    def test_what_the_dead_pushed_while_they_lived_counts(self) -> None:
        wire = Wire()
        wire.give(B, wire.push(0, (0, 4))[0])
        wire.give(ev.DRIVER, members(2, A))
        wire.push_all(0, [(4, 5)])
        assert wire.versions() == {1}

    def test_a_newcomer_waits_until_it_is_announced(self) -> None:
        wire = Wire()
        wire.push_all(0, [(0, 4)])
        assert wire.give(NEWCOMER, ev.PullRequested(1, 1, 0)) == []
        assert wire.give(NEWCOMER, wire.push(0, (4, 5))[0]) == []
        assert wire.versions() == {0}
        wire.give(ev.DRIVER, members(2, A, NEWCOMER, newest=NEWCOMER))
        assert wire.versions() == {1}
        assert [m.version for m in wire.heard[NEWCOMER]] == [1]

    def test_a_newcomer_that_died_meanwhile_is_fenced(self) -> None:
        wire = Wire()
        wire.give(NEWCOMER, ev.PullRequested(1, 0, 0))
        wire.give(ev.DRIVER, members(2, A, newest=NEWCOMER))
        assert wire.heard[NEWCOMER] == [ev.Fenced(1)]

    def test_an_older_membership_is_ignored(self) -> None:
        wire = Wire()
        wire.give(ev.DRIVER, members(3, A))
        wire.give(ev.DRIVER, members(2, A, B))
        assert wire.give(B, ev.PullRequested(1, 0, 0)) == [ev.Send(B, ev.Fenced(1))]

    def test_other_timelines_are_refused(self) -> None:
        wire = Wire()
        for timeline in (0, 2):
            foreign = [*wire.push(0, ALL), ev.PullRequested(1, 0, 0), members(2), ev.TakeSnapshot(1, 1, 1)]
            for event in foreign:
                assert wire.give(A, replace(event, timeline=timeline)) == []
        assert wire.versions() == {0}
        assert wire.give(A, ev.PullRequested(1, 0, 0)), "and did not fence anybody"


class TestSnapshots:
    def test_all_shards_take_the_version_asked_for(self) -> None:
        wire = Wire(3, seed=5)
        wire.give(ev.DRIVER, ev.TakeSnapshot(1, 1, 2))
        for step in range(4):
            wire.push_all(step, [ALL])
            if step == 1:
                weights = wire.weights.clone()
        parts = self.pulled(wire, 1)
        assert [p.version for p in parts] == [2, 2, 2]
        assert np.array_equal(np.concatenate([p.weights for p in parts]), weights.numpy())
        assert [p.buffers is not None for p in parts] == [True, False, False]

    @pytest.mark.parametrize(("at", "taken"), [(2, 2), (1, 3)])
    def test_asked_late_means_the_present_version_or_else_the_next(self, at: int, taken: int) -> None:
        wire = Wire(2)
        wire.push_all(0, [ALL])
        wire.push_all(1, [ALL])
        wire.give(ev.DRIVER, ev.TakeSnapshot(1, 1, at))
        wire.push_all(2, [ALL])
        assert [p.version for p in self.pulled(wire, 1)] == [taken, taken]

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_asked_beyond_the_last_means_the_last(self, when: str) -> None:
        wire = Wire(2)
        if when == "before":
            wire.give(ev.DRIVER, ev.TakeSnapshot(1, 1, LAST + 5))
        for step in range(LAST):
            wire.push_all(step, [ALL])
        if when == "after":
            wire.give(ev.DRIVER, ev.TakeSnapshot(1, 1, LAST + 5))
        assert [p.version for p in self.pulled(wire, 1)] == [LAST, LAST]

    def test_a_number_is_taken_once(self) -> None:
        wire = Wire(2)
        wire.give(ev.DRIVER, ev.TakeSnapshot(1, 1, 1))
        wire.push_all(0, [ALL])
        wire.give(ev.DRIVER, ev.TakeSnapshot(1, 1, 1))
        wire.push_all(1, [ALL])
        assert [p.version for p in self.pulled(wire, 1)] == [1, 1]

    def test_a_skipped_step_counts(self) -> None:
        wire = Wire(2)
        wire.give(ev.DRIVER, ev.TakeSnapshot(1, 1, 1))
        wire.push_all(0, [ALL], bad=(0,))
        assert wire.versions() == {0}
        wire.give(ev.DRIVER, ev.Skip(1, 0))
        assert [p.version for p in self.pulled(wire, 1)] == [1, 1]

    def test_a_reader_that_came_early_gets_it_when_it_exists(self) -> None:
        wire = Wire()
        assert wire.give(A, ev.SnapshotPulled(1, 1)) == []
        wire.give(ev.DRIVER, ev.TakeSnapshot(1, 1, 1))
        wire.push_all(0, [ALL])
        assert [m.version for m in wire.heard[A]] == [1]

    @staticmethod
    def pulled(wire: Wire, number: int) -> list[ev.SnapshotSent]:
        for index in range(len(wire.shards)):
            wire.give(B, ev.SnapshotPulled(1, number), index)
        return sorted((m for m in wire.heard[B] if isinstance(m, ev.SnapshotSent)), key=lambda m: m.shard)


def lease_push(lease: int, slot: int, step: int = 0, gradient: float = 1.0, **more: Any) -> ev.GradientArrived:
    """A mean gradient of `gradient` in each element, weight 2."""
    value = np.full(LAYOUT.size, 2.0 * gradient, dtype=np.float32)
    return ev.GradientArrived(1, step, 0, slot, slot + 1, 0, 2.0, more.pop("bad", ()), lease, value, None, **more)


class TestImmediately:
    def wire(self, bound: int | None = None, *, scale_lr: bool = False) -> Wire:
        policy = Immediate(bound=bound, filled=lambda step: len(WEIGHTS))
        return Wire(policy=policy, optimizer=SGD, scale_lr=scale_lr, schedule=FLAT)

    @staticmethod
    def pull(lease: int, slot: int) -> ev.PullRequested:
        return ev.PullRequested(1, 0, 0, lease, 0, slot)

    def stale(self, wire: Wire, by: int) -> float:
        """Apply a push that is `by` updates late; by how much it changed the weights."""
        wire.give(A, self.pull(1, 0))
        for lease in range(2, 2 + by):
            wire.give(B, self.pull(lease, lease))
            wire.give(B, lease_push(lease, lease))
        before = wire.weights.clone()
        wire.give(A, lease_push(1, 0))
        assert wire.heard[A][-1] == ev.PushAnswered(1, 0, 1, "applied", by)
        return float((before - wire.weights).max())

    @pytest.mark.parametrize("by", [0, 1, 2, 3])
    def test_scale_lr_divides_the_learning_rate_by_the_staleness(self, by: int) -> None:
        assert self.stale(self.wire(), by) == pytest.approx(1.0)
        assert self.stale(self.wire(scale_lr=True), by) == pytest.approx(1.0 / max(1, by))

    def test_the_schedule_counts_steps_not_updates(self) -> None:
        wire = Wire(policy=Immediate(bound=None, filled=lambda _: 5), optimizer=SGD, schedule=HALVING)
        changes = []
        for step, slot in [(t, k) for t in range(2) for k in EVERY]:
            before = wire.weights.clone()
            lease = step * 5 + slot
            wire.give(A, ev.PullRequested(1, 0, 0, lease, step, slot))
            wire.give(A, lease_push(lease, slot, step))
            changes.append(round(float((before - wire.weights).max()), 3))
        assert changes == [1.0] * 5 + [0.5] * 5

    def test_a_file_says_of_its_own_weights_what_is_in_them(self) -> None:
        """Two pushes become feasible at once, and the version between them is written."""
        wire = self.wire(bound=1)
        for worker, lease, slot in ((A, 1, 0), (B, 2, 1), (A, 3, 2)):
            wire.give(worker, self.pull(lease, slot))
        wire.give(A, lease_push(1, 0))
        wire.give(B, lease_push(2, 1))
        assert wire.versions() == {0}, "both wait for the third read"
        wire.give(ev.DRIVER, ev.TakeSnapshot(1, -1, 1))
        wire.give(ev.DRIVER, ev.LeaseExpired(1, A, 3))
        assert wire.versions() == {2}
        for store in wire.stored:
            assert (store.version, json.loads(store.applied)) == (1, {"steps": 0, "slots": [[0, 0]]})
        assert wire.stored

    def test_every_push_is_answered_once(self) -> None:
        wire = self.wire(bound=0)
        for worker, lease, slot in ((A, 1, 0), (B, 2, 1)):
            wire.give(worker, self.pull(lease, slot))
        wire.give(A, lease_push(1, 0))
        wire.give(A, lease_push(1, 0))
        assert wire.versions() == {0}, "it waits for the other read"
        wire.give(ev.DRIVER, ev.LeaseExpired(1, B, 2))
        answers = [m for m in wire.heard[A] if isinstance(m, ev.PushAnswered)]
        assert [a.outcome for a in answers] == ["applied"]
        assert wire.versions() == {1}

    def test_a_covered_slot_is_answered_without_effect(self) -> None:
        wire = self.wire()
        for worker, lease in ((A, 1), (B, 2)):
            wire.give(worker, self.pull(lease, 0))
        wire.give(A, lease_push(1, 0))
        after = wire.weights.clone()
        wire.give(B, lease_push(2, 0))
        assert wire.heard[B][-1].outcome == "covered"
        assert torch.equal(wire.weights, after)

    def test_an_expired_lease_is_refused_at_pull_and_at_push(self) -> None:
        wire = self.wire()
        wire.give(A, self.pull(1, 0))
        wire.give(ev.DRIVER, ev.LeaseExpired(1, A, 1))
        wire.give(A, lease_push(1, 0))
        wire.give(A, self.pull(1, 0))
        assert [m.outcome for m in wire.heard[A] if isinstance(m, ev.PushAnswered)] == ["gone", "gone"]
        assert wire.versions() == {0}

    def test_a_gradient_that_is_not_finite_counts_and_changes_nothing(self) -> None:
        wire = self.wire()
        before = wire.weights.clone()
        wire.give(A, self.pull(1, 0))
        wire.give(A, lease_push(1, 0, gradient=float("nan"), bad=(0,)))
        assert wire.heard[A][-1].outcome == "applied"
        assert torch.equal(wire.weights, before)
        assert wire.versions() == {1}

    def test_the_held_push_of_the_dead_is_dropped_in_silence(self) -> None:
        wire = self.wire(bound=0)
        for worker, lease in ((A, 1), (B, 2)):
            wire.give(worker, self.pull(lease, lease))
        wire.give(B, lease_push(2, 2))
        said = len(wire.heard[B])
        wire.give(ev.DRIVER, members(2, A))
        assert (wire.versions(), len(wire.heard[B])) == ({0}, said)
        wire.give(A, lease_push(1, 1))
        assert wire.versions() == {1}

    def test_a_snapshot_of_a_shard_already_past_is_taken_at_once(self) -> None:
        wire = self.wire()
        assert self.stale(wire, 3) == pytest.approx(1.0)
        wire.give(B, ev.SnapshotPulled(1, 7))
        wire.give(ev.DRIVER, ev.TakeSnapshot(1, 7, 2))
        assert wire.heard[B][-1].version == 4
