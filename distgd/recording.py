"""The record of a shard's updates in bounded and async mode: one row an update, enough to make it again.

Which gradient an update had is said by the slot and by the versions of all shards that its lease read; what became of
it, by the staleness and by what multiplied the learning rate. Shards may have applied one slot from different leases,
where a worker was lost between two of them, so that only the shard itself can say it.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from zlib import crc32

import numpy as np

from distgd import events as ev

ENOUGH = 256  # rows that are worth a message
Rows = np.ndarray[tuple[int], np.dtype[np.void]]


@cache
def row(shards: int) -> np.dtype[np.void]:
    """One update as bytes, in a run of so many shards.

    `version` is the shard's before it. `worker` is the incarnation that computed slot `slot` of step `step` under
    `lease`, from the versions `reads` by shard; shard 0's says which buffers. `staleness` is the policy's, `scale` what
    multiplied the learning rates, `square` the squared norm of the slot's mean gradient before it was clipped.
    `applied` is 0 where the gradient was not finite. `check` is the CRC-32 of all bytes before it.
    """
    names = [(name, "<i8") for name in ("version", "step", "slot", "worker", "lease", "staleness", "applied")]
    numbers = [("scale", "<f8"), ("square", "<f8")]
    return np.dtype([*names, *numbers, ("reads", "<i8", (shards,)), ("check", "<u8")])


def checks(rows: Rows) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """What `check` must be in each row."""
    size = rows.dtype.itemsize
    data = np.ascontiguousarray(rows).tobytes()
    stop = size - rows.dtype["check"].itemsize
    found = (crc32(data[at : at + stop]) for at in range(0, len(data), size))
    return np.fromiter(found, np.uint64, len(rows))


class Recording:
    """What one shard has applied and not yet told.

    Args:
        shards: how many there are.
    """

    def __init__(self, timeline: int, shard: int, shards: int) -> None:
        self._timeline, self._shard, self._row = timeline, shard, row(shards)
        self._rows: list[tuple[Any, ...]] = []

    @property
    def enough(self) -> bool:
        """Whether it is worth a message."""
        return len(self._rows) >= ENOUGH

    def add(
        self, version: int, source: int, push: ev.GradientArrived, staleness: int, scale: float, *, applied: bool
    ) -> None:
        """Note the update that makes `version` the next one."""
        facts = (version, push.step, push.first, source, push.lease, staleness, applied)
        self._rows.append((*facts, scale, push.square, push.versions, 0))

    def take(self, number: int = 0) -> ev.UpdatesRecorded:
        """All of it, as a message; `number` is that of the request which it answers."""
        rows = np.array(self._rows, self._row)
        rows["check"] = checks(rows)
        self._rows.clear()
        return ev.UpdatesRecorded(self._timeline, self._shard, number, rows.view(np.uint8).reshape(-1))
