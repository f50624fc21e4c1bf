"""A shard's copies of versions: for evaluation, for the end of a run, and for checkpoints, which go to files.

A snapshot has a number and is due at a version; it is taken between applying and answering, once for each number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distgd.events import SnapshotSent

KEPT = 2  # one that is being read, and the one after it
Array = np.ndarray[Any, Any]


class Snapshots:
    """Those of one shard.

    Attributes:
        due: the version that each number waits for.
    """

    def __init__(self, timeline: int, shard: int) -> None:
        self._timeline, self._shard = timeline, shard
        self._taken: OrderedDict[int, SnapshotSent] = OrderedDict()
        self._readers: dict[int, list[int]] = {}
        self.due: dict[int, int] = {}
        self._stored: set[int] = set()

    def has(self, number: int) -> bool:
        """Whether a number has been taken, and lately."""
        return number in self._taken or number in self._stored

    def stored(self, version: int) -> list[tuple[int, int]]:
        """Numbers of checkpoints that are due at `version`, each with the version that it was asked for."""
        due = [(number, at) for number, at in self.due.items() if number < 0 and at <= version]
        for number, _ in due:
            del self.due[number]
            self._stored.add(number)
        return due

    def take(
        self, version: int, copy: Callable[[], Array], buffers: Array | None
    ) -> Iterator[tuple[int, SnapshotSent]]:
        """Take what is due at `version`.

        Returns:
            Readers who wait for it, each with the snapshot.
        """
        for number in [number for number, at in self.due.items() if at <= version]:
            del self.due[number]
            self._taken[number] = SnapshotSent(self._timeline, number, self._shard, version, copy(), buffers)
            yield from ((reader, self._taken[number]) for reader in self._readers.pop(number, ()))
            while len(self._taken) > KEPT:
                self._taken.popitem(last=False)

    def pulled(self, reader: int, number: int) -> list[SnapshotSent]:
        """The snapshot; nothing as long as it has not been taken, and then it is sent."""
        if number in self._taken:
            return [self._taken[number]]
        self._readers.setdefault(number, []).append(reader)
        return []
