"""What became of a variant: its result, its curves, and when it reached the target."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from distgd.compare.variants import Variant
from distgd.config import Target
from distgd.errors import DistgdError
from distgd.records import events
from distgd.report.curves import Curve, Place

GOOD = ("completed", "stopped")


@dataclass(frozen=True)
class Outcome:
    """One variant's end.

    Args:
        error: what ended the run early.
        result: the run's result as `--json` gives it; empty where there is none.
        curves: by metric, of training loss and evaluations.
        reached: where an evaluation met the target first.
    """

    variant: Variant
    status: str
    error: DistgdError | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    reached: Place | None = None

    @property
    def good(self) -> bool:
        """Whether the run went to its end."""
        return self.status in GOOD

    @property
    def evaluated(self) -> dict[str, float]:
        """The last value of each metric of an evaluation; of the training loss where there was none."""
        last = self.result.get("metrics", {})
        return {k: v for k, v in last.items() if k.startswith("eval/")} or {
            k: v for k, v in last.items() if k == "train/loss"
        }

    def as_dict(self) -> dict[str, Any]:
        """The outcome for JSON."""
        known = ("run_dir", "steps", "samples", "wall_s", "samples_per_s", "step_ms", "staleness", "weights_sha256")
        return {
            "variant": self.variant.label,
            "overrides": list(self.variant.overrides),
            "status": self.status,
            "message": str(self.error) if self.error else None,
            **{key: self.result.get(key) for key in known},
            "metrics": self.evaluated,
            "to_target": self.reached._asdict() if self.reached else None,
        }


def outcome(variant: Variant, error: DistgdError | None, result: Mapping[str, Any], target: Target | None) -> Outcome:
    """The outcome of a run that has ended, with what its folder says."""
    curves: dict[str, Curve] = {}
    reached = None
    folder = result.get("run_dir")
    for place, metrics in _points(Path(folder)) if folder else ():
        for name, value in metrics.items():
            curves.setdefault(name, Curve()).add(place, value)
        if reached is None and target is not None and target.met_by(metrics.get(target.metric, nan)):
            reached = place
    status = error.status if error is not None else str(result["status"])
    return Outcome(variant, status, error, result, curves, reached)


def _points(run_dir: Path) -> Iterator[tuple[Place, dict[str, float]]]:
    """Training loss and evaluations, in order.

    An evaluation is known some steps after the one that it is of; it counts the samples of that one.
    """
    samples = array("q", [0])  # by step
    for event in events(run_dir / "metrics.jsonl"):
        step, kind = event.get("step", 0), event["event"]
        if kind == "step":
            samples.extend([event["samples"]] * (step + 1 - len(samples)))
        if kind in ("step", "eval"):
            wanted = {k: float(v) for k, v in event["metrics"].items() if k == "train/loss" or k.startswith("eval/")}
            yield Place(step, samples[min(step, len(samples) - 1)], event["seconds"]), wanted
