"""Who lives, on which machine, and who computes which slots: what shards and workers are told, and when it has to end.

A process that is gone is replaced by one with a higher incarnation in the same place of the cast. Workers that end with
one slot, one after the other, are its fault and not theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from distgd import events as ev
from distgd.assignment import Cast
from distgd.errors import DistgdError, RunFailed
from distgd.ledger import Slot, assign
from distgd.shares import Shares
from distgd.sources import Order

FATAL, APART = 3, 2.0
"""So many workers that end with a slot before it is committed end the run; those that are lost within so many seconds
count as one, as machines go together."""


class Membership:
    """The members of a run.

    Args:
        nodes: the live incarnations by machine.
        staged: whether a table of slots says who computes what (sync).

    Attributes:
        nodes: to be kept true by whoever starts processes.
        joining: those of the cast that are not ready yet.
        fresh: those among them in whose place nobody has been before.
        generation: counts what has been announced.
        shares: how many slots each worker is to get; empty for as many each, as after every change of workers.
    """

    def __init__(
        self, cast: Cast, order: Order, staged: bool, nodes: tuple[tuple[int, ...], ...], joining: Collection[int]
    ) -> None:
        self.cast, self.nodes, self.joining = cast, nodes, set(joining)
        self.fresh = set(joining)
        self.live = {ev.DRIVER, *cast.everybody}
        self.generation = 0
        self.table: tuple[int, ...] = ()  # who computes each slot (sync)
        self.shares: Shares = {}
        self._order, self._staged = order, staged
        self._newest = max(self.live)
        self._came: dict[int, int] = {}  # in which turn, of those that were not there at first
        self._deaths: dict[Slot, tuple[int, float]] = {}  # of workers with a slot: how many, when the last

    @property
    def workers(self) -> list[int]:
        """Those that compute, in the cast's order."""
        return [w for w in self.cast.workers if w in self.live and w not in self.joining]

    def announce(self) -> list[ev.Send]:
        """Tell everybody who is ready: the first word that somebody hears has him in it, and his machine."""
        self.generation += 1
        several = self.nodes if len(self.nodes) > 1 else ()
        there = self.live - self.joining - {self.cast.evaluator}  # nobody adds for a machine before it is ready
        nodes = tuple(tuple(sorted(there.intersection(node), key=self._turn)) for node in several)
        workers = self.workers
        beside = [i for node in nodes for i in node if i in workers] or workers
        if self.shares.keys() != set(workers):  # of others
            self.shares = {}
        self.table = assign(self._order.slots, beside, self.shares or None) if self._staged else ()
        live = frozenset(self.live)
        event = ev.MembershipChanged(self.cast.timeline, self.generation, live, self._newest, self.table, nodes)
        return [ev.Send(to, event) for to in sorted(self.live - self.joining - {ev.DRIVER})]

    def _turn(self, incarnation: int) -> tuple[int, int]:
        return self._came.get(incarnation, 0), incarnation

    def replace(self, gone: int) -> int:
        """Another incarnation in the place of a worker or the evaluator; it is joining."""
        self.live.discard(gone)
        self.joining.discard(gone)
        self._newest += 1
        new = self._newest
        if gone in self.fresh:
            self.fresh.remove(gone)
            self.fresh.add(new)
        self.cast = self.cast.replaced(gone, new)
        self.live.add(new)  # a shard that hears of it first from itself is not to fence it
        self.joining.add(new)
        return new

    def arrived(self, new: int) -> str:
        """One that was joining is ready; what to say of it."""
        self.joining.discard(new)
        self._came[new] = len(self._came) + 1
        first = new in self.fresh
        self.fresh.discard(new)
        return f"{self.cast.name(new)} {'has joined' if first else 'is there again'}"

    def refuse(self, worker: int) -> None:
        """One that was joining does not take part, and its place stays empty."""
        self.live.discard(worker)
        self.joining.discard(worker)
        self.cast = self.cast.without(worker)

    def died(self, worker: int, leased: Sequence[Slot], step: int, now: float) -> DistgdError | None:
        """Count who is gone; the error, if a slot has ended too many: what it holds is then the likeliest reason.

        Args:
            leased: the slots that it held (bounded, async).
            step: the first that is not committed.
        """
        for old in [slot for slot in self._deaths if slot[0] < step]:
            del self._deaths[old]
        had = [*leased, *((step, slot) for slot, owner in enumerate(self.table) if owner == worker)]
        for slot in had:
            count, last = self._deaths.get(slot, (0, -APART))
            if now - last >= APART:
                self._deaths[slot] = count + 1, now
        fatal = next((slot for slot in had if self._deaths[slot][0] >= FATAL), None)
        if fatal is None:
            return None
        first, stop = self._order.places(*fatal)
        return RunFailed(
            f"step {fatal[0]}, slot {fatal[1]}: expected a worker to survive it, found {FATAL} that did not; look at "
            f"its samples (places {first} to {stop} of epoch {self._order.epoch_of(fatal[0])} in the order) and at the "
            "memory that they need"
        )
