"""What a run has done so far: counts, rates and the metrics of each step.

Metrics of a step (bounded and async: of each K applied slots) are those of the samples in it: `train/loss` is the mean
over their weight, `time/...` are milliseconds, `staleness/...` updates. Time is an argument.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distgd.events import SlotStats
from distgd.optim import OptimizerSpec, Schedule
from distgd.records import per_worker

WINDOW, WINDOW_SECONDS = 20, 0.5
"""Steps over which the throughput is taken, and seconds at least: reports of several steps may come at once."""
COUNTS = ("steps", "versions", "samples", "dropped", "late_slots", "skipped_evaluations")
PHASES = ("compute", "push", "wait", "pull", "apply")


@dataclass
class Tally:
    """Counts since `began` (seconds). Intervals and staleness are kept whole, 8 bytes a step."""

    optimizer: OptimizerSpec
    schedule: Schedule
    began: float
    steps: int = 0
    versions: int = 0
    samples: int = 0
    dropped: int = 0
    late_slots: int = 0
    skipped_evaluations: int = 0
    first_commit: float | None = None
    last_commit: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    step_seconds: array[float] = field(default_factory=lambda: array("d"))
    staleness: array[int] = field(default_factory=lambda: array("l"))

    def __post_init__(self) -> None:
        self._window: deque[tuple[float, int]] = deque([(self.began, 0)])
        self._before = (0, 0)  # steps and samples that were counted in another process

    def as_dict(self) -> dict[str, Any]:
        """The counts, for JSON; intervals and staleness are those of one process and stay behind."""
        counts = {name: getattr(self, name) for name in COUNTS}
        seconds = self.last_commit - self.began if self.first_commit is not None else 0.0
        return {**counts, "seconds": seconds, "metrics": dict(self.metrics)}

    def restore(self, counts: Mapping[str, Any], now: float) -> None:
        """Go on from what `as_dict` gave: time goes on from there, too."""
        for name in COUNTS:
            setattr(self, name, counts[name])
        self.metrics = {name: float(value) for name, value in counts["metrics"].items()}
        self.began, self.last_commit = now - counts["seconds"], now
        self._window = deque([(now, self.samples)])
        self._before = (self.steps, self.samples)

    def stepped(
        self,
        stats: Sequence[SlotStats],
        times: Mapping[int, Mapping[str, float]],
        extra: Mapping[str, float],
        now: float,
    ) -> dict[str, Any]:
        """Count one step made of `stats` and give its event.

        Args:
            times: seconds by worker index and phase.
            extra: metrics that only the caller knows.
        """
        metrics = {**self._loss(stats), **self._rates(now), **self._lrs(), **_times(times), **extra}
        self.steps += 1
        return self.event("step", now, metrics)

    def event(self, kind: str, now: float, metrics: Mapping[str, float], **more: Any) -> dict[str, Any]:
        """An event at the present place of the run; its metrics become the last ones."""
        self.metrics |= metrics
        place = {"step": self.steps, "version": self.versions, "samples": self.samples, "seconds": now - self.began}
        return {"event": kind, **place, **more, "metrics": dict(metrics)}

    def _loss(self, stats: Sequence[SlotStats]) -> dict[str, float]:
        weight = sum(s.weight for s in stats)
        return {"train/loss": sum(s.loss * s.weight for s in stats) / weight} if weight else {}

    def _lrs(self) -> dict[str, float]:
        rates = self.optimizer.lrs(self.schedule.factor(self.steps))
        return {"lr" if pattern == "*" else f"lr/{pattern}": rate for pattern, rate in rates.items()}

    def _rates(self, now: float) -> dict[str, float]:
        if self.first_commit is None:
            self.first_commit = now
        else:
            self.step_seconds.append(now - self.last_commit)
        self.last_commit = now
        while len(self._window) >= WINDOW and self._window[1][0] <= now - WINDOW_SECONDS:
            self._window.popleft()
        then, before = self._window[0]
        self._window.append((now, self.samples))
        rates = {"time/step": self.step_seconds[-1] * 1e3} if self.step_seconds else {}
        return rates | ({"throughput/samples_per_s": (self.samples - before) / (now - then)} if now > then else {})

    def samples_per_s(self) -> float | None:
        """From the first commit to the last; None before the second."""
        if self.first_commit is None or self.last_commit <= self.first_commit:
            return None
        steps, samples = self.steps - self._before[0], self.samples - self._before[1]
        if steps < 1:
            return None
        return samples * (steps - 1) / steps / (self.last_commit - self.first_commit)

    def step_ms(self) -> dict[str, float | None]:
        """Time between commits."""
        return _quantiles([1e3 * seconds for seconds in self.step_seconds], {"p50": 50, "p95": 95})

    def staleness_quantiles(self) -> dict[str, float | None]:
        """Staleness of the applied pushes, in updates; of several shards the largest."""
        return _quantiles(self.staleness, {"p50": 50, "p95": 95, "max": 100})


def _times(times: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for phase in PHASES:
        by_worker = {worker: 1e3 * spent[phase] for worker, spent in times.items() if phase in spent}
        if by_worker:
            metrics[f"time/{phase}"] = sum(by_worker.values()) / len(by_worker)
            metrics |= per_worker(f"time/{phase}", by_worker)
    return metrics


def _quantiles(values: Sequence[float], wanted: Mapping[str, int]) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(wanted)
    return {name: float(np.percentile(np.asarray(values), q, method="higher")) for name, q in wanted.items()}
