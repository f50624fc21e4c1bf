"""What a tracker is, and the trackers that need nothing but the run folder.

A tracker gets `start`, then any number of events, then `finish`. An event is a mapping
`{"event": "step", "step", "version", "samples", "seconds", "metrics": {"train/loss": ...}}`, or, instead of `step`, one
of `warning`, `eval`, `checkpoint`, `fault`, `joined`, `injected`, `end`; `seconds` count from the run's start.
`metrics.jsonl` holds every one of them; a kill loses one second at most.
Warnings go to the logger `distgd.tracking`.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

Event = Mapping[str, Any]

log = logging.getLogger("distgd.tracking")

ONCE = ("step", "eval")
"""Kinds of events of which each step has one."""
MOST_SERIES = 16
"""Up to this many workers each have a series of their own."""


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run when it starts.

    Args:
        params: the resolved config, flat (`"optimizer.lr": 0.1`).
        tags: versions, git commit, host, bits; `mlflow.source.git.commit` and `mlflow.user` have columns of their own.
        data: `name`, `samples`, `digest` and `schema` of the training data.
        steps: how many steps are planned; None when a stop rule decides.
        uri, experiment: MLflow's store and experiment; a relative `sqlite:///` path starts at the current folder.
        parent: MLflow's id of the run that this one is a part of, in the same store.
        logged: what a run that goes on has logged already, by kind of event; None for a new one.
    """

    run_id: str
    name: str
    run_dir: Path
    params: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    uri: str = "sqlite:///mlflow.db"
    experiment: str = "distgd"
    parent: str | None = None
    logged: Mapping[str, int] | None = None


@dataclass(frozen=True)
class RunEnd:
    """What a run leaves behind.

    Args:
        status: completed, stopped, failed, diverged or interrupted.
        result: the result's fields; its numbers become metrics (`result/wall_s`), its strings tags (`result.bits`).
        report: the folder of the report: a page and its pictures.
        weights: the files of weights: `model.safetensors`, and `best.safetensors` where there is one.
        model: the torch module with the final weights. From here on it is the tracker's, which moves it to the CPU and
            puts it into evaluation mode.
        example: one batch of the model's input, an array or a tensor whose first dimension is the batch. Without one
            the model cannot be exported.
    """

    status: str
    result: Mapping[str, Any] = field(default_factory=dict)
    report: Path | None = None
    weights: tuple[Path, ...] = ()
    model: Any = None
    example: Any = None


class Tracker(Protocol):
    """Sees a run from start to finish. `log` is called between steps and must return at once."""

    def start(self, info: RunInfo) -> None: ...

    def log(self, event: Event) -> None: ...

    def finish(self, end: RunEnd) -> None: ...


class Many:
    """Several trackers as one. A tracker that raises is named in one warning and goes on getting events.

    >>> from distgd.tracking import Mlflow
    >>> tracker = Many(Jsonl(), Mlflow(every_steps=10))
    """

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers
        self._failed: set[int] = set()

    def start(self, info: RunInfo) -> None:
        self._each(lambda tracker: tracker.start(info))

    def log(self, event: Event) -> None:
        self._each(lambda tracker: tracker.log({**event, "metrics": dict(event["metrics"])}))  # each has its own

    def finish(self, end: RunEnd) -> None:
        self._each(lambda tracker: tracker.finish(end))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            try:
                call(tracker)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it must not reach training
                if id(tracker) not in self._failed:
                    self._failed.add(id(tracker))
                    log.warning("tracking with %s failed: %s; training goes on", type(tracker).__name__, error)


class Onwards:
    """A tracker of a run that may go back: a step and an evaluation are logged once, when they come first.

    Args:
        tracker: gets everything else as it comes.
        before: the last step of each kind of event that was logged by another process, as `logged` finds it.
    """

    def __init__(self, tracker: Tracker, before: Mapping[str, int]) -> None:
        self._tracker, self._logged = tracker, dict(before)

    def start(self, info: RunInfo) -> None:
        self._tracker.start(info)

    def log(self, event: Event) -> None:
        kind, step = event["event"], event["step"]
        if kind in ONCE:
            if step <= self._logged.get(kind, -1):
                return
            self._logged[kind] = step
        self._tracker.log(event)

    def finish(self, end: RunEnd) -> None:
        self._tracker.finish(end)


def events(metrics_jsonl: Path) -> Iterator[dict[str, Any]]:
    """The events of a run in order; a line that is none is skipped, and there are none without the file."""
    if not metrics_jsonl.is_file():
        return
    with metrics_jsonl.open("rb") as lines:
        for line in lines:
            try:
                event = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


def logged(metrics_jsonl: Path) -> dict[str, int]:
    """The last step of each kind that is logged once a step."""
    last: dict[str, int] = {}
    for event in events(metrics_jsonl):
        if event["event"] in ONCE:
            last[event["event"]] = max(event["step"], last.get(event["event"], -1))
    return last


class Jsonl:
    """Every event as one line of `metrics.jsonl` in the run folder, appended.

    Strict JSON: a number that is not finite is the string "NaN", "Infinity" or "-Infinity", as in protobuf's JSON, so
    that `float(value)` reads every metric back. Flushed at each evaluation, fault and end, and once a second of events.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._flushed = 0.0

    def start(self, info: RunInfo) -> None:
        self._file = (info.run_dir / "metrics.jsonl").open("a", encoding="utf-8")

    def log(self, event: Event) -> None:
        if self._file is None:
            return
        self._file.write(_line(event) + "\n")
        if event["event"] != "step" or event["seconds"] >= self._flushed + 1.0:
            self._file.flush()
            self._flushed = event["seconds"]

    def finish(self, end: RunEnd) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


_ENCODE = json.JSONEncoder(allow_nan=False).encode


def _line(event: Event) -> str:
    """The event as strict JSON; only where it holds something else than plain finite numbers it is copied first."""
    try:
        return _ENCODE(event)
    except (TypeError, ValueError):
        return _ENCODE(strict(event))


def strict(value: Any) -> Any:
    """The same value for a strict JSON writer: numpy and torch scalars as Python's, not-finite numbers as strings."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def per_worker(prefix: str, values: Mapping[int, float]) -> dict[str, float]:
    """One series per worker up to `MOST_SERIES` workers; the smallest, the median and the largest value beyond.

    >>> per_worker("time/compute", {0: 1.5, 3: 2.0})
    {'time/compute/worker_0': 1.5, 'time/compute/worker_3': 2.0}
    """
    if len(values) <= MOST_SERIES:
        return {f"{prefix}/worker_{worker}": value for worker, value in sorted(values.items())}
    numbers = values.values()
    return {
        f"{prefix}/min": min(numbers),
        f"{prefix}/median": statistics.median(numbers),
        f"{prefix}/max": max(numbers),
    }
