"""One worker of a machine adds the gradients of all of them, so that the machine sends once and receives once.

Only where shards are on other machines, and in sync mode with every slot required. The workers of a machine give their
pushes for these shards to the one that came first. It adds what the tree adds, so that no bit changes, and sends a
bucket as soon as every gradient in it is there: its own arrive while autograd is still at work. Weights come back
bucket by bucket into memory that the whole machine is shown.

It never writes to what it was given, and keeps nothing that cannot be made again: when it is lost, the others give
their pushes to its successor, and shards ignore what they have already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distgd import events as ev
from distgd.codecs import CODECS, ErrorFeedback, Exact
from distgd.layout import Slice, tensor_of
from distgd.reduce import Node, Sum, maximal, split
from distgd.rules import ShardRules
from distgd.staging import cuts
from distgd.transport.segments import Allocate

Array = np.ndarray[Any, Any]
Place = tuple[int, int, int]
"""A bucket: shard, first and one-past-last element in it."""


class Adder:
    """The state machine; its host is a worker of this machine.

    Args:
        me: that worker's incarnation.
        slices: every shard's part of the flat vector.
        dtype: the weights', as numpy names it.
        allocate: takes memory that this machine's processes can be shown.
    """

    def __init__(self, rules: ShardRules, me: int, slices: tuple[Slice, ...], dtype: str, allocate: Allocate) -> None:
        self._rules, self._me, self._slices = rules, me, slices
        self._dtype, self._allocate = dtype, allocate
        self._codec = CODECS[rules.dtype]()
        self._feedback = None if isinstance(self._codec, Exact) else ErrorFeedback(self._codec)
        self._live: frozenset[int] = frozenset()
        self._newest = -1
        self._readers: set[int] = set()  # who is told of weights
        self._slots: frozenset[int] = frozenset()  # this machine's, by the table
        self.far: tuple[int, ...] = ()  # the shards on other machines
        self.places: tuple[Place, ...] = ()
        self._free: list[Tensor] = []  # memory for sums of a bucket
        self._used: list[Tensor] = []
        self._asked: dict[int, int] = {}  # by shard, the version
        self._received: dict[int, Array] = {}  # by shard, its weights
        self._counted: dict[int, tuple[int, int]] = {}  # by shard, a version and how many parts of it are here
        self._have: dict[int, ev.WeightsSent] = {}  # by shard, the last version that is whole
        self._begin(-1)

    def _begin(self, step: int) -> None:
        """Every shard has answered the step before."""
        self.step = step
        self._held: dict[Place, dict[Node, Tensor | None]] = {place: {} for place in self.places}
        self._gone: dict[Node, set[Place]] = {}  # buckets that were sent, by the node that they were sent for
        self._pushes: dict[Node, ev.GradientArrived] = {}  # of members
        self._closed: list[Node] = []
        self._free += self._used
        self._used = []

    # Membership.

    def membership(self, event: ev.MembershipChanged) -> list[ev.Effect]:
        """Learn who is here, which slots are theirs, and which shards are elsewhere."""
        here = event.beside(self._me)
        self._live, self._newest = event.live, event.newest
        self._readers = (self._readers & event.live) | (here - set(self._rules.incarnations))
        self._slots = frozenset(k for k, worker in enumerate(event.table) if worker in here)
        self.far = tuple(i for i, shard in enumerate(self._rules.incarnations) if shard not in here)
        self.places = tuple(
            (i, start, stop) for i in self.far for start, stop in cuts(self._slices[i].size, self._rules.bucket)
        )
        for place in self.places:
            self._held.setdefault(place, {})
        for i in self.far:
            if i not in self._received:
                self._received[i] = self._allocate(self._slices[i].size, self._dtype)
        return self._send()

    def adopt(self, sent: ev.WeightsSent) -> None:
        """Have what the host was given by the adder before: a member that comes now may ask for it."""
        if sent.weights is None or sent.shard not in self._received or sent.version <= self._version(sent.shard):
            return
        self._received[sent.shard][:] = sent.weights
        self._have[sent.shard] = replace(sent, weights=self._received[sent.shard], parts=0)

    # Gradients.

    def span(self, place: Place) -> tuple[int, int]:
        """Where a bucket lies in the flat vector."""
        index, start, stop = place
        return self._slices[index].start + start, self._slices[index].start + stop

    def push(self, source: int, push: ev.GradientArrived, total: Tensor | None) -> list[ev.Effect]:
        """A member's partial sum ([size] or None), whole and final; it is read until the step is over.

        `push.reads` asks for the version after, which the member is sent in any case; at once if it is here.
        """
        if refused := self._fence(source):
            return refused
        if push.step > self.step:
            self._begin(push.step)
        told = self._told(source, push.step + 1) if push.reads >= 0 else []
        node = (push.first, push.stop)
        if push.step < self.step or self._given.issuperset(range(*node)):
            return told
        self._pushes[node] = replace(push, gradient=None)
        for place in self.places:
            first, stop = self.span(place)
            self._put(node, place, None if total is None else total[first:stop])
        return [*told, *self._send()]

    @property
    def _given(self) -> set[int]:
        """Slots that members have pushed."""
        return {k for node in self._pushes for k in range(*node)}

    def part(self, step: int, slot: int, place: Place, gradient: Tensor) -> list[ev.Effect]:
        """A bucket of the host's own slot, while the slot is still computed; a `push` of it follows."""
        if step > self.step:
            self._begin(step)
        if step < self.step:
            return []
        self._put((slot, slot + 1), place, gradient)
        return self._send()

    def _put(self, node: Node, place: Place, gradient: Tensor | None) -> None:
        self._held[place].setdefault(node, gradient)

    def _send(self) -> list[ev.Effect]:
        """Whatever is ready: buckets of this machine's largest sums, and what closes them.

        A sum of which a bucket has gone stays as it is, whatever else is given to this machine meanwhile. A push that
        has slots of such a sum and others cannot be taken apart: it goes as it is, and shards put it in the place of
        what they have of it.
        """
        begun = {k for node in self._gone for k in range(*node)}
        rest = maximal((self._slots | self._given) - begun, self._rules.slots)
        open_ = [node for node in self._gone if node not in self._closed]
        astride = [node for node in self._pushes if len(begun.intersection(range(*node))) not in (0, node[1] - node[0])]
        return [effect for node in (*open_, *rest, *astride) for effect in self._send_node(node)]

    def _send_node(self, node: Node) -> Iterator[ev.Effect]:
        for place in self.places:
            if place in self._gone.get(node, ()) or not _covers(self._held[place], node):
                continue
            self._gone.setdefault(node, set()).add(place)
            total = self._sum(self._held[place], node)
            if total.value is not None:
                yield self._part(node, place, total.value)
        if len(self._gone.get(node, ())) == len(self.places) and _covers(self._pushes, node):
            yield from self._close(node)

    def _sum(self, held: Mapping[Node, Tensor | None], node: Node) -> Sum[Tensor]:
        """A node's sum; in memory of its own where something had to be added."""
        if node in held:
            return Sum(held[node], 0.0, owned=False)
        middle = split(*node)
        left, right = self._sum(held, (node[0], middle)), self._sum(held, (middle, node[1]))
        if left.value is None or right.value is None:
            return right if left.value is None else left
        if left.owned:
            return Sum(left.value.add_(right.value), 0.0, owned=True)
        if right.owned:
            return Sum(right.value.add_(left.value), 0.0, owned=True)
        out = self._free.pop() if self._free else torch.empty(self._rules.bucket, dtype=left.value.dtype)
        self._used.append(out)
        return Sum(torch.add(left.value, right.value, out=out[: left.value.numel()]), 0.0, owned=True)

    def _part(self, node: Node, place: Place, value: Tensor) -> ev.Send:
        index, start, _ = place
        array = value.numpy() if self._feedback is None else self._feedback.encode((len(self._closed), place), value)
        return ev.Send(
            self._rules.incarnations[index],
            ev.GradientPart(self._rules.timeline, self.step, 0, *node, start, array),
        )

    def _close(self, node: Node) -> Iterator[ev.Effect]:
        """Say what the parts were; and ask for the next version with it, where that adds to what is here."""
        self._closed.append(node)
        whole = self._merged(node)
        for index in self.far:
            parts = sum(place[0] == index for place in self.places) if whole.weight else 0
            push = replace(whole if index == 0 else whole.without_facts(), parts=parts)
            asks = self._asked.get(index, -1) <= self.step
            self._asked[index] = max(self._asked.get(index, -1), self.step + 1)
            if asks and self._version(index) < self.step:
                yield self._pull(index, ev.PullRequested(self._rules.timeline, self.step + 1, push.reads))
            yield ev.Send(
                self._rules.incarnations[index],
                push if asks and self._version(index) == self.step else replace(push, reads=-1),
            )

    def _merged(self, node: Node) -> ev.GradientArrived:
        """One push for all that lie in it; weights are added as the tree says."""
        if node in self._pushes:
            return self._pushes[node]
        middle = split(*node)
        left, right = self._merged((node[0], middle)), self._merged((middle, node[1]))
        times = dict(left.times)
        for worker, spent in right.times.items():
            before = times.get(worker, {})
            times[worker] = before | {phase: before.get(phase, 0.0) + seconds for phase, seconds in spent.items()}
        return replace(
            left,
            stop=right.stop,
            weight=left.weight + right.weight,
            bad=left.bad + right.bad,
            stats=left.stats + right.stats,
            times=times,
            reads=max(0, min(left.reads, right.reads)),
        )

    # Weights.

    def ask(self, pull: ev.PullRequested) -> list[ev.Effect]:
        """The host wants a version of the shards on other machines."""
        effects: list[ev.Effect] = []
        for index in self.far:
            if self._asked.get(index, -1) < pull.at_least:
                self._asked[index] = pull.at_least
                effects.append(self._pull(index, pull))
        return effects

    def _version(self, index: int) -> int:
        """Of a shard's weights here."""
        return self._have[index].version if index in self._have else -1

    def _pull(self, index: int, pull: ev.PullRequested) -> ev.Send:
        return ev.Send(self._rules.incarnations[index], replace(pull, holds=self._version(index)))

    def pull(self, source: int, pull: ev.PullRequested) -> list[ev.Effect]:
        """A member wants one: it is told as soon as that is here, and of all later ones."""
        return self._fence(source) or self._told(source, pull.at_least)

    def place(self, part: ev.WeightsPart) -> Array | None:
        """Where a bucket of a version that is not here yet belongs; None where it has to be decoded first."""
        if part.delta or part.version <= self._version(part.shard) or part.shard not in self._received:
            return None
        return self._received[part.shard][part.start : part.start + self._rules.bucket]

    def weights_part(self, part: ev.WeightsPart) -> None:
        """A bucket of a shard's weights; nobody here computes with that shard's former version any more."""
        if part.version <= self._version(part.shard):
            return
        version, count = self._counted.get(part.shard, (-1, 0))
        self._counted[part.shard] = (part.version, count + 1 if part.version == version else 1)
        values = self._codec.decode(part.weights, torch.float32) if part.delta else tensor_of(part.weights)
        place = torch.from_numpy(self._received[part.shard])[part.start : part.start + values.numel()]
        if part.delta:
            place.add_(values)
        elif place.data_ptr() != values.data_ptr():  # else it was received there
            place.copy_(values)

    def weights(self, sent: ev.WeightsSent) -> tuple[list[ev.Effect], ev.WeightsSent | None]:
        """What closes the parts: effects for the others of this machine, and the same for the host, where it is new."""
        if sent.version <= self._version(sent.shard) or self._counted.get(sent.shard) != (sent.version, sent.parts):
            return [], None
        whole = replace(sent, weights=self._received[sent.shard], parts=0)
        self._have[sent.shard] = whole
        return [ev.Send(reader, whole) for reader in sorted(self._readers - {self._me})], whole

    def _told(self, source: int, version: int) -> list[ev.Effect]:
        self._readers.add(source)
        if source == self._me:
            return []
        return [ev.Send(source, sent) for sent in self._have.values() if sent.version >= version]

    def _fence(self, source: int) -> list[ev.Effect]:
        if source in self._live or source > self._newest:
            return []
        return [ev.Send(source, ev.Fenced(self._rules.timeline))]


def _covers(held: Mapping[Node, object], node: Node) -> bool:
    """Whether `node` is there, or both of its halves."""
    if node in held:
        return True
    middle = split(*node) if node[1] - node[0] > 1 else node[1]
    return middle < node[1] and _covers(held, (node[0], middle)) and _covers(held, (middle, node[1]))
