"""A worker's memory and messages, whatever the mode: what is computed, into what, what is read and what is pushed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distgd import events as ev
from distgd.layout import Layout, Slice
from distgd.replica import Replica, SlotGradient
from distgd.rules import ShardRules
from distgd.transport.segments import Allocate


@dataclass(frozen=True, slots=True)
class SlotWork:
    """One slot to compute, into `out`; `token` tells whether it is still wanted when it is done.

    `out` is memory of its timeline: a later one may be using it for something else.
    """

    timeline: int
    token: int
    step: int
    slot: int
    out: Tensor


@dataclass(frozen=True, slots=True)
class Computed:
    """A slot is done; the host that performed it fills in the `seconds` that it took."""

    work: SlotWork
    gradient: SlotGradient
    seconds: float = 0.0

    @property
    def timeline(self) -> int:
        """In which it was begun."""
        return self.work.timeline


@dataclass
class Reading:
    """What the shards have sent towards one version (sync) or one lease."""

    have: dict[int, ev.WeightsSent] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)


class Work:
    """What both modes need.

    Args:
        me: the worker's incarnation.
        slices: every shard's part of the flat vector.
        quorum: slots that are enough for a step (sync).
    """

    def __init__(
        self,
        rules: ShardRules,
        me: int,
        slices: tuple[Slice, ...],
        layout: Layout,
        quorum: int,
        replica: Replica,
        clock: Callable[[], float],
        allocate: Allocate,
    ) -> None:
        self.rules, self.me, self.slices, self.layout, self.quorum = rules, me, slices, layout, quorum
        self.allocate = allocate
        self.buffers_version = 0
        self.token = 0
        self._replica = replica
        self._clock = clock
        self._pool: list[Tensor] = []
        self._times: dict[str, float] = {}
        self._pushed_at = 0.0

    def to_shards(self, message: ev.PullRequested) -> list[ev.Effect]:
        """The same message to every shard."""
        return [ev.Send(shard, message) for shard in self.rules.incarnations]

    def pull(self, at_least: int, lease: int = -1, step: int = -1, slot: int = -1) -> ev.PullRequested:
        """A request for weights, saying which buffers are here already."""
        return ev.PullRequested(self.rules.timeline, at_least, self.buffers_version, lease, step, slot)

    @property
    def every_slot(self) -> bool:
        """Whether a step needs every slot, so that nobody computes while shards apply."""
        return self.rules.staged and self.quorum == self.rules.slots

    def install(self, have: dict[int, ev.WeightsSent]) -> None:
        """Make every shard's slice the replica's, and newer buffers.

        Where a step needs every slot nobody computes while shards apply, so that the shards' own memory may be read.
        """
        began = self._clock()
        self._times["wait"] = began - self._pushed_at if self._pushed_at else 0.0
        weights = {shard: sent.weights for shard, sent in have.items() if sent.weights is not None}
        self._replica.install(self.slices, weights, have[0].buffers, shared=self.every_slot)
        self.buffers_version = max(self.buffers_version, have[0].buffers_version)
        self._times["pull"] = self._clock() - began

    def compute(self, step: int, slot: int) -> ev.Compute:
        """Start on a slot."""
        out = self._pool.pop() if self._pool else torch.from_numpy(self.allocate(self.layout.size, self.layout.dtype))
        return ev.Compute(SlotWork(self.rules.timeline, self.token, step, slot, out))

    def abandon(self) -> None:
        """Whatever is being computed is not wanted any more."""
        self.token += 1

    def wanted(self, done: Computed) -> bool:
        """Whether a slot that is done is still wanted; if not, its memory is used again."""
        if done.work.token == self.token:
            return True
        self.release(done.work.out)
        return False

    def release(self, *buffers: Tensor) -> None:
        """Gradient buffers that nobody reads any more."""
        self._pool.extend(buffers)

    def push(
        self,
        push: ev.GradientArrived,
        total: Tensor | None,
        versions: dict[int, int],
        far: frozenset[int] = frozenset(),
    ) -> list[ev.Effect]:
        """Slice `total` for the shards; stats, times and buffers go to shard 0 alone.

        Args:
            versions: what was read, by shard.
            far: shards that get it another way.
        """
        began = self._clock()
        effects: list[ev.Effect] = []
        for part in self.slices:
            if part.index in far:
                continue
            gradient = None if total is None else total[part.start : part.stop].numpy()
            own = replace(push, version=versions[part.index], gradient=gradient)
            effects.append(
                ev.Send(self.rules.incarnations[part.index], own if part.index == 0 else own.without_facts())
            )
        self._pushed_at = self._clock()
        self._times["push"] = self._times.get("push", 0.0) + self._pushed_at - began
        return effects

    def take_times(self, compute: float) -> dict[str, float]:
        """Seconds by phase since the last push: this step's compute, the former's push, wait and pull."""
        times, self._times = {"compute": compute, **self._times}, {}
        return times
