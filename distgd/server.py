"""The parameter server's actor: one shard behind `handle(source, event) -> [effect]`.

A plain class that knows no cluster; it builds its shard from a specification, times what it applies, answers status
requests and ends on `Stop`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from distgd import canary
from distgd import events as ev
from distgd.checkpoint import Checkpoints, Damaged, Restored, Writing
from distgd.device import Card, be_deterministic
from distgd.errors import BadInput, RunFailed
from distgd.layout import Layout, Slice, tensor_of
from distgd.mirror import MirroredOptimizer
from distgd.optim import OptimizerSpec, PieceOptimizer, Schedule
from distgd.policy import Immediate, Policy, Staged
from distgd.rules import ShardRules
from distgd.shard import Shard
from distgd.sources import Order
from distgd.transport.segments import Allocate, Recycled

BLOCK = 1 << 19
"""Elements stepped at once: few enough for the cache, and so many that the cost of torch's calls does not show."""
CARD_BLOCK = 1 << 22
"""Elements stepped at once on a card: so many that the cost of copies and kernels that are started does not show."""


@dataclass(frozen=True)
class ServerSpec:
    """All that a server is made of but for its weights, which the driver sends; `buffers` are shard 0's alone.

    `checkpoints` is the run's folder of them, or its URI, where it keeps any; `layout` says what elements a file has.
    `quorum` counts in sync mode, `staleness` in bounded mode; async is bounded mode with `staleness` None.
    `canary` says that it is to show what its arithmetic comes to, `deterministic` that torch is to be so (CUDA).
    """

    rules: ShardRules
    part: Slice
    dtype: str
    buffers: np.ndarray[Any, Any] | None
    optimizer: OptimizerSpec
    schedule: Schedule
    quorum: int
    staleness: int | None
    order: Order
    device: str = "cpu"
    layout: Layout = field(default_factory=lambda: Layout((), 0, "float32"))
    checkpoints: str | None = None
    canary: bool = False
    deterministic: bool = False

    role = "server"

    def build(self, clock: Callable[[], float], allocate: Allocate = np.zeros) -> Server:
        """Make the server, its weights to be in memory from `allocate`; one intra-op thread, as many share a machine.

        Raises:
            BadInput: it is to have a card, and there is none.
        """
        if self.deterministic:
            be_deterministic()
        torch.set_num_threads(1)
        if self.device == "cuda" and not torch.cuda.is_available():
            do = "set cluster.server_device=cpu cluster.server_gpus=0, or choose nodes with GPUs"
            raise BadInput.at("cluster.server_device", "a CUDA GPU for every server", f"none on {platform.node()}", do)
        return Server(self, clock, allocate)

    def stepper(self, weights: torch.Tensor) -> PieceOptimizer:
        """The optimizer of `weights`, [part.size] in host memory."""
        card = Card.of(torch.device(self.device))
        if card is not None:
            return MirroredOptimizer(self.optimizer, self.part, weights, card, block=CARD_BLOCK)
        pieces = [(p.name, weights[p.start : p.start + p.size]) for p in self.part.pieces]
        return PieceOptimizer(self.optimizer, pieces, block=BLOCK)

    def policy(self) -> Policy:
        """The rule of the run's mode."""
        if not self.rules.staged:
            return Immediate(bound=self.staleness, filled=self.order.filled)
        return Staged(
            slots=self.rules.slots,
            quorum=self.quorum,
            shards=len(self.rules.incarnations),
            measure=self.rules.clip is not None,
            filled=self.order.filled,
        )


class Server:
    """One shard as an actor."""

    def __init__(self, spec: ServerSpec, clock: Callable[[], float], allocate: Allocate) -> None:
        self.spec = spec
        self._allocate = Recycled(allocate)
        self._shard: Shard | None = None
        self._early: list[tuple[int, Any]] = []  # from workers that were quicker than the initial weights
        self._clock = clock
        self._timeline = spec.rules.timeline
        self._committed = clock()

    def facts(self) -> dict[str, str]:
        """The canary and the machine's kind, where they are asked for."""
        spec = self.spec
        return canary.of_server(spec.optimizer, getattr(torch, spec.dtype), spec.device) if spec.canary else {}

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        """Take one message; a committed step's report says how long this message took to apply."""
        match event:
            case ev.TimelineBegun() if event.timeline > self._timeline:
                self._begin(event)
                return []
            case ev.Stop():
                return [ev.End(f"stopped by the driver at version {self._shard.version if self._shard else 0}")]
            case ev.Fenced():
                return [ev.End("fenced: replaced by another")]
            case ev.StatusRequested():
                text = self._shard.describe() if self._shard else "waits for its initial weights"
                return [ev.Send(source, ev.StatusSent(self._timeline, text))]
            case ev.Load():
                loaded = self._load(event)
                early, self._early = self._early, []
                return [*loaded, *(effect for each in early for effect in self.handle(*each))]
            case ev.ShardWritten():  # by this process
                return [ev.Send(ev.DRIVER, event)]
        if self._shard is None:
            self._early.append((source, event))
            return []
        began = self._clock()
        effects = self._shard.handle(source, event)
        return [self._timed(effect, began) for effect in effects]

    def _begin(self, event: ev.TimelineBegun) -> None:
        """Be as a process that was born with this timeline: everything else is dropped."""
        rules = replace(self.spec.rules, timeline=event.timeline, incarnations=event.shards)
        self.spec = replace(self.spec, rules=rules)
        self._timeline, self._shard, self._early = event.timeline, None, []
        self._allocate.begin()

    def _load(self, load: ev.Load) -> list[ev.Effect]:
        """Take the weights, once, and write them down before they change."""
        if self._shard is not None or load.timeline != self._timeline:
            return []
        spec = self.spec
        weights = torch.from_numpy(self._allocate(spec.part.size, spec.dtype))
        found = self._found(load)
        initial = load.weights if found is None else found.state.weights
        assert initial is not None
        weights.copy_(tensor_of(initial))
        eager = spec.quorum == spec.rules.slots
        optimizer = spec.stepper(weights)
        buffers = spec.buffers if found is None else found.state.buffers
        shard = self._shard = Shard(
            spec.rules, spec.part, weights, buffers, optimizer, spec.policy(), spec.schedule, eager=eager
        )
        if found is not None:
            optimizer.load_state_dict(found.state.optimizer)
            shard.restore(found.version, found.buffers_version, found.applied, load.norms)
        loaded = ev.Send(ev.DRIVER, ev.Loaded(self._timeline, spec.part.index, shard.version))
        return [loaded] if spec.checkpoints is None else [loaded, self._written(shard.store(0, load.version))]

    def _found(self, load: ev.Load) -> Restored | None:
        """This shard's part of a checkpoint, if the run goes on from one."""
        if load.weights is not None:
            return None
        try:
            place, name = Checkpoints.of(load.checkpoint)
            return place.restore(name, self.spec.part, self.spec.layout)
        except Damaged as error:
            raise RunFailed(f"shard {self.spec.part.index}: the checkpoint cannot be read here: {error}") from error

    def _written(self, store: ev.Store) -> ev.Effect:
        spec = self.spec
        assert spec.checkpoints is not None
        me = spec.rules.incarnations[spec.part.index]
        return ev.Beside(Writing(store, spec.checkpoints, spec.layout, spec.part.index, me))

    def perform(self, work: Any, emit: Callable[[ev.Effect], None]) -> Any:
        """A server has no work that takes time apart from messages."""
        raise NotImplementedError(f"a server computes nothing, yet was given {work!r}")

    def _timed(self, effect: ev.Effect, began: float) -> ev.Effect:
        match effect:
            case ev.Update(effects):
                return ev.Update(self._timed(each, began) for each in effects)
            case ev.Store():
                return self._written(effect)
            case ev.Send(to, ev.StepCommitted() as message):
                now = self._clock()
                before, self._committed = self._committed, now
                return ev.Send(to, replace(message, apply_seconds=now - began, since=now - before))
            case ev.Send(to, ev.PushAnswered() as message):
                return ev.Send(to, replace(message, seconds=self._clock() - began))
            case _:
                return effect
