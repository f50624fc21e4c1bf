"""A worker: computes the gradients of slots and pushes them. `handle(source, event) -> [effect]`.

Workers drive themselves between commit points. In sync mode a table of slots says who computes what; in bounded and
async mode a worker asks the driver for leases, one ahead.

What takes time is an effect: `Compute(SlotWork)`, done by `perform`, whose answer comes back through `handle`. A worker
keeps nothing that cannot be computed again. It rewrites no gradient that it pushed before all shards have answered.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from distgd import canary
from distgd import events as ev
from distgd.config import Data, TaskSection
from distgd.device import be_deterministic
from distgd.errors import BadInput
from distgd.layout import Slice
from distgd.replica import Blueprint, Replica, SlotGradient
from distgd.rules import ShardRules
from distgd.sources import Order
from distgd.tasks import Task, load
from distgd.transport.segments import Allocate, Recycled
from distgd.worker.leased import Leased
from distgd.worker.sync import Sync
from distgd.worker.work import Computed, SlotWork, Work

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
    """All that a worker is made of. `clip` limits the norm of a slot's mean gradient.

    `canary` says that it is to show what its arithmetic comes to, `deterministic` that torch is to be so (CUDA).
    """

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
    canary: bool = False
    deterministic: bool = False

    role = "worker"

    def build(self, clock: Callable[[], float], allocate: Allocate = np.zeros) -> Worker:
        """Build model and data, and check that they are those of the driver.

        Raises:
            RunFailed: names, shapes or lengths differ from the driver's.
        """
        if self.deterministic:
            be_deterministic()
        torch.set_num_threads(self.threads)
        if self.device == "cuda" and not torch.cuda.is_available():
            do = "set cluster.gpus=1 so that Ray finds one, or cluster.device=cpu cluster.gpus=0"
            raise BadInput.at("cluster.device", "a CUDA GPU for every worker", f"none on {platform.node()}", do)
        replica = Replica(self.task.load(), self.seed, self.device, self.frozen, self.clip)
        source = replica.train_source()
        self.blueprint.check(replica.blueprint(source), "train_data")
        return Worker(self, replica, source, clock, allocate)


class Worker:
    """The state machine; `perform` computes a slot."""

    def __init__(
        self, spec: WorkerSpec, replica: Replica, source: Any, clock: Callable[[], float], allocate: Allocate
    ) -> None:
        self.replica = replica
        self._source = source
        self._clock, self._allocate = clock, Recycled(allocate)
        self._begin(spec, token=0)

    def _begin(self, spec: WorkerSpec, token: int) -> None:
        """Be as a process that was born with the timeline of `spec`; model and data stay."""
        self.spec, self._timeline, self._members = spec, spec.rules.timeline, -1
        layout = spec.blueprint.layout
        self._allocate.begin()
        self.work = Work(
            spec.rules, spec.incarnation, spec.slices, layout, spec.quorum, self.replica, self._clock, self._allocate
        )
        self.work.token = token
        self._mode: Sync | Leased = Sync(self.work) if spec.rules.staged else Leased(self.work)

    def facts(self) -> dict[str, str]:
        """The canary and the machine's kind, where they are asked for; taken behind whatever the task has set."""
        return canary.of_worker(self.spec.device, self.spec.threads) if self.spec.canary else {}

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        """Take one message, or a `Computed` of this process itself."""
        if isinstance(event, ev.TimelineBegun) and event.timeline > self._timeline:
            rules = replace(self.spec.rules, timeline=event.timeline, incarnations=event.shards)
            self._begin(replace(self.spec, rules=rules), self.work.token + 1)
            self.work.buffers_version = -1  # those that are here may be newer than the checkpoint
            return []
        if isinstance(event, ev.Fenced):
            return [ev.End("fenced: replaced by another")]
        if event.timeline != self._timeline:
            return []
        match event:
            case ev.Stop():
                return [ev.End("stopped by the driver")]
            case ev.StatusRequested():
                return [ev.Send(source, ev.StatusSent(self._timeline, self._mode.describe()))]
            case ev.MembershipChanged() if event.number > self._members:
                self._members = event.number
                if self.spec.incarnation not in event.live:
                    return [ev.End("fenced: replaced by another")]
                return self._mode.membership(event) if event.places(self.spec.incarnation) else []
            case ev.MembershipChanged():
                return []
            case Computed():
                stats = replace(event.gradient.stats, seconds=event.seconds, worker=self.spec.incarnation)
                return self._mode.handle(source, replace(event, gradient=replace(event.gradient, stats=stats)))
            case _:
                return self._mode.handle(source, event)

    def place(self, message: Any) -> Array | None:
        """Where a message's array belongs before it is handled: weights from another machine, at their places."""
        if isinstance(self._mode, Sync) and isinstance(message, ev.WeightsPart):
            return self._mode.place(message)
        return None

    def perform(self, work: SlotWork, emit: Callable[[ev.Effect], None]) -> Computed:
        """Compute one slot, unless it has been abandoned meanwhile; `emit` performs what cannot wait for its end."""
        if work.token != self.work.token:
            return Computed(work, SlotGradient.empty(work.slot))
        try:
            gradient = self.replica.gradient(
                self._source, self.spec.order, work.step, work.slot, work.out, self._mode.watch(work, emit)
            )
        except Exception as error:
            error.add_note(f"while slot {work.slot} of step {work.step} was computed")
            raise
        return Computed(work, gradient)
