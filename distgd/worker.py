"""A worker: computes the gradients of slots and pushes them. `handle(source, event) -> [effect]`.

Workers drive themselves between commit points. In sync mode a table of slots says who computes what; a worker computes
its slots of step t, adds them as subtrees, pushes one partial sum per maximal subtree, and goes on when every shard has
sent version t + 1. In bounded and async mode it asks the driver for leases, one ahead.

What takes time is an effect: `Compute(SlotWork)`, done by `perform`, whose answer comes back through `handle`. A worker
keeps nothing that cannot be computed again. It rewrites no gradient that it pushed before all shards have answered.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distgd import events as ev
from distgd.config import Data, TaskSection
from distgd.errors import BadInput
from distgd.layout import Slice
from distgd.reduce import Node, Sum, Tree, maximal
from distgd.replica import Blueprint, Replica, SlotGradient
from distgd.shard import ShardRules
from distgd.sources import Order
from distgd.tasks import Task, load
from distgd.transport.segments import Allocate

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TaskSource:
    """Where a process takes the task from: the config's words, or an object given in Python."""

    section: TaskSection
    data: Data
    given: Task | None = None

    def load(self) -> Task:
        """The task itself, built anew in each process where it is named by the config."""
        return self.given if self.given is not None else load(self.section, self.data)


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker is made of. `clip` limits the norm of a slot's mean gradient."""

    rules: ShardRules
    incarnation: int
    slices: tuple[Slice, ...]
    blueprint: Blueprint
    task: TaskSource
    order: Order
    seed: int
    frozen: dict[str, Array]
    clip: float | None
    device: str
    threads: int
    quorum: int

    role = "worker"

    def build(self, clock: Callable[[], float], allocate: Allocate = np.zeros) -> Worker:
        """Build model and data, and check that they are those of the driver.

        Raises:
            RunFailed: names, shapes or lengths differ from the driver's.
        """
        torch.set_num_threads(self.threads)
        if self.device == "cuda" and not torch.cuda.is_available():
            do = "set cluster.gpus=1 so that Ray finds one, or cluster.device=cpu cluster.gpus=0"
            raise BadInput.at("cluster.device", "a CUDA GPU for every worker", f"none on {platform.node()}", do)
        replica = Replica(self.task.load(), self.seed, self.device, self.frozen, self.clip)
        source = replica.train_source()
        self.blueprint.check(replica.blueprint(source), "train_data")
        return Worker(self, replica, source, clock, allocate)


@dataclass(frozen=True, slots=True)
class SlotWork:
    """One slot to compute, into `out`; `token` tells whether it is still wanted when it is done."""

    token: int
    step: int
    slot: int
    out: Tensor


@dataclass(frozen=True, slots=True)
class Computed:
    """A slot is done; the host that performed it fills in the `seconds` that it took."""

    timeline: int
    work: SlotWork
    gradient: SlotGradient
    seconds: float = 0.0


@dataclass
class Reading:
    """What the shards have sent towards one version (sync) or one lease."""

    have: dict[int, ev.WeightsSent] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)


class Worker:
    """The state machine; `perform` computes a slot."""

    def __init__(
        self, spec: WorkerSpec, replica: Replica, source: Any, clock: Callable[[], float], allocate: Allocate
    ) -> None:
        self.spec = spec
        self._allocate = allocate
        self.replica = replica
        self._source = source
        self._clock = clock
        self._timeline = spec.rules.timeline
        self._shards = spec.rules.incarnations
        self._members = -1
        self.buffers_version = 0
        self._pool: list[Tensor] = []
        self._token = 0
        self._times: dict[str, float] = {}
        self._pushed_at = 0.0
        self._mode: _Sync | _Leased = _Sync(self) if spec.rules.staged else _Leased(self)

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        """Take one message, or a `Computed` of this process itself."""
        if event.timeline != self._timeline:
            return []
        match event:
            case ev.Stop() | ev.Fenced():
                return [
                    ev.End("stopped by the driver" if isinstance(event, ev.Stop) else "fenced: replaced by another")
                ]
            case ev.StatusRequested():
                return [ev.Send(source, ev.StatusSent(self._timeline, self._mode.describe()))]
            case ev.MembershipChanged() if event.number > self._members:
                self._members = event.number
                if self.spec.incarnation not in event.live:
                    return [ev.End("fenced: replaced by another")]
                return self._mode.membership(event)
            case Computed():
                stats = replace(event.gradient.stats, seconds=event.seconds)
                return self._mode.handle(replace(event, gradient=replace(event.gradient, stats=stats)))
            case ev.WeightsSent() | ev.PushAnswered() | ev.LeaseGranted():
                return self._mode.handle(event)
            case _:
                return []

    def perform(self, work: SlotWork) -> Computed:
        """Compute one slot, unless it has been abandoned meanwhile."""
        if work.token != self._token:
            return Computed(self._timeline, work, SlotGradient.empty(work.slot))
        try:
            gradient = self.replica.gradient(self._source, self.spec.order, work.step, work.slot, work.out)
        except Exception as error:
            error.add_note(f"while slot {work.slot} of step {work.step} was computed")
            raise
        return Computed(self._timeline, work, gradient)

    # What both modes need.

    def to_shards(self, message: Any) -> list[ev.Effect]:
        """The same message to every shard."""
        return [ev.Send(shard, message) for shard in self._shards]

    def pull(self, at_least: int, lease: int = -1, step: int = -1, slot: int = -1) -> ev.PullRequested:
        """A request for weights, saying which buffers are here already."""
        return ev.PullRequested(self._timeline, at_least, self.buffers_version, lease, step, slot)

    def install(self, have: dict[int, ev.WeightsSent]) -> None:
        """Make every shard's slice the replica's, and newer buffers.

        Where a step needs every slot nobody computes while shards apply, so that the shards' own memory may be read.
        """
        began = self._clock()
        self._times["wait"] = began - self._pushed_at if self._pushed_at else 0.0
        weights = {shard: sent.weights for shard, sent in have.items()}
        shared = self.spec.rules.staged and self.spec.quorum == self.spec.rules.slots
        self.replica.install(self.spec.slices, weights, have[0].buffers, shared=shared)
        self.buffers_version = max(self.buffers_version, have[0].buffers_version)
        self._times["pull"] = self._clock() - began

    def compute(self, step: int, slot: int) -> ev.Compute:
        """Start on a slot."""
        layout = self.spec.blueprint.layout
        out = self._pool.pop() if self._pool else torch.from_numpy(self._allocate(layout.size, layout.dtype))
        return ev.Compute(SlotWork(self._token, step, slot, out))

    def abandon(self) -> None:
        """Whatever is being computed is not wanted any more."""
        self._token += 1

    def wanted(self, done: Computed) -> bool:
        """Whether a slot that is done is still wanted; if not, its memory is used again."""
        if done.work.token == self._token:
            return True
        self.release(done.work.out)
        return False

    def release(self, *buffers: Tensor) -> None:
        """Gradient buffers that nobody reads any more."""
        self._pool.extend(buffers)

    def push(self, push: ev.GradientArrived, total: Tensor | None, versions: dict[int, int]) -> list[ev.Effect]:
        """Slice `total` for the shards; stats, times and buffers go to shard 0 alone."""
        began = self._clock()
        effects: list[ev.Effect] = []
        for part in self.spec.slices:
            gradient = None if total is None else total[part.start : part.stop].numpy()
            own = replace(push, version=versions[part.index], gradient=gradient)
            if part.index:
                own = replace(own, buffers=None, stats=(), times={})
            effects.append(ev.Send(self._shards[part.index], own))
        self._pushed_at = self._clock()
        self._times["push"] = self._times.get("push", 0.0) + self._pushed_at - began
        return effects

    def take_times(self, compute: float) -> dict[str, float]:
        """Seconds by phase since the last push: this step's compute, the former's push, wait and pull."""
        times, self._times = {"compute": compute, **self._times}, {}
        return times


class _Sync:
    """A table of slots, one version for all shards."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        spec = worker.spec
        self.slots, self.last, self.quorum = spec.rules.slots, spec.rules.last, spec.quorum
        self.shards = len(spec.rules.incarnations)
        self.step = -1  # the version that is installed
        self.table: tuple[int, ...] = ()
        self.read = Reading()
        self.round: list[int] = []  # slots of this step that are being computed now
        self.done: set[int] = set()  # slots of this step that are computed or in `round`
        self.results: dict[int, SlotGradient] = {}
        self.in_flight: list[Tensor] = []  # pushed, not yet answered by all shards
        self.tree: Tree[Tensor] = Tree(self.slots, self._add)

    def describe(self) -> str:
        """What this worker does, in words."""
        if self.round:
            return f"computes slots {self.round} of step {self.step}"
        return f"waits for version {self.step + 1}; has { ({i: w.version for i, w in self.read.have.items()}) }"

    def membership(self, event: ev.MembershipChanged) -> list[ev.Effect]:
        """A new table: compute the extra slots of the current step."""
        self.table = event.table
        return self._ask(0) if self.step < 0 else self._next_round()

    def handle(self, event: Any) -> list[ev.Effect]:
        """Weights of a version, or a slot that is done."""
        match event:
            case ev.WeightsSent():
                return self._weights(event)
            case Computed() if self.worker.wanted(event):
                return self._computed(event)
            case _:
                return []

    def _ask(self, version: int) -> list[ev.Effect]:
        """Ask those shards for `version` that have neither sent nor been asked for it."""
        effects: list[ev.Effect] = []
        for index, shard in enumerate(self.worker.spec.rules.incarnations):
            known = self.read.have[index].version if index in self.read.have else -1
            if max(known, self.read.asked.get(index, -1)) < version:
                self.read.asked[index] = version
                effects.append(ev.Send(shard, self.worker.pull(version)))
        return effects

    def _weights(self, sent: ev.WeightsSent) -> list[ev.Effect]:
        before = self.read.have.get(sent.shard)
        if before is None or sent.version > before.version:
            self.read.have[sent.shard] = sent
        versions = {w.version for w in self.read.have.values()}
        if len(self.read.have) < self.shards or max(versions) <= self.step:
            return []
        if len(versions) > 1:  # a quorum went on without this worker: ask the others for the highest seen
            return self._ask(max(versions))
        return self._install(max(versions))

    def _install(self, version: int) -> list[ev.Effect]:
        self.worker.install(self.read.have)
        self.worker.abandon()
        self.worker.release(*self.in_flight)
        self.step, self.round, self.done, self.results, self.in_flight = version, [], set(), {}, []
        self.tree = Tree(self.slots, self._add)
        if version >= self.last:
            return []
        follow = self._next_round()
        return [*([] if self.asks_with_push else self._ask(version + 1)), *follow]

    @property
    def asks_with_push(self) -> bool:
        """Whether the next version is asked for by this step's pushes: it cannot exist before they arrive."""
        return bool(self.round) and self.quorum == self.slots

    def _next_round(self) -> list[ev.Effect]:
        own = self.worker.spec.incarnation
        if self.round or self.step < 0 or self.step >= self.last:
            return []
        self.round = [k for k, worker in enumerate(self.table) if worker == own and k not in self.done]
        self.nodes = maximal(self.round, self.slots) if self.quorum == self.slots else [(k, k + 1) for k in self.round]
        self.done.update(self.round)
        return [self.worker.compute(self.step, self.round[0])] if self.round else []

    def _computed(self, done: Computed) -> list[ev.Effect]:
        slot = done.work.slot
        self.results[slot] = done.gradient
        weight = done.gradient.stats.weight
        if weight == 0.0:
            self.worker.release(done.work.out)
        self.tree.put((slot, slot + 1), Sum(done.work.out if weight else None, weight, owned=True))
        effects = [e for node in self.nodes if node in self.tree for e in self._push(node)]
        self.round.remove(slot)
        follow = [self.worker.compute(self.step, self.round[0])] if self.round else self._next_round()
        return [*effects, *follow]

    def _push(self, node: Node) -> list[ev.Effect]:
        part = self.tree.pop(node)
        results = [self.results[k] for k in range(*node)]
        if part.value is not None:
            self.in_flight.append(part.value)
        push = ev.GradientArrived(
            self.worker.spec.rules.timeline,
            self.step,
            0,
            *node,
            self.step,
            part.weight,
            tuple(r.stats.slot for r in results if r.bad),
            -1,
            None,
            results[0].buffers if node[0] == 0 else None,
            tuple(r.stats for r in results),
            self.worker.take_times(sum(r.stats.seconds for r in results)),
            self.worker.buffers_version if self.asks_with_push else -1,
        )
        if push.reads >= 0:
            self.read.asked = dict.fromkeys(range(self.shards), self.step + 1)
        return self.worker.push(push, part.value, dict.fromkeys(range(self.shards), self.step))

    def _add(self, left: Sum[Tensor], right: Sum[Tensor]) -> Sum[Tensor]:
        assert left.value is not None and right.value is not None
        left.value.add_(right.value)
        self.worker.release(right.value)
        return Sum(left.value, 0.0, True)


class _Leased:
    """One slot at a time under a lease of the driver, the next one fetched ahead."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.timeline = worker.spec.rules.timeline
        self.shards = len(worker.spec.rules.incarnations)
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

    def handle(self, event: Any) -> list[ev.Effect]:
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
        self.worker.install(self.read.have)
        return [self.worker.compute(self.lease.step, self.lease.slot)]

    def _computed(self, done: Computed) -> list[ev.Effect]:
        assert self.lease is not None
        self.computed = done
        slot, stats = done.work.slot, done.gradient.stats
        push = ev.GradientArrived(
            self.timeline,
            done.work.step,
            0,
            slot,
            slot + 1,
            0,
            stats.weight,
            (slot,) if done.gradient.bad else (),
            self.lease.lease,
            None,
            done.gradient.buffers if slot == 0 else None,
        )
        total = done.work.out if stats.weight else None
        return self.worker.push(push, total, {i: w.version for i, w in self.read.have.items()})

    def _answered(self, answer: ev.PushAnswered) -> list[ev.Effect]:
        self.answers[answer.shard] = answer
        refused = self.computed is None and answer.outcome == "gone"
        return self._finish() if refused or len(self.answers) == self.shards else []

    def _finish(self) -> list[ev.Effect]:
        lease, done = self.lease, self.computed
        assert lease is not None
        gone = any(a.outcome == "gone" for a in self.answers.values())
        stats = done.gradient.stats if done else ev.SlotStats(lease.slot, 0, 0.0, 0.0, 0.0, 0.0)
        ended = ev.LeaseEnded(
            self.timeline,
            lease.lease,
            lease.step,
            lease.slot,
            "gone" if gone else "applied",
            bool(done and done.gradient.bad),
            tuple(self.answers[i].staleness for i in sorted(self.answers)),
            stats,
            {**self.worker.take_times(stats.seconds), "apply": max(a.seconds for a in self.answers.values())},
        )
        if done:
            self.worker.release(done.work.out)
        else:
            self.worker.abandon()
        self._clear()
        ahead, self.ahead = self.ahead, None
        return [ev.Send(ev.DRIVER, ended), *(self._begin(ahead) if ahead else [])]
