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
import schedules
import test_checkpoint
import test_points
import test_promise
import test_recovery
import test_resume
import torch

from distgd import train
from distgd.audit import audit, read
from distgd.checkpoint import newest
from distgd.replay import replay
from distgd.transport import Loss
from proofs import lasting, strike
from proofs.rows import Bench, Measured, Proof, Skipped
from proofs.strike import BLIND, alone, digits

proof = Proof()

MODES = ("sync", "bounded", "async")


def counting(folder: Path, mode: str, epochs: int) -> dict[str, Any]:
    """A run that counts how often each sample was applied; plain SGD, exact in float32."""
    given = digits(folder, 1)
    slots = {"sync": 128, "bounded": 32, "async": 32}[mode]  # samples of an update
    given |= {"task": {"name": "counting", "args": {"samples": 4096}}, "stop": {"epochs": epochs}}
    return given | {"optimizer": {"name": "sgd", "lr": float(slots)}, "consistency": {"mode": mode}}


@proof.row("10,000 schedules, none stuck or failed; sync same bits; every sample once in all; each step logged once")
def simulated(bench: Bench) -> Measured:
    """Messages lost, doubled, late, out of order; random deaths of workers, shards, evaluator, driver; all modes.

    In virtual time, with the real trainer, files and sessions.
    """
    count = 60 if bench.quick else 10_000
    bad, happened = schedules.play(bench.folder, range(count))
    found = f"{count:,} schedules, {len(bad)} bad {bad[:3] if bad else ''}; " + ", ".join(
        f"{what} {times:,}" for what, times in sorted(happened.items())
    )
    conditions = "one in four of 24 steps, the others of 8; deaths by role, messages by what became of them"
    return Measured(
        found, not bad and (bench.quick or count >= 10_000), conditions, "no bad one in 60" if bench.quick else None
    )


@proof.row("same bits, every sample once; a worker's death uses no checkpoint")
def any_point(bench: Bench) -> Measured:
    """A process gone before or after a message of each kind that it sends, the driver among them; in virtual time."""
    met, wrong = Counter[str](), []
    with BLIND, mock.patch("distgd.rules.BUCKET", test_points.SMALL):
        whole = test_resume.run(bench.folder / "whole")
        for mode, machines in test_points.ALL:
            folder = bench.folder / f"{mode}{machines}"
            points = test_points.points(folder / "calm", mode, machines, every=not bench.quick)
            for number, point in enumerate(points[:: 6 if bench.quick else 1]):
                path = folder / str(number)
                try:
                    done = test_points.struck(path, mode, machines, point)
                    wrong += [] if test_recovery.right(done, path, whole, mode) else [f"{mode}, {point}"]
                except Exception as error:  # noqa: BLE001 - whatever it is, the point is named
                    wrong.append(f"{mode}, {point}: {str(error)[:80]}")
                met[point.role] += 1
                shutil.rmtree(path, ignore_errors=True)
    found = f"{len(wrong)} of {met.total():,} points wrong{wrong[:3] or ''}; " + ", ".join(
        f"{role} {count:,}" for role, count in sorted(met.items())
    )
    conditions = "3 workers, 2 servers; sync over 1 and 2 machines, bounded and async; each point was met"
    return Measured(found, not wrong, conditions, "one point in 6, of one number" if bench.quick else None)


@proof.row("same bits, every sample once, duplicates refused > 0")
def messages(bench: Bench) -> Measured:
    """A tenth of all messages lost, a tenth doubled, nobody killed."""
    times, happened, wrong = 3 if bench.quick else 100, Counter[str](), []
    with BLIND:
        whole = test_resume.run(bench.folder / "whole")
        for seed in range(times):
            for mode in MODES:
                path = bench.folder / f"{mode}{seed}"
                done, what = test_recovery.through_all(path, seed, mode, 5, 1e-9, test_recovery.ALL, Loss(0.1, 0.1))
                wrong += [] if test_recovery.right(done, path, whole, mode) else [f"{mode} {seed}"]
                happened += what
                shutil.rmtree(path)
    found = f"{len(wrong)} of {3 * times} runs wrong{wrong[:3] or ''}; " + ", ".join(
        f"{what} {times:,}" for what, times in sorted(happened.items())
    )
    return Measured(found, not wrong and happened["refused"] > 0, "in virtual time, three modes, two servers")


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
    times, steps = (4, 4000) if bench.quick else (30, 50_000)
    config = bench.folder / "run.yaml"
    import yaml

    config.write_text(yaml.safe_dump(digits(bench.folder, steps)), encoding="utf-8")
    numbers = bench.folder / "runs" / "struck" / "metrics.jsonl"

    def due(seconds: float) -> bool:
        """Not before the first step of this start: who is lost earlier ends the run, and is no matter for this row."""
        return numbers.exists() and numbers.stat().st_mtime > time.time() - seconds + 3.0

    run = strike.struck_with_driver(
        config,
        bench.folder,
        ["Worker", "Server", "Evaluator", "Driver"],
        every=5.0,
        times=times,
        due=due,
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


@proof.row("worker p95 <= 2 s, as survivors take over; shard <= 15 s cold, <= 5 s with a standby")
def death_to_commit(bench: Bench) -> Measured:
    """From a death to the next commit, with and without a standby process."""
    quick, times = bench.quick, 3 if bench.quick else 16
    workers = strike.struck(digits(bench.folder / "w", 4000 if quick else 60_000), ["Worker"], every=5.0, times=times)
    stalls = {"worker": [_stall(workers, at) for at in workers.signals]}
    for name, standby in (("shard, standby", True), ("shard, cold", False)):
        given = digits(bench.folder / name, 8000 if quick else 60_000, cluster={"standby": standby})
        run = strike.struck(given, ["Server"], every=12.0, times=max(2, times // 2))
        stalls[name] = [_stall(run, at) for at in run.signals]
    p95 = float(np.percentile(stalls["worker"], 95))
    found = "; ".join(
        f"{name}: median {statistics.median(s):.2f} s, worst {max(s):.2f} s of {len(s)}" for name, s in stalls.items()
    )
    enough = quick or sum(map(len, stalls.values())) >= 30
    in_time = enough and max(stalls["shard, cold"]) <= 15.0 and max(stalls["shard, standby"]) <= 5.0
    return Measured(f"{found}; worker p95 {p95:.2f} s", p95 <= 2.0 and in_time)


def _stall(run: strike.Struck, at: float) -> float:
    """The longest time without a commit that begins in the second after a signal: what was decided before goes on."""
    times = [c for c in run.commits if c >= at - 1.0]
    pairs = [(b - a) for a, b in pairwise(times) if a <= at + 1.0]
    return max(pairs, default=0.0)


@proof.row("late pushes without effect: same bits; each stopped process was found, replaced and is gone")
def stopped(bench: Bench) -> Measured:
    """SIGSTOP of a worker and of a shard until each is replaced, real Ray."""
    times = 1 if bench.quick else 20
    lines, right = [], []
    for role in ("Worker", "Server"):
        steps = 5000 if bench.quick else 50_000
        given = digits(bench.folder / role, steps)
        run = strike.struck(given, [role], every=10.0, times=times, number=signal.SIGSTOP)
        silent = sum("silent for" in text for text in run.said)
        same = run.result["weights_sha256"] == alone(bench.folder / role, steps)
        right.append(same and silent >= len(run.signals) >= times and run.audit().clean)
        lines.append(f"{role.lower()}: {len(run.signals)} stopped, {silent} found silent, same bits {same}")
    return Measured(
        "; ".join(lines), all(right), "without SIGCONT, as Ray kills who is stopped; who goes on all the same is row 15"
    )


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


@proof.row("strict: refused, the run goes on, same bits; auto: admitted, the run marked")
def another_kind(bench: Bench) -> Measured:
    """Workers with another canary: on a second Ray node torch has other vector instructions, in fact."""
    steps = 100 if bench.quick else 2000
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        raise Skipped("this CPU has one kind of vector instructions, so that nothing can compute otherwise")
    with test_promise.two_kinds_of_nodes():
        strict, refused, _ = test_promise.on_two_kinds(bench.folder, "strict", steps)
        auto, _, warnings = test_promise.on_two_kinds(bench.folder, "auto", steps)
    audits = {run.bits: audit(read(Path(run.run_dir) / "ledger.jsonl")) for run in (strict, auto)}
    same = strict.weights_sha256 == test_promise.alone(bench.folder)
    other = auto.weights_sha256 != test_promise.alone(bench.folder)
    right = len(refused) == 2 and same and strict.bits == "promised" and strict.steps == auto.steps == steps
    right &= len(warnings) == 1 and auto.bits == "not promised"
    right &= all(found.clean and found.bits == bits for bits, found in audits.items())
    return Measured(
        f"strict: {len(refused)} of 4 refused, {strict.steps:,} steps, same bits {same}; "
        f"auto: {len(warnings)} warning, bits {auto.bits}, other bits {other}; ledgers clean and marked alike",
        right,
        "4 workers, 2 on a node with ATEN_CPU_CAPABILITY=default; one machine",
    )


@proof.row("replay gives the same bits")
def replayed(bench: Bench) -> Measured:
    """Async and bounded runs whose workers are killed, made again in one process, real Ray."""
    times, steps = (2, 1500) if bench.quick else (10, 6000)
    lines, same = [], []
    for mode in ("async", "bounded"):
        given = digits(bench.folder / mode, steps, checkpoint={"every": {"seconds": 5.0}})
        run = strike.struck({**given, "consistency": {"mode": mode}}, ["Worker"], every=3.0, times=times)
        found = replay(run.run_dir)
        same.append(found.same and found.weights_sha256 == run.result["weights_sha256"])
        lines.append(f"{mode}: {found.updates:,} updates, {len(run.signals)} kills, same bits {same[-1]}")
    return Measured("; ".join(lines), all(same), "3 workers, 2 servers, Adam")


proof.extend(lasting.proof)
