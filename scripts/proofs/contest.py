"""Who is compared in `scripts/prove speed`, how each is run from outside, and how their times are put together.

Everybody is a process of its own, started anew for each measurement. Contestants take turns, and a time is the median
over the turns, so that what else happens on the machine meets all of them.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proofs import models, outside
from proofs.rows import shown

ROOT = Path(__file__).parents[2]
BUCKETS = (1, 5, 25, 100)  # MB
WARM = 3  # steps of DDP that are not counted
BYTES = 4  # of a parameter


def environment(**more: str) -> dict[str, str]:
    """A person's environment, with this copy of the package and the proofs to be imported."""
    return outside.environment(PYTHONPATH=f"{ROOT}:{ROOT / 'scripts'}", **more)


def python(module: str, *arguments: object) -> list[str]:
    """The command line of a module."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def last_object(module: str, *arguments: object, cwd: Path) -> dict[str, Any]:
    """Run a module to its end; the JSON object that it printed last. Ray, where it uses that, writes no token."""
    env = environment(OMP_NUM_THREADS="1", RAY_AUTH_MODE="disabled")
    return outside.run(python(module, *arguments), cwd, env).checked().result


@dataclass
class Times:
    """Milliseconds of a step, one number a turn."""

    turns: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    @property
    def spread(self) -> str:
        """The least and the largest turn."""
        return f"{shown(min(self.turns))}-{shown(max(self.turns))}"


def take_turns(contestants: Mapping[str, Callable[[], float]], turns: int) -> dict[str, Times]:
    """Let everybody run once a turn; their times by name."""
    times = {name: Times() for name in contestants}
    for _ in range(turns):
        for name, run in contestants.items():
            times[name].turns.append(run())
    return times


def best(candidates: Sequence[Any], run: Callable[[Any], float]) -> Any:
    """The candidate that takes the least time."""
    return min(candidates, key=run) if len(candidates) > 1 else candidates[0]


def geometric_mean(values: Sequence[float]) -> float:
    """The exponential of the mean of the logarithms."""
    return math.exp(statistics.fmean(map(math.log, values)))


def steps_for(workers: int, parameters: int, *, numbers: float, most: int, least: int = 12) -> int:
    """Steps that touch about so many numbers in all."""
    return max(least, min(most, int(numbers / (workers * parameters))))


# DDP.


@dataclass(frozen=True)
class DDPTimes:
    """One bucket size: median milliseconds of a step and of backward alone (0 where there is none), the mean step's."""

    bucket_mb: float
    step: float
    backward: float
    mean: float


def port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ddp(name: str, workers: int, steps: int, buckets: Sequence[float], cwd: Path) -> list[DDPTimes]:
    """DDP on this machine, with each bucket size."""
    command = python("proofs.ddp", name, workers, steps + WARM, *buckets)
    return read_ddp(outside.run(command, cwd, environment(MASTER_PORT=str(port()), OMP_NUM_THREADS="1")).checked().out)


def read_ddp(printed: str) -> list[DDPTimes]:
    """What `proofs.ddp` printed."""
    return [
        DDPTimes(
            found["bucket_mb"],
            median_ms(found["step"]),
            median_ms(found["backward"]) if found["backward"] else 0.0,
            1e3 * statistics.fmean(found["step"][WARM:]),
        )
        for found in map(json.loads, filter(lambda line: line.startswith("{"), printed.splitlines()))
    ]


def median_ms(seconds: Sequence[float]) -> float:
    """The median of a contestant's steps without the first few, in milliseconds."""
    return 1e3 * statistics.median(seconds[WARM:])


def best_bucket(name: str, workers: int, steps: int, buckets: Sequence[float], cwd: Path) -> DDPTimes:
    """The bucket size with which DDP is fastest, tried in one process group."""
    return min(ddp(name, workers, steps, buckets, cwd), key=lambda found: found.step)


# Ours.


def config(name: str, workers: int, steps: int, folder: Path, **sections: Any) -> str:
    """The path of a config for a run in `folder`; `sections` are merged into what all runs have."""
    size = models.SAMPLES[name.partition(":")[0]] * workers
    whole: dict[str, Any] = {
        "task": models.section(name, str(folder)),
        "batch": {"size": size, "slots": workers},
        "stop": {"steps": steps},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "cluster": {"workers": workers, "start_timeout": 300},
        "eval": {"every": {"steps": max(steps, 2)}},
    }
    for section, keys in sections.items():
        whole[section] = {**whole.get(section, {}), **keys}
    (folder / "run.yaml").write_text(json.dumps(whole), encoding="utf-8")
    return str(folder / "run.yaml")


def ours(name: str, workers: int, steps: int, folder: Path, **sections: Any) -> dict[str, Any]:
    """The result of `distgd train`, tracking at its defaults; what the run wrote is removed."""
    command = python("distgd", "train", config(name, workers, steps, folder, **sections), "--json")
    return result_of(command, folder)


def result_of(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a `distgd train` with `--json` in a folder, which is empty again afterwards."""
    try:
        return outside.run(command, folder, environment()).checked().result
    finally:
        clear(folder)


def clear(folder: Path) -> None:
    """Remove runs and MLflow's store."""
    for left in ("runs", "mlruns"):
        shutil.rmtree(folder / left, ignore_errors=True)
    for file in ("mlflow.db", "slow"):
        (folder / file).unlink(missing_ok=True)


# Others.


def ray_train(workers: int, parameters: int, steps: int, folder: Path) -> dict[str, Any]:
    """Ray Train on `synthetic`: what `proofs.ray_train` writes, and `began`, when its process was started."""
    out, began = folder / "ray_train.json", time.time()
    command = python("proofs.ray_train", workers, parameters, steps + WARM, out)
    outside.run(command, folder, environment(OMP_NUM_THREADS="1", RAY_AUTH_MODE="disabled")).checked()
    return {"began": began, **json.loads(out.read_text(encoding="utf-8"))}


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
