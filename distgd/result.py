"""What a run came to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from distgd import weights
from distgd.driver import Driver
from distgd.plan import Plan
from distgd.records import events, strict


@dataclass(frozen=True)
class Result:
    """What a run came to; `as_dict` is the object that `--json` prints, which leaves the weights out.

    `samples_per_s` is measured from the first commit to the last, `start_s` from the process's start to the first
    commit, `step_ms` between commits. `ended_by` says why the run was over: the key of `stop`, or what asked for it.
    `best` has step and metrics of the best evaluation where `eval.best` asks for it; its weights are in
    `best.safetensors`. `faults` says how many of a plan's were injected, null without one. `state_dict` holds the last
    version; it loads into the plain torch model, and is empty where the run failed.
    """

    run_id: str
    mlflow_run_id: str | None
    run_dir: str
    status: str
    mode: str
    workers: int
    servers: int
    slots: int
    steps: int
    versions: int
    samples: int
    samples_per_s: float | None
    step_ms: dict[str, float | None]
    staleness: dict[str, float | None]
    wall_s: float
    start_s: float | None
    bits: str
    weights_sha256: str | None
    metrics: dict[str, float]
    ended_by: str | None
    best: dict[str, Any] | None
    dropped_samples: int
    late_slots: int
    skipped_evaluations: int
    faults: str | None = None
    state_dict: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the weights, ready for JSON."""
        fields = {name: value for name, value in self.__dict__.items() if name != "state_dict"}
        return strict(fields)  # type: ignore[no-any-return]


def reached(run_dir: Path) -> Result | None:
    """The result of a run that has ended by itself, as its folder has it; None where it has not."""
    last: dict[str, Any] = {}
    for event in events(run_dir / "metrics.jsonl"):
        last = event if event["event"] == "end" else {}
    if last.get("status") not in ("completed", "stopped"):
        return None
    state = load_file(run_dir / "model.safetensors") if (run_dir / "model.safetensors").exists() else {}
    known = {each.name for each in fields(Result)} - {"metrics", "run_dir", "state_dict"}
    told = {name: value for name, value in last["result"].items() if name in known}
    metrics = {name: float(value) for name, value in last["metrics"].items()}
    return Result(**told, metrics=metrics, run_dir=str(run_dir), state_dict=state)


def summarize(
    plan: Plan,
    driver: Driver | None,
    state: dict[str, Tensor],
    *,
    run_dir: str,
    mlflow_run_id: str | None,
    status: str,
    bits: str,
    began: float,
    first_commit: float | None,
    faults: str | None = None,
) -> Result:
    """The result of a run that has ended, from the driver's counts; None where it had no driver yet.

    Args:
        bits: what is promised of them, unless the step at which the run ended depends on how fast everybody was.
        began: when the run began, seconds since the epoch.
        first_commit: seconds from there to the first commit.
        faults: how many of a plan's were delivered.
    """
    config, tally = plan.config, driver.tally if driver else None
    nothing: dict[str, float | None] = {}
    best = driver.evaluations.best if driver else None
    return Result(
        run_id=run_dir.rpartition("/")[2],
        mlflow_run_id=mlflow_run_id,
        run_dir=run_dir,
        status=status,
        mode=config.consistency.mode,
        workers=config.cluster.workers.max,
        servers=config.cluster.servers,
        slots=plan.order.slots,
        steps=tally.steps if tally else 0,
        versions=tally.versions if tally else 0,
        samples=tally.samples if tally else 0,
        samples_per_s=tally.samples_per_s() if tally else None,
        step_ms=tally.step_ms() if tally else nothing,
        staleness=tally.staleness_quantiles() if tally else nothing,
        wall_s=time.time() - began,
        start_s=first_commit,
        bits="not promised" if driver and driver.timed else bits,
        weights_sha256=weights.fingerprint(state) if state else None,
        metrics=tally.metrics if tally else {},
        ended_by=_why(plan, driver, status),
        best={"step": best.step, "metrics": dict(best.metrics)} if best else None,
        dropped_samples=tally.dropped if tally else 0,
        late_slots=tally.late_slots if tally else 0,
        skipped_evaluations=tally.skipped_evaluations if tally else 0,
        faults=faults,
        state_dict=state,
    )


def _why(plan: Plan, driver: Driver | None, status: str) -> str | None:
    if driver is None or status not in ("completed", "stopped"):
        return None
    stop = plan.config.stop
    by_steps = stop.steps is not None and plan.steps == stop.steps
    return driver.ended or (f"stop.steps: {stop.steps}" if by_steps else f"stop.epochs: {stop.epochs}")
