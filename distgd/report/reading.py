"""What a run folder says about its run, in any state: completed, failed, killed, or still running.

Only `config.yaml` and `metrics.jsonl` are read, each once and line by line. A file that is missing is an empty one; a
line that is no event, such as one that a kill left unfinished, is skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from distgd.config.text import parse
from distgd.errors import BadInput
from distgd.records import events
from distgd.report.curves import Curve, Place

MOST_NOTICES = 100
"""Notices that are kept from the beginning of a run, and again from its end."""

_PART = re.compile(r"time/(?P<phase>[^/]+)/(?P<part>worker_\d+|min|median|max)")
"""A phase of one worker, or of all where they are many: `distgd.records.per_worker` makes these names."""


@dataclass(frozen=True)
class Notice:
    """Something that happened, other than a step or an evaluation."""

    place: Place
    kind: str
    text: str


START = Place(0, 0, 0.0)


@dataclass
class Reading:
    """A run as its folder tells it.

    Args:
        config: `config.yaml` as plain values, empty where it cannot be read; `config_text` is the file as it is.
        curves: by metric, all but those of single workers.
        parts: milliseconds in all of a phase (`compute`) in one part (`worker_0`; or `min`, `median`, `max`).
        timed: steps that these milliseconds are of.
        metrics: the newest value of each metric.
        status, message, result: how it ended, what the error was, and what it came to; None and empty without an end.
        left_out: notices that were too many to keep.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    curves: dict[str, Curve] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    timed: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)
    left_out: int = 0
    last: Place = START
    status: str | None = None
    message: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)

    def key(self, dotted: str, default: Any = None) -> Any:
        """A key of the config, such as `consistency.mode`."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    def curve(self, metric: str) -> Curve:
        """The curve of a metric, an empty one where there is none."""
        return self.curves.get(metric, Curve())

    def spent(self, phase: str, part: str | None = None) -> float:
        """Milliseconds a step: of a worker, of `min`, `median` or `max`, or the mean over all workers."""
        total = self.parts.get(phase, {}).get(part, 0.0) if part else sum(self.curve(f"time/{phase}").sums)
        return total / self.timed if self.timed else 0.0

    @property
    def title(self) -> str:
        """The run in one line."""
        task = self.key("task.name") or self.key("task.path") or "task"
        workers, servers = self.key("cluster.workers", "?"), self.key("cluster.servers", "?")
        if isinstance(workers, Mapping):
            workers = f"{workers.get('min')} to {workers.get('max')}"
        known = [task, self.key("consistency.mode", "?"), _many(workers, "worker"), _many(servers, "server")]
        return f"{self.name}: {', '.join(map(str, known))}" if self.config else self.name

    @property
    def clock(self) -> str:
        """The unit of the run's time: in-process clusters live in virtual time."""
        return "virtual s" if self.key("cluster.backend") == "inprocess" else "s"

    @property
    def milliseconds(self) -> str:
        """A thousandth of the clock's unit."""
        return "ms" if self.clock == "s" else "virtual ms"

    def take(self, event: Mapping[str, Any]) -> None:
        """Take the next event."""
        place = Place(int(event.get("step", 0)), int(event.get("samples", 0)), float(event.get("seconds", 0.0)))
        self.last = Place(*map(max, self.last, place))  # type: ignore[arg-type]
        metrics = {name: number for name, value in _items(event, "metrics") if (number := _number(value)) is not None}
        self.metrics |= metrics
        kind = str(event["event"])
        if kind == "end":
            self.status, self.message = str(event.get("status", "?")), str(event.get("message") or "")
            self.result = dict(_items(event, "result"))
        else:
            self._plot(place, metrics)
        if kind not in ("step", "eval", "checkpoint"):
            said = [str(event[key]) for key in ("status", "ended_by", "message") if event.get(key)]
            self._notice(Notice(place, kind, "; ".join(said)))

    def _plot(self, place: Place, metrics: Mapping[str, float]) -> None:
        self.timed += "time/compute" in metrics
        for name, value in metrics.items():
            if part := _part(name):
                spent = self.parts.setdefault(part[0], {})
                spent[part[1]] = spent.get(part[1], 0.0) + (value if math.isfinite(value) else 0.0)
            elif (curve := self.curves.get(name)) is not None:
                curve.add(place, value)
            else:
                self.curves[name] = Curve()
                self.curves[name].add(place, value)

    def _notice(self, notice: Notice) -> None:
        self.notices.append(notice)
        if len(self.notices) > 2 * MOST_NOTICES:
            del self.notices[MOST_NOTICES]
            self.left_out += 1


def read(run_dir: Path) -> Reading:
    """Everything that the report says about a run."""
    reading = Reading(run_dir.absolute().name)
    path = run_dir / "config.yaml"
    if path.is_file():
        reading.config_text = path.read_text(encoding="utf-8", errors="replace")
        reading.config = _config(reading.config_text)
    for event in events(run_dir / "metrics.jsonl"):
        reading.take(event)
    return reading


def _config(text: str) -> Mapping[str, Any]:
    """The config as plain values; one of another version is read as well, so that nothing is checked."""
    try:
        config = parse(text, "config.yaml")
    except BadInput:
        return {}
    return config if isinstance(config, dict) else {}


@lru_cache(maxsize=4096)
def _part(metric: str) -> tuple[str, str] | None:
    found = _PART.fullmatch(metric)
    return (found["phase"], found["part"]) if found else None


def _items(event: Mapping[str, Any], key: str) -> Any:
    value = event.get(key)
    return value.items() if isinstance(value, dict) else ()


def _number(value: object) -> float | None:
    """A metric as a number; "NaN" and "Infinity" are how the file spells those that are not finite."""
    if isinstance(value, float):
        return value
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _many(count: object, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
