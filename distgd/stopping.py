"""When evaluations end a run, and which of them was the best. Metrics in, verdicts out; no clock and no run in it.

Patience counts as Prechelt's UP does with strips of one evaluation ("Early Stopping - But When?", 1998, section 2): the
run ends after `evals` evaluations in a row that are not better than the best before by more than `min_delta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from distgd.config import Best, Patience, Target, better
from distgd.config import Stop as StopSection
from distgd.errors import BadInput

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Stop:
    """What `on_event` returns to end a run cleanly; public as `distgd.Stop`.

    The steps that are committed by then count; what is computed beyond them does not. The last version is evaluated and
    saved as at any end.
    """

    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one evaluation means: whether it is the best so far, and why the run ends with it, if it does."""

    best: bool
    ends: str | None


@dataclass
class Leader:
    """The best value of a metric so far, and the evaluations since.

    >>> leader = Leader("eval/loss", "min", min_delta=0.1)
    >>> [leader.beaten_by(value) for value in (1.0, 0.95, 0.8)], leader.since
    ([True, False, True], 0)
    """

    metric: str
    mode: Mode
    min_delta: float = 0.0
    value: float | None = None
    since: int = 0

    def beaten_by(self, value: float) -> bool:
        """Take the next value; whether it is a new best one. A NaN never is."""
        gain = value - (self.value or 0.0) if self.mode == "max" else (self.value or 0.0) - value
        if value == value and (self.value is None or gain > self.min_delta):
            self.value, self.since = value, 0
            return True
        self.since += 1
        return False


@dataclass
class Judge:
    """Sees each evaluation once, in the order of their steps."""

    target: Target | None = None
    patience: Patience | None = None
    best: Best | None = None
    leaders: dict[str, Leader] = field(default_factory=dict)

    @classmethod
    def of(cls, stop: StopSection, best: Best | None) -> Judge:
        """The judge that the config asks for."""
        return cls(stop.target, stop.patience, best)

    def __post_init__(self) -> None:
        if self.patience is not None:
            mode = better("stop.patience", self.patience.metric, self.patience.mode)
            self.leaders["patience"] = Leader(self.patience.metric, mode, self.patience.min_delta)
        if self.best is not None:
            mode = better("eval.best", self.best.metric, self.best.mode)
            self.leaders["best"] = Leader(self.best.metric, mode)

    def evaluated(self, metrics: Mapping[str, float]) -> Verdict:
        """Take the metrics of an evaluation, named `eval/...`.

        Raises:
            BadInput: a metric that the config names is not among them.
        """
        self.check(metrics)
        beaten = {name: leader.beaten_by(metrics[leader.metric]) for name, leader in self.leaders.items()}
        return Verdict(beaten.get("best", False), self._reached(metrics) or self._waited())

    def as_dict(self) -> dict[str, Any]:
        """What it has seen, for JSON."""
        return {name: [leader.value, leader.since] for name, leader in self.leaders.items()}

    def restore(self, seen: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave; a rule that was not there then starts anew."""
        for name, (value, since) in seen.items():
            if name in self.leaders:
                self.leaders[name].value, self.leaders[name].since = value, since

    def check(self, metrics: Mapping[str, object]) -> None:
        """Whether every metric that the config names is among `metrics`; raises as `evaluated` does."""
        named = {"stop.target": self.target, "stop.patience": self.patience, "eval.best": self.best}
        for key, section in named.items():
            if section is not None and section.metric not in metrics:
                known = ", ".join(name for name in sorted(metrics) if name.startswith("eval/"))
                do = "choose one, or return it from the task's metrics or evaluate"
                raise BadInput.at(f"{key}.metric", f"one of {known}", section.metric, do)

    def _reached(self, metrics: Mapping[str, float]) -> str | None:
        if self.target is None:
            return None
        value, low = metrics[self.target.metric], self.target.at_least
        limit = f">= {low:g}" if low is not None else f"<= {self.target.at_most:g}"
        return f"stop.target: {self.target.metric} {value:.6g} {limit}" if self.target.met_by(value) else None

    def _waited(self) -> str | None:
        if self.patience is None:
            return None
        leader = self.leaders["patience"]
        if leader.since < self.patience.evals:
            return None
        best = "never finite" if leader.value is None else f"best {leader.value:.6g}"
        return f"stop.patience: {leader.metric} no better in {leader.since} evaluations ({best})"
