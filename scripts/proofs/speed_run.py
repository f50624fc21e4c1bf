"""The rows of `scripts/prove speed` about whole runs: a slow worker, start-up, evenness, length, many workers."""

from __future__ import annotations

import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from proofs import contest
from proofs.contest import ours
from proofs.models import SAMPLES, SLOWER
from proofs.rows import Bench, Measured, Proof
from proofs.watching import Seen, last_step, of_the_run, see, watched

proof = Proof()

CONFIGS = contest.ROOT / "configs"
SLEEP_MS = 20
WORKERS = 4
MODES: dict[str, dict[str, Any]] = {
    "sync, quorum 3 of 4": {"quorum": 3},
    "bounded, s = 16": {"mode": "bounded", "staleness": 16},
    "async": {"mode": "async"},
}


@proof.row("applied samples/s >= 2.5 x DDP's in each mode (aim: 3.5)")
def straggler(bench: Bench) -> Measured:
    """4 workers whose compute is a sleep, one of them five times slower: applied samples/s over DDP's."""
    name, steps = f"sleepy:{SLEEP_MS}", 40 if bench.quick else 200
    theirs = 1e3 * WORKERS * SAMPLES["sleepy"] / contest.ddp(name, WORKERS, steps // 4, [25], bench.folder)[0].mean
    settings = []
    for mode, keys in MODES.items():
        result = ours(name, WORKERS, steps, bench.folder, consistency=keys)
        dropped = result["dropped_samples"] / (result["samples"] + result["dropped_samples"])
        rate = result["samples_per_s"]
        row = {"mode": mode, "samples/s": rate, "DDP samples/s": theirs, "ours / DDP": rate / theirs}
        settings.append({**row, "dropped": f"{dropped:.1%}", "staleness, most": result["staleness"]["max"]})
    found = "; ".join(f"{s['mode']} {s['ours / DDP']:.2f} (dropped {s['dropped']})" for s in settings)
    holds = all(setting["ours / DDP"] >= 2.5 for setting in settings)
    conditions = f"sleeps of {SLEEP_MS} and {SLEEP_MS * SLOWER} ms"
    return Measured(found, holds, conditions, settings=settings)


# Start-up.


def to_first_commit(folder: Path, parameters: int) -> float:
    """Seconds from a process's start until its run has written down the first step."""
    command = contest.python("distgd", "train", contest.config(f"synthetic:{parameters}", 2, 20, folder))
    began, quiet = time.perf_counter(), subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, env=contest.environment(), stdout=quiet, stderr=quiet)
    try:
        while last_step(folder) < 0 and process.poll() is None:
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.wait(timeout=120):
            raise RuntimeError(f"distgd ended with {process.returncode}")
    finally:
        process.kill()
    contest.clear(folder)
    return seconds


@proof.row("Ray Train's / ours >= 1.5 (aim: 2.5)")
def start_up(bench: Bench) -> Measured:
    """From a process's start to the first commit, 2 workers: Ray Train's time over ours."""
    parameters = 1_000_000

    def ray_train() -> float:
        found = contest.ray_train(2, parameters, 5, bench.folder)
        return float(found["first"] - found["began"])

    runs = {"ours": lambda: to_first_commit(bench.folder, parameters), "Ray Train": ray_train}
    times = contest.take_turns(runs, 1 if bench.quick else 3)
    ratio = times["Ray Train"].median / times["ours"].median
    told = ", ".join(f"{name} {found.median:.1f} s ({found.spread})" for name, found in times.items())
    return Measured(f"{ratio:.2f}: {told}", ratio >= 1.5, "each on a Ray cluster that it starts for itself")


# Evenness, and ten thousand steps.


@proof.row("p95 / p50 <= 2")
def steps_are_even(bench: Bench) -> Measured:
    """Steps of the quickstart take about the same time."""
    found = []
    for _ in range(1 if bench.quick else 3):
        epochs = "stop.epochs=5" if bench.quick else "stop.epochs=30"
        command = contest.python("distgd", "train", CONFIGS / "quickstart.yaml", epochs, "--json")
        found.append(contest.result_of(command, bench.folder)["step_ms"])
    ratios = [step["p95"] / step["p50"] for step in found]
    told = ", ".join(f"{step['p95']:.2f} / {step['p50']:.2f} ms" for step in found)
    ratio = statistics.median(ratios)
    return Measured(f"{ratio:.2f}, median of {told}", ratio <= 2, "configs/quickstart.yaml")


def at_steps(bench: Bench, first: int, last: int) -> tuple[Seen, Seen, float]:
    """What driver and actors of a run hold once these steps are done; the growth of all processes, Ray's included."""
    seen: dict[int, tuple[Seen, Seen]] = {}

    def look(processes: list[str]) -> bool:
        done = last_step(bench.folder)
        for step in (first, last):
            if done >= step and step not in seen:
                seen[step] = see(of_the_run(processes)), see(processes)
        return last in seen

    path = contest.config("synthetic:100000", 2, last + last // 5, bench.folder)
    watched(contest.python("distgd", "train", path, "--json"), bench.folder, contest.environment(), look)
    contest.clear(bench.folder)
    (before, all_before), (after, all_after) = seen[first], seen[last]
    return before, after, all_after.resident / all_before.resident - 1


def many_workers(bench: Bench) -> tuple[int, float, float]:
    """How many, and milliseconds of a slot with 4 and with so many."""
    workers, steps = (8, 50) if bench.quick else (16, 300)
    few, many = (
        ours("synthetic:100000", count, steps, bench.folder)["step_ms"]["p50"] / count for count in (4, workers)
    )
    return workers, few, many


@proof.row("memory < +2 %, the same open files and segments; a slot of 16 workers costs at most twice one of 4")
def nothing_grows(bench: Bench) -> Measured:
    """10,000 steps do not grow memory, open files or segments; 16 workers on 2 cores neither collapse nor deadlock."""
    first, last = (600, 1500) if bench.quick else (2000, 10_000)
    before, after, with_ray = at_steps(bench, first, last)
    workers, few, many = many_workers(bench)
    growth = after.resident / before.resident - 1
    found = f"resident {before.resident / 1e6:.0f} MB at step {first:,}, {growth:+.2%} at {last:,}; "
    found += f"with Ray's own {with_ray:+.2%}; files {before.files} and {after.files}, "
    found += f"segments {before.segments} and {after.segments}; "
    found += f"{workers} workers: {many:.2f} ms a slot, 4 workers: {few:.2f} ms"
    same = (before.files, before.segments, before.processes) == (after.files, after.segments, after.processes)
    holds = growth < 0.02 and same and many <= 2 * few
    return Measured(found, holds, "synthetic, 0.1M parameters; resident sizes of the run's driver and actors")
