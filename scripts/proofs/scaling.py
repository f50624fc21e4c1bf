"""The rows of `scripts/prove scaling`: what the cost model predicts of a step, against steps that were measured.

The model's constants were set by `cost.CALIBRATED`; those points are run too and shown in brackets, and count in no
number. Measured are the median step and its parts over the quickest stretch of a run, as whatever else runs on the
machine only adds to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

import distgd
from distgd import cost, trainer
from distgd.cluster import shared_cluster
from distgd.config import Config, load
from distgd.forecast import Forecast, forecast
from proofs.rows import Bench, Measured, Proof
from proofs.trials import events

proof = Proof()

WORKERS, SHARDS = (1, 2, 4), (1, 2)
TASKS: dict[str, tuple[str, int | None]] = {
    "0.1M": ("synthetic", 100_000),
    "1M": ("synthetic", 1_000_000),
    "5M": ("synthetic", 5_000_000),
    "20M": ("synthetic", 20_000_000),
    "digits": ("digits", None),
    "char-lm": ("char-lm", None),
}
SECONDS = 4.0  # of steps in a run, as predicted
STEPS = (40, 2000)
STRETCHES, SHORTEST = 20, 8  # how many a run is cut into, and the steps of one at least
MOST_ERROR = 0.30
CLOSE = 0.8  # of the largest measured share: two that are as good as equal are both right
SLOWER = 1.15  # of the best number of shards measured, that the suggested one may be
DEMANDED = f"median of |predicted / measured - 1| <= {MOST_ERROR:.0%}; the part it is bound by is the measured one"


@dataclass(frozen=True)
class Point:
    """One config: predicted before it ran, and what the run's steps took, in seconds.

    `load` is how many other processes wanted a core before the task's first run.
    """

    task: str
    workers: int
    shards: int
    expected: Forecast
    seconds: float
    shares: dict[str, float]
    load: float

    @property
    def held_out(self) -> bool:
        """Whether the model has not seen it."""
        return (self.workers, self.shards, TASKS[self.task][1]) not in cost.CALIBRATED

    @property
    def predicted(self) -> float:
        """Seconds of a step."""
        assert self.expected.parts is not None
        return self.expected.parts.total

    @property
    def error(self) -> float:
        """How far the prediction is from what was measured, as a part of that."""
        return abs(self.predicted / self.seconds - 1)

    @property
    def right(self) -> bool:
        """Whether the predicted part is the largest measured one, or next to it."""
        assert self.expected.parts is not None
        return self.shares[self.expected.parts.bound] >= CLOSE * max(self.shares.values())

    def text(self) -> str:
        """Workers x shards, both times in ms, and what bounds it."""
        assert self.expected.parts is not None
        said = f"{self.workers}x{self.shards} {_ms(self.predicted)}/{_ms(self.seconds)} {self.expected.parts.bound}"
        said += "" if self.right else f" (measured {max(self.shares, key=self.shares.__getitem__)})"
        return said if self.held_out else f"[{said}]"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _config(task: str, workers: int, shards: int, folder: str) -> Config:
    name, parameters = TASKS[task]
    slots = workers if parameters else 4
    return load(
        {
            "task": {"name": name, "args": {"parameters": parameters} if parameters else {}},
            "batch": {"size": 4 if parameters else 32, "slots": slots},
            "stop": {"steps": STEPS[1]},
            "optimizer": {"name": "adam", "lr": 1e-3},
            "cluster": {"workers": workers, "servers": shards},
            "eval": {"every": {"steps": STEPS[1]}},
            "run": {"storage": folder},
            "tracking": {"uri": "none"},
        }
    )


@cache
def points(task: str, quick: bool) -> tuple[Point, ...]:
    """Every point of a task, run once a process on one cluster; predicted while no other process of ours is there."""
    grid = [(w, s) for w, s in product(WORKERS, SHARDS) if not quick or (w, s) in ((1, 1), (2, 1), (4, 2))]
    with TemporaryDirectory(prefix="prove-") as folder:
        configs = [_config(task, *at, folder) for at in grid]
        plans = [trainer.prepare(config) for config in configs]
        load = _others_at_work()
        expected = _same_machine([forecast(plan) for plan in plans])
        with shared_cluster(configs, max(plan.largest_message for plan in plans)):
            return tuple(
                Point(task, *at, found, *_run(config, found), load)
                for at, config, found in zip(grid, configs, expected, strict=True)
            )


def _others_at_work() -> float:
    """How many processes besides this one have a core or wait for one, on average over a second."""
    seen = []
    for _ in range(20):
        sleep(0.05)
        seen.append(int(Path("/proc/loadavg").read_text(encoding="utf-8").split()[3].partition("/")[0]) - 1)
    return fmean(seen)


def _same_machine(found: Sequence[Forecast]) -> list[Forecast]:
    """The forecasts with the best of what was measured of the machine and, by size of slot, of slots."""
    machines = [each.machine for each in found]
    best = cost.Machine(
        machines[0].cores,
        median(each.bandwidth for each in machines),
        median(each.bandwidth_all for each in machines),
        min(each.message for each in machines),
    )
    jobs = [each.job for each in found if each.job is not None]
    least = {job.slots: min(other.slot for other in jobs if other.slots == job.slots) for job in jobs}
    jobs = [replace(job, slot=least[job.slots]) for job in jobs]
    return [
        replace(each, machine=best, job=job, parts=cost.predict(job, best))
        for each, job in zip(found, jobs, strict=True)
    ]


def _run(config: Config, expected: Forecast) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and of what it may be bound by: medians of the stretch of steps that was quickest."""
    assert expected.parts is not None
    steps = min(max(int(SECONDS / expected.parts.total), STEPS[0]), STEPS[1])
    result = distgd.train(config, f"stop.steps={steps}")
    seen = [event["metrics"] for event in events(result.run_dir, "step") if "time/step" in event["metrics"]]
    long = max(SHORTEST, len(seen) // STRETCHES)
    stretches = [seen[at : at + long] for at in range(0, len(seen) - long + 1, max(1, long // 2))]
    quickest = min(stretches, key=lambda some: median(metrics["time/step"] for metrics in some))
    step = 1e-3 * median(metrics["time/step"] for metrics in quickest)
    compute = 1e-3 * median(_computing(metrics, expected.machine.cores) for metrics in quickest)
    memory = 1e-3 * median(metrics["time/apply"] for metrics in quickest)
    return step, {"compute": compute, "memory": memory, "network": 0.0, "messages": step - compute - memory}


def _computing(metrics: dict[str, Any], cores: int) -> float:
    """Milliseconds in which slots are computed: the busiest worker's, or all of them taking turns on the cores."""
    each = [value for name, value in metrics.items() if name.startswith("time/compute/")]
    each = each or [metrics["time/compute"]]
    return max(max(each), sum(each) / cores)


def _judged(found: Sequence[Point], told: str) -> Measured:
    counted = [point for point in found if point.held_out]
    error, right = median(point.error for point in counted), sum(point.right for point in counted)
    said = f"{told}median error {error:.0%}, bound right in {right} of {len(counted)}"
    here = found[0].expected.machine
    copies = f"copies {here.bandwidth / 1e9:.3g} GB/s alone and {here.bandwidth_all / 1e9:.3g} together"
    other = max(point.load for point in found)
    facts = f"{here.cores} cores, {copies}, {here.message * 1e6:.0f} us a message; {other:.1f} other processes at work"
    return Measured(said, error <= MOST_ERROR and right == len(counted), facts)


def _of_task(task: str) -> None:
    """Add the row of one task."""
    name, parameters = TASKS[task]
    what = f"`{name}`" + (f" with {parameters:,} parameters" if parameters else "")

    def measure(bench: Bench) -> Measured:
        found = points(task, bench.quick)
        return _judged(found, "; ".join(point.text() for point in found) + "; ")

    measure.__doc__ = f"{what}: a step of workers x servers, predicted/measured ms, and what it is bound by"
    proof.row(DEMANDED)(measure)


for _task in TASKS:
    _of_task(_task)


def _all(bench: Bench) -> Iterator[Point]:
    for task in TASKS:
        yield from points(task, bench.quick)


@proof.row(DEMANDED)
def every_point(bench: Bench) -> Measured:
    """All held-out points together."""
    found = list(_all(bench))
    worst = max((point for point in found if point.held_out), key=lambda point: point.error)
    return _judged(found, f"worst {worst.task} {worst.text()}; ")


@proof.row(
    f"a step at most {SLOWER} times that of the best number of those measured, for each task and number of workers"
)
def suggested_shards(bench: Bench) -> Measured:
    """The number of servers that `--dry-run` suggests is as good as any."""
    found = {(point.task, point.workers, point.shards): point for point in _all(bench)}
    slower = {}
    for task, workers in product(TASKS, WORKERS):
        tried = [found[task, workers, shards] for shards in SHARDS if (task, workers, shards) in found]
        if len(tried) < len(SHARDS):
            continue
        job, here = tried[0].expected.job, tried[0].expected.machine
        assert job is not None
        shards, _ = cost.best_shards(job, here, max(SHARDS))
        slower[f"{task}, {workers} workers"] = found[task, workers, shards].seconds / min(p.seconds for p in tried)
    if not slower:
        return Measured("not asked for", holds=True, demanded="only the full run has both numbers")
    worst = max(slower, key=slower.__getitem__)
    return Measured(f"at most {slower[worst]:.2f} times ({worst})", slower[worst] <= SLOWER)
