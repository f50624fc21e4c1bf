"""When a checkpoint is made, and when it is whole. Time is an argument; files are somebody else's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distgd import events as ev

Progress = Mapping[str, Any]


@dataclass(frozen=True)
class Whole:
    """A checkpoint whose files are all durable; `progress` is the driver's, of that version."""

    number: int
    parts: tuple[ev.ShardWritten, ...]
    progress: Progress


class Saving:
    """One checkpoint at a time, asked for ahead; each takes what the driver had counted when its version was made.

    Numbers go down from -1, see `events.TakeSnapshot`.

    Args:
        every_steps, every_seconds: the cadence; both None for none at all.
        staged: whether a version is the same on every shard (sync).
    """

    def __init__(
        self,
        every_steps: int | None,
        every_seconds: float | None,
        *,
        shards: int,
        staged: bool,
        step: int,
        version: int,
        now: float,
    ) -> None:
        self.on = every_steps is not None or every_seconds is not None
        self._by_steps = every_steps is not None
        self._interval = float(every_steps or every_seconds or 1)
        self._due = (step // self._interval + 1) * self._interval if self._by_steps else now + self._interval
        self._shards, self._staged = shards, staged
        self.number = 0
        self.running = False
        self.version = version  # that the last one was called by
        self.asked = 0
        self._parts: dict[int, ev.ShardWritten] = {}
        self._progress: dict[int, Progress] = {}  # by version, from the one that was asked for on
        self._sealing: Whole | None = None  # its files are there, and what it depends on is being written down
        self._unsealed: set[int] = set()  # shards whose record is missing

    def next(self, step: int, now: float) -> int | None:
        """The step to ask for at `step` and `now`, None for none; a step is said once."""
        if not self.on or self.running or (not self._by_steps and now < self._due):
            return None
        if not self._by_steps:
            self._due = now + self._interval
            return step + 1
        while self._due <= step:
            self._due += self._interval
        due, self._due = self._due, self._due + self._interval  # shards may be there before the driver has counted it
        return int(due)

    def ask(self, version: int, counted: int, progress: Callable[[], Progress]) -> int:
        """Begin one of the first version that is at least `version`; what was under way is given up.

        Args:
            counted: the version that the driver has counted up to; no shard is behind it.

        Returns:
            Its number.
        """
        self.number -= 1
        self.running, self.asked = True, version
        self._parts.clear()
        self._sealing = None
        self._progress = {counted: progress()}
        return self.number

    def end_at(self, version: int, progress: Progress) -> None:
        """The run ends at a version, which is counted: one that was asked for beyond is of that version instead."""
        if self.running and self.asked > version:
            self.asked = version
            self._progress = {version: progress}

    def reached(self, version: int, progress: Callable[[], Progress]) -> Whole | None:
        """The driver has counted up to a version (sync); the checkpoint, if that was all that was missing."""
        if not self.running or version < self.asked:
            return None
        self._progress[version] = progress()
        return self._whole(progress)

    def written(self, part: ev.ShardWritten, progress: Callable[[], Progress]) -> Whole | None:
        """A shard's file is durable; the checkpoint, if that was all that was missing."""
        if not self.running or part.number != self.number or part.error:
            return None
        self._parts[part.shard] = part
        return self._whole(progress)

    def _whole(self, progress: Callable[[], Progress]) -> Whole | None:
        if len(self._parts) < self._shards:
            return None
        parts = tuple(part for _, part in sorted(self._parts.items()))
        if not self._staged:
            return Whole(self.number, parts, progress())
        version = parts[0].version
        return Whole(self.number, parts, self._progress[version]) if version in self._progress else None

    def seal(self, whole: Whole) -> None:
        """Wait for every shard's record of its updates (bounded, async).

        A shard's file may hold a gradient that was computed from a version of another shard beyond that one's file.
        All versions that were read by then were there before the last file was: a record that is asked for now has
        them.
        """
        self._sealing, self._unsealed = whole, set(range(self._shards))

    def recorded(self, number: int, shard: int) -> Whole | None:
        """A shard's record is written down; the checkpoint, if that was all that was missing."""
        if self._sealing is None or number != self._sealing.number:
            return None
        self._unsealed.discard(shard)
        return None if self._unsealed else self._sealing

    def ended(self, version: int | None) -> None:
        """It is real, and called by `version`; or, with None, there will be none: the next one is tried in its turn."""
        self.running = False
        self.version = self.version if version is None else version
        self._sealing = None
        self._parts.clear()
        self._progress.clear()
