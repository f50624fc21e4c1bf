"""Which steps are evaluated, and the weights of the best evaluation so far. Time is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distgd import events as ev
from distgd.assignment import Assignment


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: of `step`, with its metrics; `parts` are its weights, by shard."""

    number: int
    step: int
    metrics: dict[str, float]
    parts: dict[int, ev.SnapshotSent] = field(default_factory=dict)


class Evaluations:
    """One evaluation at a time, asked for ahead; those that come due meanwhile are skipped and counted.

    An evaluation that is the best so far is over once its weights have come, a part from each shard.

    Attributes:
        wanted: the step of the newest one.
    """

    def __init__(self, assignment: Assignment, now: float) -> None:
        self.by_steps = assignment.evaluate_steps is not None
        self.interval = float(assignment.evaluate_steps or assignment.evaluate_seconds or 1)
        self.due = self.interval if self.by_steps else now + self.interval
        self.last = assignment.steps
        self.running = False
        self.number = 0  # of the newest one
        self.skipped = 0
        self.version = -1  # that the last one was of
        self.best: Best | None = None
        self.wanted = 0
        self._candidate: Best | None = None  # the best one, while its weights are on their way

    def as_dict(self, began: float) -> dict[str, Any]:
        """For JSON; one that is under way is still due. Times count from `began`."""
        best = self.best and {"number": self.best.number, "step": self.best.step, "metrics": self.best.metrics}
        due = self.wanted if self.running else self.due
        return {"due": due if self.by_steps else self.due - began, "by_steps": self.by_steps, "best": best}

    def restore(self, seen: Mapping[str, Any], step: int, began: float) -> None:
        """Go on at `step` from what `as_dict` gave; where the cadence is another now, it starts there."""
        if (best := seen["best"]) is not None:
            self.best = Best(best["number"], best["step"], dict(best["metrics"]))
        if self.by_steps:
            upcoming = (step // self.interval + 1) * self.interval
            self.due = seen["due"] if seen["by_steps"] and step <= seen["due"] < upcoming else upcoming
        elif not seen["by_steps"]:
            self.due = began + seen["due"]

    def next(self, step: int, now: float) -> int | None:
        """The step to ask for at `step` and `now`, None for none; the last step is asked for by the run's end."""
        at = step if self.by_steps else now
        while self.due < at and (self.running or self.by_steps):
            self.due += self.interval
            self.skipped += 1
        if self.running or (not self.by_steps and now < self.due):
            return None
        wanted = int(self.due) if self.by_steps else step + 1
        if wanted >= self.last:
            return None
        self.due = wanted + self.interval if self.by_steps else now + self.interval
        self.running, self.wanted = True, wanted
        self.number += 1
        return wanted

    def evaluated(self, version: int, best: Best | None) -> None:
        """One is in; it is over, unless it is a best one, whose weights are still to come."""
        self.version = version
        self._candidate = best
        self.running = best is not None
        self.best = best or self.best

    def weights(self, part: ev.SnapshotSent, shards: int) -> Best | None:
        """Take a shard's part of a snapshot; the best evaluation, once its weights are whole."""
        best = self._candidate
        if best is None or part.number != best.number:
            return None
        best.parts[part.shard] = part
        if len(best.parts) < shards:
            return None
        self._candidate, self.running = None, False
        return best
