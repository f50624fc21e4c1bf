"""Which slots have been granted, applied, dropped and skipped.

In bounded and async mode a worker computes a slot only under a lease. At most `limit` leases are under way in the whole
run (s + 1 under a bound of s, see `distgd.policy.Immediate`), counted from the grant, before any shard is read. A slot
whose lease ends otherwise than applied goes back to the front of the queue. In sync mode the table of slots stands in
for leases and the ledger only counts.

Time is an argument; what a sample is, nobody knows here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

NOBODY = -1
"""Who computes a slot while no worker is there."""
Slot = tuple[int, int]
"""(step, slot)."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A grant of one slot to one worker; `granted` is the time of the grant in seconds."""

    number: int
    worker: int
    step: int
    slot: int
    granted: float


class Ledger:
    """Leases over slots that are taken in the given order, each applied exactly once.

    >>> ledger = Ledger([(0, 0), (0, 1), (0, 2)], limit=2)
    >>> [ledger.grant(worker, now=0.0).slot for worker in (7, 8)]
    [0, 1]
    >>> ledger.grant(9, now=0.0) is None
    True
    """

    def __init__(self, slots: Iterable[Slot], limit: int | None, begun: int = 0) -> None:
        self._slots = iter(slots)
        self._next = next(self._slots, None)
        self.steps: int | None = None  # new slots are granted below this step alone
        self.begun = begun  # steps of which a slot has been granted
        self._again: deque[Slot] = deque()  # slots whose lease ended otherwise than applied, oldest first
        self.limit = limit
        self._number = 0
        self.open: dict[int, Lease] = {}  # by number; what is under way
        self.applied = 0

    def grant(self, worker: int, now: float, avoid: Collection[Slot] = ()) -> Lease | None:
        """Lease the next slot to `worker`; None where the limit is reached or no slot is left to grant.

        Args:
            avoid: slots that are for others.
        """
        if self.limit is not None and len(self.open) >= self.limit:
            return None
        slot = next((again for again in self._again if again not in avoid), None)
        if slot is not None:
            self._again.remove(slot)
        else:
            slot = self._take()
        if slot is None:
            return None
        self._number += 1
        lease = self.open[self._number] = Lease(self._number, worker, *slot, now)
        return lease

    def _take(self) -> Slot | None:
        slot = self._next
        if slot is None or (self.steps is not None and slot[0] >= self.steps):
            return None
        self._next = next(self._slots, None)
        self.begun = slot[0] + 1
        return slot

    def end(self, number: int, *, applied: bool) -> Lease | None:
        """Close a lease; a slot that was not applied is granted again. None where the lease is closed already."""
        lease = self.open.pop(number, None)
        if lease is None:
            return None
        if applied:
            self.applied += 1
        else:
            self._again.append((lease.step, lease.slot))
        return lease

    def expire(self, worker: int) -> list[Lease]:
        """Close every lease of a worker that is gone."""
        gone = [lease for lease in self.open.values() if lease.worker == worker]
        for lease in gone:
            self.end(lease.number, applied=False)
        return gone


def assign(slots: int, workers: list[int], shares: Mapping[int, int] | None = None) -> tuple[int, ...]:
    """Sync: which worker computes slot k, in runs of neighbors so that a worker owns few, large subtrees.

    Args:
        shares: how many slots each worker gets, `slots` in all; None for as many each.

    >>> assign(5, [11, 12])
    (11, 11, 11, 12, 12)
    >>> assign(5, [11, 12], {11: 1, 12: 4})
    (11, 12, 12, 12, 12)
    """
    if not workers:
        return (NOBODY,) * slots
    if shares is not None:
        return tuple(w for w in workers for _ in range(shares[w]))
    share, extra = divmod(slots, len(workers))
    return tuple(w for i, w in enumerate(workers) for _ in range(share + (i < extra)))
