"""A worker by hand: what it computes, pushes and asks for, and when it gives up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from simulate import config

from distgd import events as ev
from distgd.errors import RunFailed
from distgd.layout import Layout
from distgd.plan import Plan
from distgd.prepare import prepare
from distgd.worker import Worker, WorkerSpec

SAMPLES, BATCH, SLOTS = 256, 32, 8
SHARDS = (1, 2, 3)
ME, OTHER = 4, 5


def plan(mode: str = "sync", **consistency: Any) -> Plan:
    return prepare(
        config(
            builtin={"name": "counting", "args": {"samples": SAMPLES}},
            batch={"size": BATCH, "slots": SLOTS},
            stop={"steps": 4},
            consistency={"mode": mode, **consistency},
            cluster={"workers": 2, "servers": 3},
        )
    )


def spec_of(prepared: Plan) -> WorkerSpec:
    spec = prepared.specs(prepared.cast())[ME]
    assert isinstance(spec, WorkerSpec)
    return spec


class Desk:
    """One worker, and everything that it asks its host to do."""

    def __init__(self, mode: str = "sync", **consistency: Any) -> None:
        prepared = plan(mode, **consistency)
        self.order = prepared.order
        self.worker: Worker = spec_of(prepared).build(lambda: 0.0)
        self.sent: list[ev.Send] = []
        self.work: list[Any] = []
        self.ended: list[ev.End] = []
        self.emitted: list[ev.Effect] = []

    def give(self, event: Any, source: int = ev.DRIVER) -> list[Any]:
        """Deliver; the messages that follow, in order."""
        effects = self.worker.handle(source, event)
        self.work += [e.work for e in effects if isinstance(e, ev.Compute)]
        self.ended += [e for e in effects if isinstance(e, ev.End)]
        sent = [e for e in effects if isinstance(e, ev.Send)]
        self.sent += sent
        return [e.message for e in sent]

    def compute(self, times: int = 1) -> list[Any]:
        """Finish the next slots; the messages that follow."""
        messages: list[Any] = []
        for _ in range(times):
            messages += self.give(replace(self.worker.perform(self.work.pop(0), self.emitted.append), seconds=0.5), ME)
        return messages

    def table(self, *own: int, number: int = 1, timeline: int = 1) -> list[Any]:
        table = tuple(ME if k in own else OTHER for k in range(SLOTS))
        return self.give(ev.MembershipChanged(timeline, number, frozenset({0, *SHARDS, ME, OTHER}), OTHER, table))

    def weights(self, shard: int, version: int, lease: int = -1, timeline: int = 1, **more: Any) -> list[Any]:
        part = self.worker.spec.slices[shard]
        values = np.full(part.size, float(version), dtype=np.float32)
        return self.give(ev.WeightsSent(timeline, shard, version, lease, 0, values, None, **more), SHARDS[shard])

    def all_weights(self, version: int, lease: int = -1, timeline: int = 1) -> list[Any]:
        return [m for shard in range(3) for m in self.weights(shard, version, lease, timeline)]

    def computing(self) -> list[tuple[int, int]]:
        return [(work.step, work.slot) for work in self.work]


def pushes(messages: list[Any]) -> list[ev.GradientArrived]:
    return [m for m in messages if isinstance(m, ev.GradientArrived)]


def nodes(messages: list[Any]) -> list[tuple[int, int]]:
    """Of pushes to three shards, each counted once."""
    found = [(p.first, p.stop) for p in pushes(messages)]
    assert found == [node for node in found[::3] for _ in SHARDS]
    return found[::3]


class TestSync:
    @pytest.mark.parametrize(
        ("own", "expected"),
        [
            (range(8), [(0, 8)]),
            ([0, 1, 2, 5], [(0, 2), (2, 3), (5, 6)]),
            ([4, 5, 6, 7], [(4, 8)]),
            ([], []),
        ],
    )
    def test_it_computes_its_slots_and_pushes_maximal_subtrees(self, own: Any, expected: Any) -> None:
        desk = Desk()
        assert {m.at_least for m in desk.table(*own)} == {0}
        asked = desk.all_weights(0)
        messages = desk.compute(len(list(own)))
        assert nodes(messages) == expected
        ahead = [m.at_least for m in asked] + [m.step + 1 for m in pushes(messages) if m.reads >= 0]
        assert set(ahead) == {1}, "it asks for the next version ahead, with its pushes where it has any"
        assert not desk.work

    def test_a_slot_of_the_former_timeline_gives_its_memory_to_nobody(self) -> None:
        desk = Desk()
        desk.table(0, 1)
        desk.all_weights(0)
        desk.give(ev.TimelineBegun(2, SHARDS))
        desk.table(0, 2, 4, timeline=2)
        desk.all_weights(0, timeline=2)
        assert desk.compute() == [], "it was begun before"
        outs = []
        while desk.work:
            outs.append(desk.work[0].out.data_ptr())
            desk.compute()
        assert len(outs) == len(set(outs)) == 3

    def test_a_push_is_the_sum_of_its_slots_in_slices(self) -> None:
        desk = Desk()
        desk.table(0, 1)
        desk.all_weights(0)
        messages = pushes(desk.compute(2))
        flat = torch.from_numpy(np.concatenate([m.gradient for m in messages if m.gradient is not None]))
        expected = torch.zeros(SAMPLES)
        expected[torch.from_numpy(np.concatenate([desk.order.indices(0, k) for k in (0, 1)]))] = -1.0
        assert torch.equal(flat, expected), "S_k is w_k times the mean gradient"
        assert {m.weight for m in messages} == {BATCH / SLOTS * 2}
        assert [len(m.stats) for m in messages] == [2, 0, 0], "statistics go to shard 0 alone"
        assert messages[0].times[ME]["compute"] == 1.0
        assert {m.version for m in messages} == {0}

    def test_a_new_table_in_mid_step_adds_slots_and_repeats_none(self) -> None:
        desk = Desk()
        desk.table(0, 1)
        desk.all_weights(0)
        first = desk.compute()
        desk.table(0, 1, 2, 3, 6, number=2)
        assert nodes([*first, *desk.compute()]) == [(0, 2)]
        assert desk.computing() == [(0, 2)]
        assert nodes(desk.compute(3)) == [(2, 4), (6, 7)]
        assert not desk.work

    def test_a_new_table_after_its_push_adds_slots_too(self) -> None:
        desk = Desk()
        desk.table(0)
        desk.all_weights(0)
        desk.compute()
        assert not desk.work
        desk.table(0, 5, number=2)
        assert nodes(desk.compute()) == [(5, 6)]

    def test_an_older_table_is_ignored(self) -> None:
        desk = Desk()
        desk.table(0, number=5)
        desk.all_weights(0)
        desk.compute()
        desk.table(*range(8), number=4)
        assert not desk.work

    def test_no_slot_is_computed_before_all_shards_sent_one_version(self) -> None:
        desk = Desk()
        desk.table(0)
        desk.weights(0, 0)
        desk.weights(1, 0)
        assert not desk.work
        desk.weights(2, 0)
        assert desk.computing() == [(0, 0)]
        assert set(desk.worker.replica.flat.tolist()) == {0.0}

    def test_differing_versions_make_it_ask_for_the_highest_until_they_agree(self) -> None:
        """A quorum goes on without it, so what it is sent moves while it reads."""
        desk = Desk(quorum=5)
        desk.table(0)
        desk.weights(0, 0)
        desk.weights(1, 2)
        del desk.sent[:]
        desk.weights(2, 1)
        assert [(e.to, e.message.at_least) for e in desk.sent] == [(1, 2), (3, 2)]
        desk.weights(0, 3)
        assert [(e.to, e.message.at_least) for e in desk.sent[2:]] == [(2, 3), (3, 3)]
        assert not desk.work
        desk.weights(1, 3)
        desk.weights(2, 2)
        assert not desk.work, "an answer to the former question is not enough"
        desk.weights(2, 3)
        assert desk.computing() == [(3, 0)]

    def test_a_step_that_a_quorum_finished_is_abandoned(self) -> None:
        desk = Desk(quorum=5)
        desk.table(0, 1)
        desk.all_weights(0)
        assert nodes(desk.compute()) == [(0, 1)], "under a quorum every slot is its own push"
        desk.all_weights(1)
        assert desk.computing() == [(0, 1), (1, 0)]
        assert pushes(desk.compute()) == [], "slot 1 of step 0 is not wanted any more"
        messages = desk.compute()
        assert [(m.step, m.first) for m in pushes(messages)] == [(1, 0)] * 3

    def test_it_stops_at_the_last_version(self) -> None:
        desk = Desk()
        desk.table(0)
        desk.all_weights(3)
        assert desk.compute()
        assert desk.all_weights(4) == []
        assert not desk.work
        assert desk.table(*range(8), number=2) == []
        assert not desk.work

    def test_a_pushed_gradient_keeps_its_memory_until_all_shards_have_answered(self) -> None:
        desk = Desk(quorum=5)
        desk.table(0, 1, 2)
        desk.all_weights(0)
        pushed = pushes(desk.compute(3))
        copies = [m.gradient.copy() for m in pushed]  # type: ignore[union-attr]
        desk.weights(0, 1)
        desk.weights(1, 1)
        desk.table(*range(8), number=2)
        desk.compute(5)
        assert all(np.array_equal(m.gradient, copy) for m, copy in zip(pushed, copies, strict=True))

    def test_memory_is_used_again_after_that(self) -> None:
        desk = Desk()
        desk.table(0, 1, 2, 3)
        seen = set()
        for version in range(4):
            desk.all_weights(version)
            while desk.work:
                seen.add(desk.work[0].out.data_ptr())
                desk.compute()
        assert len(seen) <= 3, "log2 of the slots and one"


class TestLeases:
    def granted(self, lease: int = 1, step: int = 0, slot: int = 0) -> tuple[Desk, list[Any]]:
        desk = Desk("bounded", staleness=4)
        assert desk.table() == [ev.LeaseRequested(1)]
        return desk, desk.give(ev.LeaseGranted(1, lease, step, slot))

    @staticmethod
    def answer(desk: Desk, shard: int, lease: int, outcome: str = "applied", staleness: int = 0) -> list[Any]:
        return desk.give(ev.PushAnswered(1, shard, lease, outcome, staleness), SHARDS[shard])

    def test_the_life_of_a_lease(self) -> None:
        desk, messages = self.granted(lease=7, step=2, slot=3)
        pulls, requested = messages[:3], messages[3:]
        assert {(p.lease, p.step, p.slot) for p in pulls} == {(7, 2, 3)}
        assert requested == [ev.LeaseRequested(1)], "the next one is fetched ahead"
        for shard, version in enumerate((5, 6, 4)):
            desk.weights(shard, version, lease=7)
        assert desk.computing() == [(2, 3)]
        pushed = pushes(desk.compute())
        assert [(p.version, p.lease, p.first, p.stop) for p in pushed] == [(5, 7, 3, 4), (6, 7, 3, 4), (4, 7, 3, 4)]
        assert self.answer(desk, 0, 7, staleness=1) == []
        assert self.answer(desk, 2, 7, staleness=3) == []
        (ended,) = self.answer(desk, 1, 7, staleness=2)
        assert (ended.lease, ended.step, ended.slot, ended.outcome) == (7, 2, 3, "applied")
        assert ended.staleness == (1, 2, 3)
        assert ended.stats.samples == BATCH // SLOTS

    def test_one_lease_at_a_time_the_next_begins_when_it_ends(self) -> None:
        desk, _ = self.granted(lease=1)
        assert desk.give(ev.LeaseGranted(1, 2, 0, 1)) == []
        desk.all_weights(0, lease=1)
        desk.compute()
        messages = [m for shard in range(3) for m in self.answer(desk, shard, 1)]
        assert isinstance(messages[0], ev.LeaseEnded)
        assert {m.lease for m in messages[1:4]} == {2}
        assert messages[4] == ev.LeaseRequested(1)

    def test_refused_at_the_pull_it_ends_at_once(self) -> None:
        """What other shards sent or will send for it has no effect."""
        desk, _ = self.granted(lease=1)
        desk.give(ev.LeaseGranted(1, 2, 0, 1))
        desk.weights(0, 0, lease=1)
        ended, *pulls = self.answer(desk, 1, 1, "gone")
        assert (ended.lease, ended.outcome) == (1, "gone")
        assert {m.lease for m in pulls[:3]} == {2}
        assert desk.weights(2, 0, lease=1) == []
        assert not desk.work

    def test_refused_while_it_computes_the_slot_is_thrown_away(self) -> None:
        desk, _ = self.granted(lease=1)
        desk.all_weights(0, lease=1)
        (ended,) = self.answer(desk, 0, 1, "gone")
        assert ended.outcome == "gone"
        assert desk.compute() == []

    def test_refused_at_the_push_it_ends_as_gone_once_all_have_answered(self) -> None:
        desk, _ = self.granted(lease=1)
        desk.all_weights(0, lease=1)
        desk.compute()
        assert self.answer(desk, 0, 1, "gone") == []
        assert self.answer(desk, 1, 1) == []
        (ended,) = self.answer(desk, 2, 1, "covered")
        assert ended.outcome == "gone"

    def test_covered_on_a_shard_counts_as_applied(self) -> None:
        desk, _ = self.granted(lease=1)
        desk.all_weights(0, lease=1)
        desk.compute()
        messages = [
            m for i, what in enumerate(("covered", "applied", "covered")) for m in self.answer(desk, i, 1, what)
        ]
        assert [m.outcome for m in messages] == ["applied"]

    def test_a_new_membership_does_not_ask_again(self) -> None:
        desk, _ = self.granted()
        assert desk.table(number=2) == []


@pytest.mark.parametrize("mode", ["sync", "bounded"])
class TestEnds:
    def test_fenced(self, mode: str) -> None:
        desk = Desk(mode)
        desk.give(ev.Fenced(1), SHARDS[0])
        assert "fenced" in desk.ended[0].why

    def test_fenced_by_a_timeline_that_it_was_left_behind_by(self, mode: str) -> None:
        desk = Desk(mode)
        desk.give(ev.Fenced(2), SHARDS[0])
        assert "fenced" in desk.ended[0].why

    def test_not_among_the_living(self, mode: str) -> None:
        desk = Desk(mode)
        desk.give(ev.MembershipChanged(1, 1, frozenset({0, *SHARDS, OTHER}), OTHER, ()))
        assert "fenced" in desk.ended[0].why
        assert desk.sent == []

    def test_told_to_stop(self, mode: str) -> None:
        desk = Desk(mode)
        desk.give(ev.Stop(1))
        assert "driver" in desk.ended[0].why

    def test_another_timeline_has_no_effect(self, mode: str) -> None:
        desk = Desk(mode)
        for event in (ev.Stop(2), ev.MembershipChanged(2, 9, frozenset({ME}), ME, (ME,) * SLOTS)):
            assert desk.give(event) == []
        assert not desk.ended

    def test_it_says_what_it_waits_for(self, mode: str) -> None:
        desk = Desk(mode)
        (status,) = desk.give(ev.StatusRequested(1))
        assert "waits for" in status.text


def test_another_model_than_the_drivers_is_refused_by_name() -> None:
    spec = spec_of(plan())
    other = Layout.of([("w", (SAMPLES + 1,))], "float32")
    with pytest.raises(RunFailed, match=r"\('w', \(257,\)\).*\('w', \(256,\)\)"):
        replace(spec, blueprint=replace(spec.blueprint, layout=other)).build(lambda: 0.0)


def test_other_data_than_the_drivers_is_refused_by_number() -> None:
    spec = spec_of(plan())
    with pytest.raises(RunFailed, match=r"train_data: expected the driver's 300 samples, found 256"):
        replace(spec, blueprint=replace(spec.blueprint, samples=300)).build(lambda: 0.0)


def test_other_columns_than_the_drivers_are_refused_by_type_and_shape() -> None:
    spec = spec_of(plan())
    other = {"data": {"dtype": "float32", "shape": [3]}}
    with pytest.raises(RunFailed, match=r"train_data: .*float32.*\[3\].* found .*int64"):
        replace(spec, blueprint=replace(spec.blueprint, schema=other)).build(lambda: 0.0)
