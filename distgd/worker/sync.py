"""A worker's turn in sync mode: a table of slots, one version for all shards.

A worker computes its slots of step t, adds them as subtrees, pushes one partial sum per maximal subtree, and goes on
when every shard has sent version t + 1. Where shards are on other machines, one worker of each machine adds for all of
them (`distgd.adder`); it is known from the membership, and when it is lost, its successor is given what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from distgd import events as ev
from distgd.adder import Adder
from distgd.gradients import Watch
from distgd.layout import tensor_of
from distgd.reduce import Node, Sum, Tree, maximal
from distgd.replica import SlotGradient
from distgd.worker.work import Computed, Reading, SlotWork, Work

Array = np.ndarray[Any, Any]


class Sync:
    """The table of slots, what is being computed by it, and what was pushed and is not yet answered."""

    def __init__(self, worker: Work) -> None:
        self.worker = worker
        self.slots, self.last, self.quorum = worker.rules.slots, worker.rules.last, worker.quorum
        self.shards = len(worker.rules.incarnations)
        self.step = -1  # the version that is installed
        self.table: tuple[int, ...] = ()
        self.read = Reading()
        self.round: list[int] = []  # slots of this step that are being computed now
        self.nodes: list[Node] = []  # what they are pushed as
        self.done: set[int] = set()  # slots of this step that are computed or in `round`
        self.results: dict[int, SlotGradient] = {}
        self.in_flight: list[tuple[ev.GradientArrived, Tensor | None]] = []  # pushed, not yet answered by all shards
        self.tree: Tree[Tensor] = Tree(self.slots, self._add)
        self.far: frozenset[int] = frozenset()  # shards that this machine's adder is asked for
        self.adds = -1  # who that is
        self.adder: Adder | None = None  # where it is this process
        self.examines: ev.Examine | None = None  # a slot that is computed for the driver alone
        self._parked: list[tuple[int, Any]] = []  # for the adder, from somebody who knows already that it is this one

    def describe(self) -> str:
        """What this worker does, in words."""
        if self.round:
            return f"computes slots {self.round} of step {self.step}"
        return f"waits for version {self.step + 1}; has { ({i: w.version for i, w in self.read.have.items()}) }"

    def membership(self, event: ev.MembershipChanged) -> list[ev.Effect]:
        """A new table: compute the extra slots of the current step. A new adder: give it what the former one had."""
        self.table = event.table
        effects = self._find_adder(event)
        return [*effects, *(self._ask(0) if self.step < 0 else self._next_round())]

    def _find_adder(self, event: ev.MembershipChanged) -> list[ev.Effect]:
        here, incarnations = event.beside(self.worker.me), self.worker.rules.incarnations
        far = frozenset(i for i, shard in enumerate(incarnations) if shard not in here)
        if not far or not self.worker.every_slot:
            return []
        former, self.far, self.adds = self.adds, far, event.adder(self.worker.me, incarnations)
        effects: list[ev.Effect] = []
        if self.adds == self.worker.me:
            if self.adder is None:
                self.adder = Adder(
                    self.worker.rules, self.adds, self.worker.slices, self.worker.layout.dtype, self.worker.allocate
                )
            effects += self.adder.membership(event)
            for index in far & self.read.have.keys():
                self.adder.adopt(self.read.have[index])
        if former not in (-1, self.adds):
            for index in far:
                self.read.asked.pop(index, None)
            effects += self._ask(self.step + 1) if self.step < self.last else []
            effects += [e for push, total in self.in_flight for e in self._give(replace(push, reads=-1), total)]
        parked, self._parked = self._parked, []
        return [*effects, *(e for source, message in parked for e in self.handle(source, message))]

    def watch(self, work: SlotWork, emit: Callable[[ev.Effect], None]) -> Watch | None:
        """Let the adder, if it is here, have each bucket of a slot that is pushed by itself as soon as it is final."""
        alone = (work.slot, work.slot + 1) in self.nodes and work.slot in self.round
        if self.adder is None or not alone:
            return None
        adder, places = self.adder, self.adder.places

        def final(number: int) -> None:
            first, stop = adder.span(places[number])
            for effect in adder.part(work.step, work.slot, places[number], work.out[first:stop]):
                emit(effect)

        return Watch([adder.span(place) for place in places], final)

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        """Weights of a version, a slot that is done, or something for the adder."""
        match event:
            case ev.WeightsSent() if event.parts:
                return self._closed(event)
            case ev.WeightsSent():
                return self._weights(event)
            case ev.WeightsPart():
                if self.adder is not None:
                    self.adder.weights_part(event)
                return []
            case ev.GradientArrived() | ev.PullRequested() if self.adder is None:
                self._parked.append((source, event))
                return []
            case ev.GradientArrived():
                assert self.adder is not None
                total = None if event.gradient is None else tensor_of(event.gradient)
                return self.adder.push(source, event, total)
            case ev.PullRequested():
                assert self.adder is not None
                return self.adder.pull(source, event)
            case Computed() if self.worker.wanted(event):
                return self._computed(event)
            case ev.Examine() if event.step >= self.step:
                self.examines = event
                return self._examine()
            case _:
                return []

    def place(self, part: ev.WeightsPart) -> Array | None:
        """Where the adder, if it is here, wants a bucket of weights."""
        wanted = self.adder is not None and part.timeline == self.worker.rules.timeline
        return self.adder.place(part) if self.adder is not None and wanted else None

    # Reading.

    def _ask(self, version: int) -> list[ev.Effect]:
        """Ask those shards for `version` that have neither sent nor been asked for it."""
        incarnations = self.worker.rules.incarnations
        missing = [i for i in range(self.shards) if max(self._known(i), self.read.asked.get(i, -1)) < version]
        self.read.asked |= dict.fromkeys(missing, version)
        pull = self.worker.pull(version)
        near: list[ev.Effect] = [ev.Send(incarnations[i], pull) for i in missing if i not in self.far]
        if self.far.isdisjoint(missing):
            return near
        return [*near, *(self.adder.ask(pull) if self.adder is not None else [ev.Send(self.adds, pull)])]

    def _known(self, index: int) -> int:
        return self.read.have[index].version if index in self.read.have else -1

    def _closed(self, sent: ev.WeightsSent) -> list[ev.Effect]:
        if self.adder is None:
            return []
        effects, whole = self.adder.weights(sent)
        return effects if whole is None else [*effects, *self._weights(whole)]

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
        self.worker.release(*(total for _, total in self.in_flight if total is not None))
        self.step, self.round, self.done, self.results, self.in_flight = version, [], set(), {}, []
        self.tree = Tree(self.slots, self._add)
        if version >= self.last:
            return []
        follow = [*self._next_round(), *self._examine()]
        return [*([] if self.asks_with_push else self._ask(version + 1)), *follow]

    @property
    def asks_with_push(self) -> bool:
        """Whether the next version is asked for by this step's pushes: it cannot exist before they arrive."""
        return bool(self.round) and self.quorum == self.slots

    # Computing.

    def _next_round(self) -> list[ev.Effect]:
        own = self.worker.me
        if self.round or self.step < 0 or self.step >= self.last:
            return []
        self.round = [k for k, worker in enumerate(self.table) if worker == own and k not in self.done]
        self.nodes = maximal(self.round, self.slots) if self.quorum == self.slots else [(k, k + 1) for k in self.round]
        self.done.update(self.round)
        return [self.worker.compute(self.step, self.round[0])] if self.round else []

    def _examine(self) -> list[ev.Effect]:
        """Begin on a slot for the driver, once its step is here."""
        wanted = self.examines
        return [self.worker.compute(wanted.step, wanted.slot)] if wanted and wanted.step == self.step else []

    def _computed(self, done: Computed) -> list[ev.Effect]:
        slot = done.work.slot
        if slot not in self.round:
            self.worker.release(done.work.out)
            examined = ev.Examined(self.worker.rules.timeline, done.work.step, done.gradient.bad, done.gradient.stats)
            return [ev.Send(ev.DRIVER, examined)]
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
        push = ev.GradientArrived(
            self.worker.rules.timeline,
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
            {self.worker.me: self.worker.take_times(sum(r.stats.seconds for r in results))},
            self.worker.buffers_version if self.asks_with_push else -1,
        )
        if push.reads >= 0:
            self.read.asked = dict.fromkeys(range(self.shards), self.step + 1)
        self.in_flight.append((push, part.value))
        near = self.worker.push(push, part.value, dict.fromkeys(range(self.shards), self.step), self.far)
        return [*near, *(self._give(push, part.value) if self.far else [])]

    def _give(self, push: ev.GradientArrived, total: Tensor | None) -> list[ev.Effect]:
        """A push for the shards on other machines: to the adder."""
        if 0 not in self.far:
            push = push.without_facts()
        if self.adder is not None:
            return self.adder.push(self.worker.me, push, total)
        return [ev.Send(self.adds, push if total is None else replace(push, gradient=total.numpy()))]

    def _add(self, left: Sum[Tensor], right: Sum[Tensor]) -> Sum[Tensor]:
        assert left.value is not None and right.value is not None
        left.value.add_(right.value)
        self.worker.release(right.value)
        return Sum(left.value, 0.0, True)
