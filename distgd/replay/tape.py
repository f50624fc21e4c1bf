"""What one timeline's record says, checked against itself before anything is computed.

A lease's gradient needs the weights that it read from every shard. A checkpoint is no one moment: one shard's part of
it may hold a gradient that was computed from a later version of another shard than that one's part. Such a shard is
taken beyond what counts, as far as it was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distgd.errors import BadInput
from distgd.recording import Rows
from distgd.updates import INCOMPLETE, Segment

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Tape:
    """The updates that are to be made again.

    Args:
        rows: by shard, those that count and those beyond that are needed for others' reads.
        lease: for each of them, the number of its lease.
        reads: [leases, shards], the versions that each lease read.
        uses: [leases], how many shards have applied it.
    """

    segment: Segment
    rows: tuple[Rows, ...]
    lease: tuple[Numbers, ...]
    reads: Numbers
    uses: Numbers

    def readers(self, shard: int) -> Numbers:
        """How many leases read each version of a shard, from the segment's first one on."""
        return np.bincount(self.reads[:, shard] - self.segment.begins[shard], minlength=len(self.rows[shard]) + 1)


def tape(segment: Segment) -> Tape:
    """Take what counts of a segment, and what that needs.

    Raises:
        BadInput: rows are missing, or two shards say different things of one lease.
    """
    needed = _needed(segment)
    rows = tuple(r[: n - first] for r, n, first in zip(segment.rows, needed, segment.begins, strict=True))
    for shard, (some, stop, first) in enumerate(zip(rows, needed, segment.begins, strict=True)):
        if len(some) < stop - first:
            raise _incomplete(segment, f"shard {shard}'s updates up to version {stop}", f"up to {first + len(some)}")
    every: Any = np.concatenate(rows)
    keys = np.stack([every["worker"], every["lease"]], axis=1)
    _, first_of, lease, uses = np.unique(keys, axis=0, return_index=True, return_inverse=True, return_counts=True)
    lease = lease.reshape(-1)
    for name in ("step", "slot", "reads", "square"):
        told = every[name][first_of][lease]
        differs = np.flatnonzero(_unequal(told, every[name]))
        if len(differs):
            one = every[differs[0]]
            what = f"one {name} of lease {one['lease']} of process {one['worker']}"
            raise _incomplete(segment, what, f"{told[differs[0]]} and {one[name]}")
    reads = every["reads"][first_of].reshape(-1, len(rows))
    if len(reads) and (reads < np.array(segment.begins)).any():
        raise _incomplete(segment, "reads of its own versions", "older ones")
    stops = np.cumsum([len(some) for some in rows])[:-1]
    return Tape(segment, rows, tuple(np.split(lease, stops)), reads, uses)


def _unequal(one: Any, other: Any) -> Any:
    """In which rows two columns differ; NaN is NaN."""
    unequal = one != other
    if one.dtype.kind == "f":
        unequal &= ~(np.isnan(one) & np.isnan(other))
    return unequal.any(axis=tuple(range(1, unequal.ndim)))


def _needed(segment: Segment) -> list[int]:
    """How far each shard has to be taken: to where it counts, and to where those updates' leases have read it."""
    needed = list(segment.ends)
    while True:
        before = list(needed)
        for rows, stop, first in zip(segment.rows, before, segment.begins, strict=True):
            if len(some := rows[: max(0, stop - first)]):
                needed = [max(pair) for pair in zip(needed, some["reads"].max(axis=0).tolist(), strict=True)]
        if needed == before:
            return needed


def _incomplete(segment: Segment, expected: str, found: str) -> BadInput:
    return BadInput.described(f"updates of timeline {segment.timeline}", expected, found, INCOMPLETE)
