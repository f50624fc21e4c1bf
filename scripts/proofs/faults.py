"""The rows of `scripts/prove faults`: what is lost costs no bit and no sample, and is seen to in time."""

from __future__ import annotations

import random
import shutil
import signal
import statistics
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import test_checkpoint
import test_recovery
import test_resume

from distgd import train
from distgd.audit import audit, read
from distgd.checkpoint import newest
from distgd.trainer import launch
from proofs import strike
from proofs.rows import Bench, Measured, Proof

proof = Proof()

MODES = ("sync", "bounded", "async")
BLIND = mock.patch("distgd.trainer.write_report", lambda run_dir: run_dir / "report" / "index.html")


def digits(folder: Path, steps: int, **more: Any) -> dict[str, Any]:
    """A run on Ray with 3 workers and 2 servers."""
    given: dict[str, Any] = {
        "task": "digits",
        "run": {"name": "run", "storage": str(folder / "runs")},
        "batch": {"size": 128, "slots": 4},
        "stop": {"steps": steps},
        "optimizer": {"name": "adam", "lr": 0.001},
        "eval": {"every": {"steps": 1000}},
        "cluster": {"workers": 3, "servers": 2},
        "checkpoint": {"every": {"seconds": 5.0}},
        "tracking": {"uri": "none"},
    }
    return {key: {**given.get(key, {}), **more.get(key, {})} if key in more else value for key, value in given.items()}


def counting(folder: Path, mode: str, epochs: int) -> dict[str, Any]:
    """A run that counts how often each sample was applied; plain SGD, exact in float32."""
    given = digits(folder, 1)
    slots = {"sync": 128, "bounded": 32, "async": 32}[mode]  # samples of an update
    given |= {"task": {"name": "counting", "args": {"samples": 4096}}, "stop": {"epochs": epochs}}
    return given | {"optimizer": {"name": "sgd", "lr": float(slots)}, "consistency": {"mode": mode}}


def alone(folder: Path, steps: int) -> str:
    """The fingerprint of the same run on one thread, where nobody is lost."""
    calm = digits(folder, steps, cluster={"backend": "inprocess", "workers": 1, "servers": 1})
    return str(train({**calm, "run": {**calm["run"], "name": "calm"}, "checkpoint": {"every": None}}).weights_sha256)


@proof.row("10,000 schedules, none stuck or failed; sync same bits; every sample once in all; each step logged once")
def simulated(bench: Bench) -> Measured:
    """Random deaths of workers, shards, the evaluator, in virtual time, all modes, with the real trainer and files."""
    schedules, killed, bad = 60 if bench.quick else 1500, Counter[str](), []
    with BLIND:
        whole = test_resume.run(bench.folder / "whole")
        for seed in range(schedules):
            mode, path = MODES[seed % 3], bench.folder / str(seed)
            chance = random.Random(seed)
            cluster = test_recovery.Chaos(seed, chance.choice([10.0, 30.0, 60.0]), test_recovery.ROLES[-1])
            given = test_resume.config(path, mode, checkpoint={"every": {"steps": chance.choice([2, 5, 30])}})
            try:
                done = launch(given, "x", lambda event: None, task=test_resume.Ragged(), cluster=cluster)
            except Exception as error:  # noqa: BLE001 - whatever it is, the seed is named
                bad.append(f"{mode} {seed}: {str(error)[:80]}")
                continue
            right = done.samples == whole.samples and test_resume.clean(path)
            right &= test_resume.steps(path) == list(range(1, test_resume.STEPS + 1))
            right &= mode != "sync" or done.weights_sha256 == whole.weights_sha256
            bad += [] if right else [f"{mode} {seed}"]
            killed.update(cluster.killed)
            shutil.rmtree(path)
    found = f"{schedules:,} schedules, {len(bad)} bad {bad[:3] if bad else ''}; killed " + ", ".join(
        f"{count} {role}s" for role, count in sorted(killed.items())
    )
    conditions = "fewer schedules than demanded: deaths alone, no lost or doubled messages; a seed replays its schedule"
    return Measured(found, not bad and schedules >= 10_000, conditions, "no bad one in 60" if bench.quick else None)


@proof.row("40 of 40 same bits, each step logged once, every sample once")
def stopped_and_resumed(bench: Bench) -> Measured:
    """Stopped at each of 40 steps and resumed on other numbers of workers and servers.

    Dropout, BatchNorm, a schedule, Adam, and a batch that does not divide the samples.
    """
    steps, right = (6 if bench.quick else 40), []
    more: dict[str, Any] = {"stop": {"steps": 41}}
    with BLIND, mock.patch.object(test_resume, "STEPS", 41):
        whole = test_resume.run(bench.folder / "whole", **more)
        for step in range(1, steps + 1):
            path = bench.folder / str(step)
            test_resume.interrupted(path, step, **more)
            cluster = {"workers": 1 + step % 4, "servers": 1 + step % 3}
            done = test_resume.run(path, "auto", cluster=cluster, **more)
            same = done.weights_sha256 == whole.weights_sha256 and test_resume.clean(path)
            right.append(same and test_resume.steps(path) == list(range(1, 42)))
    return Measured(
        f"{sum(right)} of {steps}", all(right), "in process; Ctrl-C", f"all of {steps}" if bench.quick else None
    )


@proof.row("500 of 500 found, the file named, the checkpoint before taken; nothing in them was run")
def damaged(bench: Bench) -> Measured:
    """Checkpoints damaged in 500 ways: bits, cuts, swaps, mixes, links, paths outside, foreign runs, pickles."""
    layout, made = test_checkpoint.LAYOUT, bench.folder / "made"
    good, other = (
        test_checkpoint.make(made, layout, version=7),
        test_checkpoint.make(made, layout, version=5, name="NAdam"),
    )
    foreign = test_checkpoint.make(bench.folder / "foreign", layout, version=7, run="ffff")
    before = test_checkpoint.make(bench.folder / "before", layout, version=3)
    kinds, missed = Counter[str](), []
    for what, spoil in test_checkpoint.damages(good, other, foreign, random.Random(1)):
        checkpoints = bench.folder / "spoiled"
        shutil.copytree(before.folder, checkpoints / "v3-t1")
        shutil.copytree(good.folder, checkpoints / "v7-t1")
        spoil(checkpoints / "v7-t1")
        said: list[str] = []
        found = newest(checkpoints, test_checkpoint.RUN, said)
        named = not (checkpoints / "v7-t1" / "manifest.json").exists() or str(checkpoints / "v7-t1") in "".join(said)
        missed += [] if found is not None and found.manifest.step == 3 and named else [what]
        kinds[what] += 1
        shutil.rmtree(checkpoints)
    total = kinds.total()
    ran = Path("/tmp/distgd-was-here").exists()
    return Measured(
        f"{total - len(missed)} of {total}, {len(kinds)} kinds {missed[:3] or ''}",
        not missed and total >= 500 and not ran,
    )


@proof.row("sync: same bits; counting in all modes: every weight equals the epochs; nothing hangs")
def workers_killed(bench: Bench) -> Measured:
    """`kill -9` of a random worker every 2 s, 50 times, real Ray."""
    times = 4 if bench.quick else 50
    steps, epochs = (2500, 80) if bench.quick else (25_000, 900)
    run = strike.struck(digits(bench.folder, steps), ["Worker"], every=2.0, times=times)
    same, found = run.result["weights_sha256"] == alone(bench.folder, steps), run.audit()
    settings = [_line("sync, digits", run, same and found.clean)]
    exact = []
    for mode in MODES:
        given = counting(bench.folder / mode, mode, epochs)
        run = strike.struck(given, ["Worker"], every=2.0, times=max(2, times // 3))
        weights = np.array(list(test_checkpoint.load_file(run.run_dir / "model.safetensors").values()))
        exact.append(bool((weights == epochs).all()) and run.audit().clean)
        settings.append(_line(f"{mode}, counting", run, exact[-1]))
    struck = sum(int(setting["kills"]) for setting in settings)
    return Measured(
        f"same bits {same}, ledger clean {found.clean}; counting exact {exact}; {struck} kills, none hung",
        same and found.clean and all(exact),
        "3 workers, 2 servers; counting struck a third as often, as its runs are shorter",
        settings=settings,
    )


def _line(what: str, run: strike.Struck, right: bool) -> dict[str, Any]:
    return {
        "run": what,
        "kills": len(run.signals),
        "told": sum(" is gone" in text for text in run.said),
        "joined again": sum("there again" in text for text in run.said),
        "exact": str(right),
    }


@proof.row("same bits, every sample once, at most one checkpoint interval done again")
def anybody_killed(bench: Bench) -> Measured:
    """`kill -9` of a random process of any role, the driver among them, 30 times, `--resume auto`."""
    times, steps = (4, 4000) if bench.quick else (30, 20_000)
    config = bench.folder / "run.yaml"
    import yaml

    config.write_text(yaml.safe_dump(digits(bench.folder, steps)), encoding="utf-8")
    numbers = bench.folder / "runs" / "struck" / "checkpoints"
    run = strike.struck_with_driver(
        config,
        bench.folder,
        ["Worker", "Server", "Evaluator", "Driver"],
        every=5.0,
        times=times,
        due=lambda seconds: seconds > 8.0 and numbers.exists(),
    )
    same, found = (
        run.result.get("weights_sha256") == alone(bench.folder, steps),
        audit(read(run.run_dir / "ledger.jsonl")),
    )
    return Measured(
        f"same bits {same}; ledger clean {found.clean}, {found.steps:,} steps, {found.rollbacks} rollbacks; "
        f"{len(run.signals)} kills, {run.starts} starts",
        same and found.clean and found.steps == steps and len(run.signals) >= times,
        "3 workers, 2 servers, a checkpoint every 5 s",
    )


@proof.row("worker p95 <= 2 s, as survivors take over; shard <= 15 s")
def death_to_commit(bench: Bench) -> Measured:
    """From a death to the next commit."""
    times = 3 if bench.quick else 15
    every = 8.0
    workers = strike.struck(
        digits(bench.folder / "w", 4000 if bench.quick else 25_000), ["Worker"], every=every, times=times
    )
    shards = strike.struck(
        digits(bench.folder / "s", 4000 if bench.quick else 16_000), ["Server"], every=20.0, times=max(2, times // 2)
    )
    stalls = {name: [_stall(run, at) for at in run.signals] for name, run in (("worker", workers), ("shard", shards))}
    p95 = float(np.percentile(stalls["worker"], 95))
    found = "; ".join(
        f"{name}: median {statistics.median(s):.2f} s, worst {max(s):.2f} s of {len(s)}" for name, s in stalls.items()
    )
    return Measured(
        f"{found}; worker p95 {p95:.2f} s", p95 <= 2.0 and max(stalls["shard"]) <= 15.0, "cold replacements, no standby"
    )


def _stall(run: strike.Struck, at: float) -> float:
    """The longest time without a commit that begins in the second after a signal: what was decided before goes on."""
    times = [c for c in run.commits if c >= at - 1.0]
    pairs = [(b - a) for a, b in pairwise(times) if a <= at + 1.0]
    return max(pairs, default=0.0)


@proof.row("late pushes without effect: same bits; each stopped process was found, replaced and is gone")
def stopped(bench: Bench) -> Measured:
    """SIGSTOP of a worker and of a shard until each is replaced, real Ray."""
    times = 1 if bench.quick else 5
    lines, right = [], []
    for role in ("Worker", "Server"):
        steps = 5000 if bench.quick else 20_000
        given = digits(bench.folder / role, steps)
        run = strike.struck(given, [role], every=15.0, times=times, number=signal.SIGSTOP)
        silent = sum("silent for" in text for text in run.said)
        same = run.result["weights_sha256"] == alone(bench.folder / role, steps)
        right.append(same and silent >= len(run.signals) > 0 and run.audit().clean)
        lines.append(f"{role.lower()}: {len(run.signals)} stopped, {silent} found silent, same bits {same}")
    return Measured("; ".join(lines), all(right), "fewer than 20 each; without SIGCONT, as a stopped process is killed")


@proof.row("step time <= 1.10 x; stall <= 3.5 % at every 30 s")
def cost(bench: Bench) -> Measured:
    """What checkpoints and heartbeats cost without faults, 1 million parameters, in turns."""
    rounds, seconds = (1, 40.0) if bench.quick else (3, 95.0)
    times: dict[str, list[float]] = {"with": [], "without": []}
    lost: list[float] = []
    for turn in range(rounds):
        for name, every in (("with", {"seconds": 30.0}), ("without", None)):
            given = digits(bench.folder / f"{name}{turn}", 10**6, cluster={"workers": 2, "servers": 1})
            given |= {"task": {"name": "synthetic", "args": {"parameters": 10**6}}, "batch": {"size": 2, "slots": 2}}
            given |= {"checkpoint": {"every": every}, "stop": {"seconds": seconds}}
            commits: list[float] = []
            marks: list[float] = []

            def watch(event: dict[str, Any], commits: list[float] = commits, marks: list[float] = marks) -> None:
                (commits if event["event"] == "step" else marks if event["event"] == "checkpoint" else []).append(
                    time.monotonic()
                )

            done = train(given, on_event=watch)
            times[name].append(float(done.step_ms["p50"] or 0.0))
            if name == "with":
                gaps = np.diff(commits)
                lost.append(
                    float(
                        max(
                            (g for g, c in zip(gaps, commits, strict=False) if any(abs(c - m) < 2 for m in marks)),
                            default=0,
                        )
                    )
                )
    ratio = statistics.median(times["with"]) / statistics.median(times["without"])
    stall = max(lost) / 30.0
    return Measured(
        f"step {ratio:.3f} x; the longest within 2 s of a checkpoint {1e3 * max(lost):.0f} ms, {stall:.2%} of 30 s",
        ratio <= 1.10 and stall <= 0.035,
        f"medians of {rounds} turns of {seconds:g} s, 2 workers, 1 server, Adam; with: checkpoint.every 30 s",
    )
