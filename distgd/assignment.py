"""What a run is to do, and who does it: facts that the driver decides from."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from distgd.ledger import Slot
from distgd.optim import OptimizerSpec, Schedule
from distgd.policy import Applied
from distgd.sources import Order
from distgd.stopping import Judge


@dataclass(frozen=True)
class Cast:
    """Who plays what: incarnations by role, shards in the order of their index."""

    timeline: int
    shards: tuple[int, ...]
    workers: tuple[int, ...]
    evaluator: int | None

    @property
    def everybody(self) -> tuple[int, ...]:
        """Every incarnation but the driver's, shards first."""
        return (*self.shards, *self.workers, *([self.evaluator] if self.evaluator is not None else []))

    def replaced(self, gone: int, new: int) -> Cast:
        """The same with another incarnation in the place of one.

        >>> Cast(1, (1, 2), (3, 4), None).replaced(3, 5).workers
        (5, 4)
        """

        def swap(members: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(new if member == gone else member for member in members)

        evaluator = new if self.evaluator == gone else self.evaluator
        return Cast(self.timeline, swap(self.shards), swap(self.workers), evaluator)

    def without(self, worker: int) -> Cast:
        """The same without a worker; those behind it move up.

        >>> Cast(1, (1, 2), (3, 4), None).without(3).workers
        (4,)
        """
        return Cast(self.timeline, self.shards, tuple(w for w in self.workers if w != worker), self.evaluator)

    def name(self, incarnation: int) -> str:
        """An incarnation as people know it.

        >>> Cast(1, (1, 2), (3,), 4).name(2)
        'shard 1'
        """
        for role, members in (("worker", self.workers), ("shard", self.shards)):
            if incarnation in members:
                return f"{role} {members.index(incarnation)}"
        return "the evaluator" if incarnation == self.evaluator else f"process {incarnation}"


@dataclass(frozen=True)
class Assignment:
    """What the run is to do: `steps` global batches of `order` in one mode.

    `staged` is sync mode; elsewhere `staleness` is the bound, None in async. Evaluation happens every
    `evaluate_steps` or every `evaluate_seconds`, and at the end; checkpoints are made every `save_steps` or every
    `save_seconds` and at the end, or, with neither, never. So many as `skips` slots, or steps in sync mode, may count
    without effect where they are not finite, or where their norm is above `norm_ratio` times the running median. So
    often as `rollbacks` a run that would end for such a slot goes back, and on without the steps up to that one. The
    run may end before `steps`: `seconds` after it began, by the `judge` of its evaluations, or when somebody asks for
    it. `record` says that every update is recorded. So many as `workers` compute at least; more may join and leave.
    """

    order: Order
    steps: int
    staged: bool
    staleness: int | None
    optimizer: OptimizerSpec
    schedule: Schedule
    evaluate_steps: int | None
    evaluate_seconds: float | None
    seconds: float | None = None
    judge: Judge = field(default_factory=Judge)
    save_steps: int | None = None
    save_seconds: float | None = None
    record: bool = False
    skips: int = 0
    norm_ratio: float | None = None
    rollbacks: int = 0
    workers: int = 1

    @property
    def waits(self) -> bool:
        """Whether training waits for each evaluation, so that the run ends at the same step every time."""
        return (self.judge.target is not None or self.judge.patience is not None) and self.evaluate_steps is not None

    def versions(self, steps: int) -> int:
        """The version after so many steps: one a step, or one for each slot that holds samples."""
        if self.staged:
            return steps
        epochs, rest = divmod(steps, self.order.steps_per_epoch)
        return epochs * self._updates(self.order.steps_per_epoch) + self._updates(rest)

    def steps_of(self, version: int) -> int:
        """The whole steps in a version."""
        if self.staged:
            return version
        epochs, rest = divmod(version, self._updates(self.order.steps_per_epoch))
        return epochs * self.order.steps_per_epoch + rest // self.order.slots

    def _updates(self, steps: int) -> int:
        """Slots that hold samples in an epoch's first `steps`; only its last batch may be short."""
        if steps < self.order.steps_per_epoch:
            return steps * self.order.slots
        return (steps - 1) * self.order.slots + self.order.filled(steps - 1)

    def samples(self, applied: Applied, skipped: Collection[Slot] = ()) -> int:
        """The samples of slots, but for those `skipped`."""
        epochs, rest = divmod(applied.steps, self.order.steps_per_epoch)
        whole = epochs * self.order.samples + min(rest * self.order.batch, self.order.samples)
        without = sum(map(self._samples, (slot for slot in skipped if slot in applied)))
        return whole + sum(map(self._samples, applied.beyond)) - without

    def _samples(self, slot: Slot) -> int:
        first, stop = self.order.places(*slot)
        return stop - first

    def slots(self) -> Iterator[tuple[int, int]]:
        """Every (step, slot) that holds samples, in order."""
        return ((t, k) for t in range(self.steps) for k in range(self.order.filled(t)))
