"""The rows of `scripts/prove speed`: what a step costs here, under DDP, under Ray Train, with Ray's own example.

Every time is a median over turns that the contestants take one after the other; ratios are of one run. What a row
demands is what must hold; what is aimed at is said behind it and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from proofs import contest, pictures, speed_gpu, speed_nodes, speed_run
from proofs.contest import Times, geometric_mean, last_object, median_ms, ours, steps_for, take_turns
from proofs.models import SAMPLES
from proofs.rows import Bench, Measured, Proof, shown
from proofs.watching import Seen, last_step, see, watched

proof = Proof(pictures.draw)

CELLS = tuple(product((2, 4), (100_000, 1_000_000, 10_000_000, 50_000_000)))
QUICK_CELLS = ((2, 100_000), (2, 1_000_000))
RAY_TRAIN = ((2, 1_000_000), (2, 10_000_000))  # cells in which Ray Train runs too
TURNS = 3
SERVERS = (1, 2)  # of ours, the better of which is chosen as DDP's bucket is


def many_steps(workers: int, parameters: int, bench_is_quick: bool) -> int:
    """Of the faster contestants: a second or two of them."""
    return steps_for(workers, parameters, numbers=1e8 if bench_is_quick else 1e9, most=1500, least=20)


def few_steps(workers: int, parameters: int) -> int:
    """Of the slower ones."""
    return steps_for(workers, parameters, numbers=2e8, most=300)


def told(ratios: Sequence[float], cells: Sequence[tuple[int, int]]) -> str:
    """Their geometric mean, and the least with its cell."""
    least = min(range(len(ratios)), key=lambda at: ratios[at])
    workers, parameters = cells[least]
    mean = geometric_mean(ratios)
    return f"geometric mean {mean:.2f}, least {ratios[least]:.2f} (W={workers}, P={parameters / 1e6:g}M)"


# A whole step.


def step_cell(workers: int, parameters: int, bench: Bench) -> dict[str, Any]:
    """One cell: bucket size and number of servers are chosen, then both sides take turns."""
    name, folder = f"synthetic:{parameters}", bench.folder
    many, few = many_steps(workers, parameters, bench.quick), few_steps(workers, parameters)

    def run_ours(servers: int) -> float:
        found: float = ours(name, workers, many, folder, cluster={"servers": servers})["step_ms"]["p50"]
        return found

    backward: list[float] = []

    def run_ddp() -> float:
        (found,) = contest.ddp(name, workers, few, [bucket], folder)
        backward.append(found.backward)
        return found.step

    trial = max(12, few // 3)  # steps of DDP for each bucket size
    bucket = 25.0 if bench.quick else contest.best_bucket(name, workers, trial, contest.BUCKETS, folder).bucket_mb
    servers = contest.best(SERVERS[:1] if bench.quick else SERVERS, run_ours)
    times = take_turns({"ours": lambda: run_ours(servers), "DDP": run_ddp}, 1 if bench.quick else TURNS)
    rival = (
        ray_train(workers, parameters, few, folder) if (workers, parameters) in RAY_TRAIN and not bench.quick else ""
    )
    return {
        **_cell(workers, parameters, times["ours"], servers),
        **_rival("DDP", times["DDP"], times["ours"]),
        "bucket MB": bucket,
        "of that in backward": f"{Times(backward).median / times['DDP'].median:.0%}",
        "Ray Train ms": rival,
    }


def _cell(workers: int, parameters: int, ours: Times, servers: int) -> dict[str, Any]:
    return {
        "W": workers,
        "P": parameters,
        "ours ms": ours.median,
        "least-most": ours.spread,
        "servers": servers,
    }


def _rival(name: str, times: Times, ours: Times) -> dict[str, Any]:
    return {
        f"{name} ms": times.median,
        f"{name} least-most": times.spread,
        f"{name} / ours": times.median / ours.median,
    }


def ray_train(workers: int, parameters: int, steps: int, folder: Path) -> float:
    """Milliseconds of a step under Ray Train."""
    return median_ms(contest.ray_train(workers, parameters, steps, folder)["step"])


@proof.row("geometric mean >= 2.5, none below 1.6 (aim: 3.5)")
def step_costs(bench: Bench) -> Measured:
    """DDP's time over ours for a synchronous step: a trivial model through autograd, Adam, W workers, P parameters."""
    cells = QUICK_CELLS if bench.quick else CELLS
    settings = [step_cell(*cell, bench) for cell in cells]
    ratios = [setting["DDP / ours"] for setting in settings]
    holds = geometric_mean(ratios) >= 2.5 and min(ratios) >= 1.6
    return Measured(told(ratios, cells), holds, "batch.slots = W; tracking at its defaults", settings=settings)


# Synchronization alone.


@cache
def alone_cells(quick: bool) -> list[dict[str, Any]]:
    """Every cell with gradients in place; also what rows of other claims read."""
    return [alone_cell(*cell, quick) for cell in (QUICK_CELLS if quick else CELLS)]


def alone_cell(workers: int, parameters: int, quick: bool) -> dict[str, Any]:
    """One cell: ours, DDP's all-reduce, the raw floor, the server of Ray's documentation."""
    many, few = many_steps(workers, parameters, quick), few_steps(workers, parameters)

    def run_ours(servers: int) -> float:
        found: float = last_object("proofs.alone", workers, parameters, many, servers, cwd=contest.ROOT)["p50"]
        return found

    def run_floor(servers: int) -> float:
        return median_ms(last_object("proofs.floor", workers, parameters, many, servers, cwd=contest.ROOT)["step"])

    def run_ray() -> float:
        return median_ms(last_object("proofs.ray_ps", workers, parameters, max(12, few // 4), cwd=contest.ROOT)["step"])

    def run_ddp() -> float:
        return contest.ddp(f"reduce:{parameters}", workers, few, [0], contest.ROOT)[0].step

    choice = SERVERS[:1] if quick else SERVERS
    servers, floor_servers = contest.best(choice, run_ours), contest.best(choice, run_floor)
    runs = {
        "ours": lambda: run_ours(servers),
        "floor": lambda: run_floor(floor_servers),
        "DDP": run_ddp,
        "Ray": run_ray,
    }
    times = take_turns(runs, 1 if quick else TURNS - 1)
    return {
        **_cell(workers, parameters, times["ours"], servers),
        "floor ms": times["floor"].median,
        "floor servers": floor_servers,
        "ours / floor": times["ours"].median / times["floor"].median,
        **_rival("DDP", times["DDP"], times["ours"]),
        **_rival("Ray", times["Ray"], times["ours"]),
    }


@proof.row("geometric mean >= 2.5, none below 1.8 (aim: within 1.2 of the raw floor in every cell)")
def synchronization_costs(bench: Bench) -> Measured:
    """The same without the model: gradients in place, gloo's all-reduce and fused Adam over push to pull here."""
    settings = alone_cells(bench.quick)
    ratios, above = ([setting[name] for setting in settings] for name in ("DDP / ours", "ours / floor"))
    close = sum(ratio <= 1.2 for ratio in above)
    found = told(ratios, QUICK_CELLS if bench.quick else CELLS)
    found += f"; ours / floor {min(above):.2f} to {max(above):.2f}, within 1.2 in {close} of {len(above)} cells"
    holds = geometric_mean(ratios) >= 2.5 and min(ratios) >= 1.8
    return Measured(found, holds, "ours: driver, servers, workers as in a run, without Ray", settings=settings)


@proof.row("geometric mean >= 8")
def ray_documentation_costs(bench: Bench) -> Measured:
    """The same against the parameter server of Ray's documentation: one actor, gradients as Ray's objects."""
    ratios = [setting["Ray / ours"] for setting in alone_cells(bench.quick)]
    found = told(ratios, QUICK_CELLS if bench.quick else CELLS)
    return Measured(found, geometric_mean(ratios) >= 8, "times are those of the row above")


# Compute-bound.


def compute_bound(name: str, steps: int, bench: Bench) -> dict[str, Any]:
    """Samples a second of 2 workers, of DDP's 2, and of twice a single process."""
    samples = SAMPLES[name]

    def run_ours() -> float:
        return float(ours(name, 2, steps, bench.folder)["samples_per_s"])

    def run_ddp() -> float:
        return 2e3 * samples / contest.ddp(name, 2, steps, [bucket], bench.folder)[0].mean

    def run_single() -> float:
        seconds = last_object("proofs.single", name, steps + contest.WARM, cwd=bench.folder)["step"][contest.WARM :]
        return 2.0 * samples * len(seconds) / float(sum(seconds))

    buckets = contest.BUCKETS[2:3] if bench.quick else contest.BUCKETS
    bucket = (
        contest.best_bucket(name, 2, steps // 4, buckets, bench.folder).bucket_mb if len(buckets) > 1 else buckets[0]
    )
    runs = {"ours": run_ours, "DDP": run_ddp, "single": run_single}
    rates = take_turns(runs, 1 if bench.quick else TURNS)
    mine = rates["ours"].median
    return {
        "model": name,
        "ours samples/s": mine,
        "least-most": rates["ours"].spread,
        "DDP samples/s": rates["DDP"].median,
        "DDP least-most": rates["DDP"].spread,
        "bucket MB": bucket,
        "2 x single samples/s": rates["single"].median,
        "ours / DDP": mine / rates["DDP"].median,
        "ours / 2 x single": mine / rates["single"].median,
    }


@proof.row("samples/s >= 1.0 of DDP's for each (aim: 0.97 of 2 x a single process)")
def compute_bound_models(bench: Bench) -> Measured:
    """Models that compute most of the time, 2 workers, the same batch a worker: samples/s over DDP's."""
    steps = {"char-lm": 150, "mlp": 300}
    settings = [compute_bound(name, count // 5 if bench.quick else count, bench) for name, count in steps.items()]
    found = "; ".join(
        f"{s['model']} {s['ours / DDP']:.3f} of DDP's, {s['ours / 2 x single']:.3f} of 2 x a single process"
        for s in settings
    )
    holds = all(setting["ours / DDP"] >= 1.0 for setting in settings)
    return Measured(found, holds, "Adam, a server, one thread a process", settings=settings)


# Memory.


def peaks(command: Sequence[str], cwd: Path, after: int, before: int) -> tuple[Seen, Seen]:
    """The largest sum of proportional set sizes between two steps, and over all the command's life."""
    seen: list[tuple[bool, Seen]] = []

    def look(processes: list[str]) -> bool:
        seen.append((after <= last_step(cwd) < before, see(processes)))
        return False

    watched(command, cwd, contest.environment(MASTER_PORT=str(contest.port())), look)
    largest = [max((s for steps, s in seen if steps or every), key=lambda s: s.proportional) for every in (False, True)]
    return largest[0], largest[1]


@proof.row("DDP's / ours >= 1.5 (aim: 1.8)")
def memory(bench: Bench) -> Measured:
    """Memory, 4 workers, 100 million parameters, Adam: proportional set sizes of all processes, Ray's included."""
    workers, parameters = (2, 10_000_000) if bench.quick else (4, 100_000_000)
    name, steps = f"synthetic:{parameters}", 40
    command = contest.python("distgd", "train", contest.config(name, workers, steps, bench.folder), "--json")
    mine, whole = peaks(command, bench.folder, after=2, before=steps)
    contest.clear(bench.folder)
    command = contest.python("proofs.ddp", name, workers, 12, 25)
    theirs, _ = peaks(command, bench.folder, after=-1, before=1)
    ratio = theirs.proportional / mine.proportional
    found = f"{ratio:.2f}: DDP {theirs.proportional / 1e9:.2f} GB in {theirs.processes} processes, ours "
    found += f"{mine.proportional / 1e9:.2f} GB in {mine.processes}"
    conditions = f"W={workers}, P={parameters / 1e6:g}M; most seen during steps; ours at its start and end included "
    found += f" ({', '.join(f'{role} {share / 1e9:.2f}' for role, share in mine.shares.items())})"
    conditions += f"{whole.proportional / 1e9:.2f} GB"
    if bench.quick:
        return Measured(found, True, conditions, "printed: libraries outweigh so small a model")
    return Measured(found, ratio >= 1.5, conditions)


proof.extend(speed_nodes.proof)
proof.extend(speed_run.proof)


# The limit.


def copy_bandwidth(megabytes: int) -> float:
    """Bytes a second that are read and written when a large block is copied, with as many threads as torch takes."""
    source, target = torch.ones(megabytes << 18), torch.zeros(megabytes << 18)
    seconds = [contest.timed(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * source.nbytes / min(seconds)


@proof.row("printed: the limit beside the measured step")
def server_speed(bench: Bench) -> Measured:
    """A step without the model against its limit: W + 6 passes over the parameters, at the bandwidth of a copy."""
    bandwidth = copy_bandwidth(64 if bench.quick else 512)
    settings = []
    for cell in alone_cells(bench.quick)[-1:] if bench.quick else alone_cells(False):
        if cell["P"] >= 10_000_000 or bench.quick:
            limit = 1e3 * (cell["W"] + 6) * contest.BYTES * cell["P"] / bandwidth
            wanted = ("W", "P", "ours ms", "floor ms")
            settings.append(
                {**{k: cell[k] for k in wanted}, "limit ms": limit, "ours / limit": cell["ours ms"] / limit}
            )
    found = ", ".join(f"W={s['W']} P={s['P'] / 1e6:g}M: {s['ours / limit']:.2f} x the limit" for s in settings)
    return Measured(found, True, f"a copy moves {shown(bandwidth / 1e9)} GB/s", settings=settings)


proof.extend(speed_gpu.proof)
