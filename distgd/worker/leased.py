"""A worker's turn in bounded and async mode: a slot at a time under the driver's lease, the next fetched ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distgd import events as ev
from distgd.gradients import Watch
from distgd.worker.work import Computed, Reading, SlotWork, Work


class Leased:
    """One slot at a time under a lease of the driver, the next one fetched ahead."""

    def __init__(self, worker: Work) -> None:
        self.worker = worker
        self.timeline = worker.rules.timeline
        self.shards = len(worker.rules.incarnations)
        self.started = False
        self.lease: ev.LeaseGranted | None = None
        self.ahead: ev.LeaseGranted | None = None
        self._clear()

    def _clear(self) -> None:
        self.lease = None
        self.read = Reading()
        self.computed: Computed | None = None
        self.answers: dict[int, ev.PushAnswered] = {}

    def describe(self) -> str:
        """What this worker does, in words."""
        if self.lease is None:
            return "waits for a lease"
        what = f"slot {self.lease.slot} of step {self.lease.step}"
        if self.computed:
            return f"waits for answers to {what}; answered: shards {sorted(self.answers)}"
        return f"reads for or computes {what}; read: shards {sorted(self.read.have)}"

    def membership(self, event: ev.MembershipChanged) -> list[ev.Effect]:
        """The first one starts the work."""
        if self.started:
            return []
        self.started = True
        return [ev.Send(ev.DRIVER, ev.LeaseRequested(self.timeline))]

    def watch(self, work: SlotWork, emit: Callable[[ev.Effect], None]) -> Watch | None:
        """Nothing leaves before a slot is done: its norm may have to be known."""
        return None

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        """A lease, weights for it, a slot that is done, a shard's answer."""
        match event:
            case ev.LeaseGranted() if self.lease is None:
                return self._begin(event)
            case ev.LeaseGranted():
                self.ahead = event
                return []
            case ev.WeightsSent() if self.lease and event.lease == self.lease.lease:
                return self._weights(event)
            case ev.PushAnswered() if self.lease and event.lease == self.lease.lease:
                return self._answered(event)
            case Computed() if self.worker.wanted(event):
                return self._computed(event)
            case _:
                return []

    def _begin(self, lease: ev.LeaseGranted) -> list[ev.Effect]:
        self._clear()
        self.lease = lease
        pulls = self.worker.to_shards(self.worker.pull(0, lease.lease, lease.step, lease.slot))
        return [*pulls, ev.Send(ev.DRIVER, ev.LeaseRequested(self.timeline))]

    def _weights(self, sent: ev.WeightsSent) -> list[ev.Effect]:
        assert self.lease is not None
        if sent.shard in self.read.have:
            return []
        self.read.have[sent.shard] = sent
        if len(self.read.have) < self.shards:
            return []
        if self.lease.skip:
            return self._skip(self.lease)
        self.worker.install(self.read.have)
        return [self.worker.compute(self.lease.step, self.lease.slot)]

    def _skip(self, lease: ev.LeaseGranted) -> list[ev.Effect]:
        """Have every shard count the slot, and change nothing."""
        read = {i: w.version for i, w in self.read.have.items()}
        push = ev.GradientArrived(
            self.timeline,
            lease.step,
            0,
            lease.slot,
            lease.slot + 1,
            0,
            0.0,
            (lease.slot,),
            lease.lease,
            None,
            None,
            versions=tuple(read[i] for i in range(self.shards)),
        )
        return self.worker.push(push, None, read)

    def _computed(self, done: Computed) -> list[ev.Effect]:
        assert self.lease is not None
        self.computed = done
        if self._poisoned():  # judged once, over the whole gradient, before any shard has it
            return self._finish()
        slot, stats = done.work.slot, done.gradient.stats
        push = ev.GradientArrived(
            self.timeline,
            done.work.step,
            0,
            slot,
            slot + 1,
            0,
            stats.weight,
            (),
            self.lease.lease,
            None,
            done.gradient.buffers if slot == 0 else None,
            versions=tuple(self.read.have[i].version for i in range(self.shards)),
            square=stats.squared_norm,
        )
        total = done.work.out if stats.weight else None
        return self.worker.push(push, total, {i: w.version for i, w in self.read.have.items()})

    def _poisoned(self) -> bool:
        if self.lease is None or self.computed is None:
            return False
        gradient = self.computed.gradient
        return gradient.bad or gradient.stats.squared_norm > self.lease.limit

    def _answered(self, answer: ev.PushAnswered) -> list[ev.Effect]:
        self.answers[answer.shard] = answer
        assert self.lease is not None
        refused = self.computed is None and not self.lease.skip and answer.outcome == "gone"
        return self._finish() if refused or len(self.answers) == self.shards else []

    def _finish(self) -> list[ev.Effect]:
        lease, done = self.lease, self.computed
        assert lease is not None
        gone = any(a.outcome == "gone" for a in self.answers.values())
        poisoned = self._poisoned()
        stats = done.gradient.stats if done else ev.SlotStats(lease.slot, 0, 0.0, 0.0, 0.0, 0.0)
        ended = ev.LeaseEnded(
            self.timeline,
            lease.lease,
            lease.step,
            lease.slot,
            "poisoned" if poisoned else "gone" if gone else "applied",
            (done is not None and done.gradient.bad) or lease.skip,
            tuple(self.answers[i].staleness for i in sorted(self.answers)),
            stats,
            {
                **self.worker.take_times(stats.seconds),
                "apply": max((a.seconds for a in self.answers.values()), default=0.0),
            },
        )
        if done:
            self.worker.release(done.work.out)
        else:
            self.worker.abandon()
        self._clear()
        ahead, self.ahead = self.ahead, None
        return [ev.Send(ev.DRIVER, ended), *(self._begin(ahead) if ahead else [])]
