"""The evaluator: reads a snapshot and reports the metrics of the whole evaluation set. Workers do not wait for it.

One evaluation at a time; the driver counts those that it skips because the one before still runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from distgd import events as ev
from distgd.layout import Slice
from distgd.replica import Array, Blueprint, Replica
from distgd.rules import ShardRules
from distgd.sources import Source
from distgd.transport.segments import Allocate
from distgd.worker import TaskSource


@dataclass(frozen=True)
class EvaluatorSpec:
    """All that an evaluator is made of. `batch` is samples per forward pass; the means are over the whole set."""

    rules: ShardRules
    incarnation: int
    slices: tuple[Slice, ...]
    blueprint: Blueprint
    task: TaskSource
    seed: int
    frozen: dict[str, Array]
    device: str
    threads: int
    batch: int

    role = "evaluator"

    def build(self, clock: Callable[[], float], allocate: Allocate = np.zeros) -> Evaluator:
        """Build model and evaluation data, and check that they are those of the driver.

        Raises:
            RunFailed: names, shapes or lengths differ from the driver's.
        """
        torch.set_num_threads(self.threads)
        replica = Replica(self.task.load(), self.seed, self.device, self.frozen)
        source = replica.eval_source()
        self.blueprint.check(replica.blueprint(source), "eval_data")
        return Evaluator(self, replica, source)


@dataclass(frozen=True, slots=True)
class Scored:
    """A whole pass is done; the host that performed it fills in the `seconds` that it took."""

    timeline: int
    number: int
    version: int
    metrics: dict[str, float]
    seconds: float = 0.0


class Evaluator:
    """The state machine; `perform` makes the pass."""

    def __init__(self, spec: EvaluatorSpec, replica: Replica, source: Source) -> None:
        self.spec = spec
        self._replica = replica
        self._source = source
        self._timeline = spec.rules.timeline
        self._number = -1
        self._parts: dict[int, ev.SnapshotSent] = {}

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        """Take one message, or this process's own `Scored`."""
        if isinstance(event, ev.TimelineBegun) and event.timeline > self._timeline:
            rules = replace(self.spec.rules, timeline=event.timeline, incarnations=event.shards)
            self.spec, self._timeline, self._number, self._parts = (
                replace(self.spec, rules=rules),
                event.timeline,
                -1,
                {},
            )
            return []
        if isinstance(event, ev.Fenced):
            return [ev.End("fenced: replaced by another")]
        if event.timeline != self._timeline:
            return []
        match event:
            case ev.Stop():
                return [ev.End("stopped by the driver")]
            case ev.StatusRequested():
                return [ev.Send(source, ev.StatusSent(self._timeline, f"evaluates snapshot {self._number}"))]
            case ev.Evaluate():
                self._number, self._parts = event.number, {}
                pull = ev.SnapshotPulled(self._timeline, event.number)
                return [ev.Send(shard, pull) for shard in self.spec.rules.incarnations]
            case ev.SnapshotSent() if event.number == self._number:
                self._parts[event.shard] = event
                whole = len(self._parts) == len(self.spec.slices)
                return [ev.Compute(dict(self._parts))] if whole else []
            case Scored():
                scored = ev.Evaluated(self._timeline, event.number, event.version, event.metrics, event.seconds)
                return [ev.Send(ev.DRIVER, scored)]
            case _:
                return []

    def perform(self, work: dict[int, ev.SnapshotSent], emit: Callable[[ev.Effect], None]) -> Scored:
        """Install the snapshot and pass over the whole set."""
        weights = {shard: sent.weights for shard, sent in work.items()}
        self._replica.install(self.spec.slices, weights, work[0].buffers)
        metrics = self._replica.evaluate(self._source, self.spec.batch)
        version = max(part.version for part in work.values())
        return Scored(self._timeline, work[0].number, version, metrics)
