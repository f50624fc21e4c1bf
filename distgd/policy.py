"""What an arriving gradient does: apply, hold or drop. Events in, decisions out.

A policy knows slots, versions and who asked for what. It knows no tensor's value, no clock and no network, so that it
can be tested by lists of events. Two exist: `Staged` (sync mode, invariant 3 of the design: stage, then commit) and
`Immediate` (bounded staleness, invariant 12, and async, which is bounded staleness without a bound).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distgd.reduce import Node

# Events.


@dataclass(frozen=True, slots=True)
class Arrived:
    """A gradient is here: `key` is its node of the tree (sync) or (incarnation, lease)."""

    key: tuple[int, int]
    step: int
    slots: Node
    attempt: int = 0
    version: int = 0
    bad: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Opened:
    """A worker reads in order to compute the slot (step, slot)."""

    key: tuple[int, int]
    step: int
    slot: int


@dataclass(frozen=True, slots=True)
class Closed:
    """A lease ended otherwise than applied everywhere."""

    key: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Filled:
    """A shard reports which slots of the step it holds; after a `Propose`, exactly those, with their norm."""

    shard: int
    step: int
    attempt: int
    slots: frozenset[int]
    bad: frozenset[int]


@dataclass(frozen=True, slots=True)
class Decided:
    """Shard 0's decision for a step."""

    step: int
    slots: frozenset[int]
    apply: bool


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A step is to be computed again under a higher attempt number."""

    step: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Survived:
    """These incarnations live; every other one is gone."""

    live: frozenset[int]


@dataclass(frozen=True, slots=True)
class Limited:
    """No step from `steps` on is to be decided, until a higher limit comes (shard 0)."""

    steps: int


@dataclass(frozen=True, slots=True)
class Made:
    """The update that was let through is in the weights (bounded, async)."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step that is held back is to count without effect; or, ahead of time, it and all before it (shard 0)."""

    step: int


Event = Skipped | Arrived | Opened | Closed | Filled | Decided | Withdrawn | Survived | Limited | Made

# Decisions.


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the gradient of `key`."""

    key: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the gradient of `key`: covered, late, withdrawn or gone."""

    key: tuple[int, int]
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Tell shard 0 that these slots are here."""

    step: int
    attempt: int
    slots: frozenset[int]
    bad: frozenset[int]


@dataclass(frozen=True, slots=True)
class Propose:
    """Ask every shard for the norm over these slots."""

    step: int
    attempt: int
    slots: frozenset[int]


@dataclass(frozen=True, slots=True)
class Decide:
    """Every shard holds these slots: this is the step. `apply` is False where it is skipped for `bad` ones."""

    step: int
    slots: frozenset[int]
    bad: frozenset[int]
    apply: bool


@dataclass(frozen=True, slots=True)
class Suspect:
    """Every shard holds these slots, of which some are not finite: the step is held back until somebody judges it."""

    step: int
    slots: frozenset[int]
    bad: frozenset[int]


@dataclass(frozen=True, slots=True)
class ApplyStep:
    """Add these slots in the tree's order and step with their mean, or skip the step."""

    step: int
    slots: frozenset[int]
    apply: bool


@dataclass(frozen=True, slots=True)
class ApplyPush:
    """Step with the gradient of `key` alone, or count it without effect where it is not finite."""

    key: tuple[int, int]
    staleness: int
    apply: bool


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit that holds now: it is never below what has been decided or is being measured."""

    steps: int


Decision = Hold | Drop | Report | Propose | Suspect | Decide | ApplyStep | ApplyPush | Limit


class Policy(Protocol):
    """One shard's rule."""

    @property
    def applied(self) -> dict[str, Any] | None:
        """What has been applied, beyond what the version says; None where it says all."""
        ...

    def handle(self, event: Event) -> list[Decision]:
        """Take one event and say what to do, in order."""
        ...

    def restore(self, version: int, applied: Mapping[str, Any]) -> None:
        """Go on from a version, with what `applied` was then; a new policy only."""
        ...


class Staged:
    """Sync: gradients of a step gather, and one decision for all shards applies them.

    A step is decided by shard 0 when every shard holds the same `quorum` slots of `slots`. In a shard, a push whose
    slots are covered is ignored; one that covers smaller ones takes their place while the tree is not full. With
    `quorum` below `slots` each slot is a push of its own, and the `filled(step)` slots that hold samples count.
    `measure` says that the norm of the decided slots is needed: a report of all slots carries it, under a quorum it
    takes one more round. Steps from `limit` on gather, and are decided once it is raised.
    """

    def __init__(
        self, *, slots: int, quorum: int, shards: int, measure: bool, filled: Callable[[int], int] | None = None
    ) -> None:
        self.version = 0  # the step that gathers now
        self.slots = slots
        self._filled_slots = filled or (lambda step: slots)
        self.quorum = quorum
        self.shards = shards
        self.measure = measure
        self.limit: int | None = None
        self.void = 0  # steps before this one count without effect (shard 0)
        self._clear(attempt=0)

    applied = None  # the version says it

    def restore(self, version: int, applied: Mapping[str, Any]) -> None:
        self.version = version

    def _clear(self, attempt: int) -> None:
        self.attempt = attempt
        self.nodes: dict[Node, frozenset[int]] = {}  # what is staged; disjoint; each with its bad slots
        self.filled: dict[int, Filled] = {}  # shard 0: the last report of each shard, of this step and attempt
        self.proposal: frozenset[int] | None = None  # shard 0: the slots whose norm was asked for
        self.measured: set[int] = set()  # shard 0: who has answered with that norm
        self.suspect: Suspect | None = None  # shard 0: what is held back
        self.decision: Decided | None = None  # the decision for this step, once it is known

    def handle(self, event: Event) -> list[Decision]:
        match event:
            case Arrived():
                return self._arrived(event)
            case Filled():
                return self._filled(event)
            case Decided():
                return self._decided(event)
            case Withdrawn():
                return self._withdrawn(event)
            case Limited():
                return self._limited(event)
            case Skipped():
                return self._skipped(event)
            case _:
                return []

    def _skipped(self, event: Skipped) -> list[Decision]:
        if event.step == self.version and self.suspect is not None and self.decision is None:
            return [Decide(self.version, self.suspect.slots, self.suspect.bad, apply=False)]
        self.void = max(self.void, event.step + 1)
        return []

    @property
    def held(self) -> frozenset[int]:
        """The slots that are here."""
        return frozenset(k for node in self.nodes for k in range(*node))

    def _arrived(self, push: Arrived) -> list[Decision]:
        if push.step != self.version:
            return [Drop(push.key, "late")]
        if push.attempt != self.attempt:
            return [Drop(push.key, "withdrawn")]
        first, stop = push.slots
        inner = [node for node in self.nodes if first <= node[0] and node[1] <= stop]
        outer = any(node[0] <= first and stop <= node[1] for node in self.nodes)
        if outer or sum(b - a for a, b in inner) == stop - first:
            return [Drop(push.key, "covered")]
        for node in inner:
            del self.nodes[node]
        self.nodes[push.slots] = push.bad
        replaced: list[Decision] = [Drop(node, "covered") for node in inner]
        return [*replaced, Hold(push.key), *self._report(), *self._settle()]

    def _report(self) -> list[Decision]:
        held = self.held
        if not self._enough(held):
            return []
        bad = frozenset(k for slots in self.nodes.values() for k in slots)
        return [Report(self.version, self.attempt, held, bad)]

    def _enough(self, slots: frozenset[int]) -> bool:
        """All slots; or, under a quorum, so many that hold samples (the first ones do), as far as there are any."""
        if self.quorum == self.slots:
            return len(slots) == self.slots
        filled = self._filled_slots(self.version)
        return sum(k < filled for k in slots) >= min(self.quorum, filled)

    def _filled(self, report: Filled) -> list[Decision]:
        if report.step != self.version or report.attempt != self.attempt or self.decision or self.suspect:
            return []
        if self.proposal is None:
            before = self.filled.get(report.shard)
            if before is None or len(report.slots) > len(before.slots):
                self.filled[report.shard] = report
            return self._gathered()
        if report.slots == self.proposal:
            self.measured.add(report.shard)
        return self._decide(self.proposal) if len(self.measured) == self.shards else []

    def _limited(self, limited: Limited) -> list[Decision]:
        under_way = any(each is not None for each in (self.decision, self.proposal, self.suspect))
        self.limit = max(limited.steps, self.version + under_way)
        return [Limit(self.limit), *([] if under_way else self._gathered())]

    def _gathered(self) -> list[Decision]:
        """Decide the step, or measure it first, once every shard holds enough of it and the limit lets it."""
        if len(self.filled) < self.shards or (self.limit is not None and self.version >= self.limit):
            return []
        common = frozenset.intersection(*(f.slots for f in self.filled.values()))
        if not self._enough(common):
            return []
        if self.measure and self.quorum < self.slots:
            self.proposal = common
            return [Propose(self.version, self.attempt, common)]
        return self._decide(common)

    def _decide(self, slots: frozenset[int]) -> list[Decision]:
        bad = frozenset.union(*(f.bad for f in self.filled.values())) & slots
        if bad and self.version >= self.void:
            self.suspect = Suspect(self.version, slots, bad)
            return [self.suspect]
        return [Decide(self.version, slots, bad, apply=self.version >= self.void)]

    def _decided(self, decided: Decided) -> list[Decision]:
        if decided.step != self.version or self.decision:
            return []
        self.decision = decided
        return self._settle()

    def _settle(self) -> list[Decision]:
        decided = self.decision
        if decided is None or not decided.slots <= self.held:
            return []
        self._clear(attempt=0)
        self.version += 1
        return [ApplyStep(decided.step, decided.slots, decided.apply)]

    def _withdrawn(self, event: Withdrawn) -> list[Decision]:
        if event.step != self.version or event.attempt <= self.attempt or self.decision:
            return []
        dropped: list[Decision] = [Drop(node, "withdrawn") for node in self.nodes]
        self._clear(event.attempt)
        return dropped


class Applied:
    """The set of (step, slot) that a shard has applied, kept small: whole steps below a mark are only counted.

    `filled(step)` is the number of slots of a step that hold samples.
    """

    def __init__(self, filled: Callable[[int], int]) -> None:
        self._filled = filled
        self._mark = 0
        self._partial: dict[int, set[int]] = {}

    def __contains__(self, slot: tuple[int, int]) -> bool:
        return slot[0] < self._mark or slot[1] in self._partial.get(slot[0], ())

    def add(self, step: int, slot: int) -> None:
        """Count a slot; a step whose every slot is in moves the mark once all before it are."""
        self._partial.setdefault(step, set()).add(slot)
        while len(self._partial.get(self._mark, ())) == self._filled(self._mark):
            del self._partial[self._mark]
            self._mark += 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON: whole steps, and the slots of those that are not."""
        return {"steps": self._mark, "slots": list(map(list, self.beyond))}

    @classmethod
    def of(cls, given: Mapping[str, Any], filled: Callable[[int], int]) -> Applied:
        """What `as_dict` gave."""
        applied = cls(filled)
        applied._mark = given["steps"]
        for step, slot in given["slots"]:
            applied.add(step, slot)
        return applied

    @classmethod
    def in_all(cls, several: Sequence[Applied], filled: Callable[[int], int]) -> Applied:
        """What is in each of them."""
        low, high = min(a._mark for a in several), max(max((a._mark, *(s + 1 for s in a._partial))) for a in several)
        applied = cls.of({"steps": low, "slots": []}, filled)
        for slot in ((step, k) for step in range(low, high) for k in range(filled(step))):
            if all(slot in each for each in several):
                applied.add(*slot)
        return applied

    @property
    def steps(self) -> int:
        """Steps from the first on of which every slot is in."""
        return self._mark

    @property
    def beyond(self) -> list[tuple[int, int]]:
        """The slots of other steps."""
        return sorted((step, k) for step, ks in self._partial.items() for k in ks)


class Immediate:
    """Bounded staleness and async: every slot is an update of its own.

    With a bound s, an arrived push is applied only if every read still open could then be applied too, oldest read
    first, within s; otherwise it waits. With at most s + 1 slots under way in the whole run this never deadlocks and no
    update is staler than s. A read belongs to a lease: asked for twice it keeps its first version, and for a slot that
    is applied already none is opened. A slot that is applied is never applied again. Updates are let through one by
    one, so that what is `applied` is what is in the weights whenever somebody asks.

    Args:
        bound: s in updates, None for async.
        filled: the number of slots of a step that hold samples; the others are never pushed.
    """

    def __init__(self, *, bound: int | None, filled: Callable[[int], int]) -> None:
        self.version = 0
        self.bound = bound
        self.reads: dict[tuple[int, int], int] = {}  # open reads: the version each lease saw
        self.held: dict[tuple[int, int], Arrived] = {}  # waiting pushes, in order of arrival; each has an open read
        self.expired: set[tuple[int, int]] = set()  # leases that ended otherwise; they open no read again
        self._filled = filled
        self._applied = Applied(filled)
        self._making = False  # one that was let through is not in the weights yet

    @property
    def applied(self) -> dict[str, Any]:
        return self._applied.as_dict()

    def restore(self, version: int, applied: Mapping[str, Any]) -> None:
        self.version, self._applied = version, Applied.of(applied, self._filled)

    def handle(self, event: Event) -> list[Decision]:
        match event:
            case Opened():
                return self._opened(event)
            case Arrived():
                return self._arrived(event)
            case Closed():
                return self._closed(event.key)
            case Survived():
                return self._survived(event.live)
            case Made():
                self._making = False
                return self._release()
            case _:
                return []

    def _opened(self, read: Opened) -> list[Decision]:
        if read.key in self.expired:
            return [Drop(read.key, "gone")]
        if (read.step, read.slot) not in self._applied:
            self.reads.setdefault(read.key, self.version)
        return []

    def _arrived(self, push: Arrived) -> list[Decision]:
        if (push.step, push.slots[0]) in self._applied:
            self.reads.pop(push.key, None)
            return [Drop(push.key, "covered"), *self._release()]
        if push.key in self.held:
            return []
        if push.key not in self.reads:
            return [Drop(push.key, "gone")]
        self.held[push.key] = push
        return [Hold(push.key), *self._release()]

    def _closed(self, key: tuple[int, int]) -> list[Decision]:
        self.expired.add(key)
        self.reads.pop(key, None)
        dropped: list[Decision] = [Drop(key, "gone")] if self.held.pop(key, None) else []
        return [*dropped, *self._release()]

    def feasible(self, key: tuple[int, int]) -> bool:
        """Whether every other open read can still be applied within the bound after the push of `key`."""
        if self.bound is None:
            return True
        rest = sorted(version for other, version in self.reads.items() if other != key)
        return all(self.version + 1 + place - version <= self.bound for place, version in enumerate(rest))

    def _release(self) -> list[Decision]:
        decisions: list[Decision] = []
        while not self._making and (key := next((k for k in self.held if self.feasible(k)), None)):
            push = self.held.pop(key)
            slot = (push.step, push.slots[0])
            read = self.reads.pop(key)
            if slot in self._applied:
                decisions.append(Drop(key, "covered"))
                continue
            decisions.append(ApplyPush(key, self.version - read, apply=not push.bad))
            self._applied.add(*slot)
            self.version += 1
            self._making = True
        return decisions

    def _survived(self, live: frozenset[int]) -> list[Decision]:
        decisions: list[Decision] = []
        for key in [k for k in self.reads if k[0] not in live]:
            decisions += self._closed(key)
        self.expired = {key for key in self.expired if key[0] in live}
        return decisions
