"""Rows of `scripts/prove faults`: kills between file operations, a full disk, who stands still and goes on, a soak."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import test_checkpoint
import test_recovery
import test_resume
import test_zombie
import yaml

from distgd import train
from distgd.audit import audit, read
from proofs import outside, strike, watching
from proofs.rows import Bench, Measured, Proof, Skipped
from proofs.strike import BLIND, digits

proof = Proof()


@proof.row("never a wrong or half load, at most one checkpoint lost, nothing to clear away by hand")
def file_operations(bench: Bench) -> Measured:
    """A process gone at every call that changes a file of a checkpoint."""
    found, place, killed = Counter[str](), 0, True
    while killed:
        place += 1
        killed, step = test_checkpoint.killed_at(place, bench.folder / str(place))
        found["the new one" if step == 5 else "the one before" if step == 3 else f"step {step}"] += killed
    right = set(found) <= {"the new one", "the one before"} and place > 15
    told = ", ".join(f"{what} {count}" for what, count in sorted(found.items()))
    return Measured(
        f"{place - 1} places; found then: {told}", right, "open, write, fsync, mkdir, rename, unlink, rmdir"
    )


FILLS = """
set -u
mount -t tmpfs -o size=2m none "$1"
"$2" train "$3" run.storage="$1" run.name=run --resume auto > "$4/full" 2>&1; echo $? > "$4/full.code"
mount -o remount,size=200m,ro "$1"
"$2" train "$3" run.storage="$1" run.name=run --resume auto > "$4/ro" 2>&1; echo $? > "$4/ro.code"
mount -o remount,rw "$1"
"$2" train "$3" run.storage="$1" run.name=run --resume auto --json > "$4/again" 2> "$4/said"; echo $? > "$4/again.code"
cp "$1/run/ledger.jsonl" "$4"
"""


@proof.row("a clear error; once there is room the same command ends with the same bits, every sample once")
def full_disk(bench: Bench) -> Measured:
    """A run folder on a disk that fills up, then is read-only, then is neither."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        raise Skipped("not root, so that no disk of one's own can be mounted")
    steps = 4000
    given = digits(bench.folder, steps, cluster={"backend": "inprocess"}, checkpoint={"every": {"steps": 100}})
    del given["run"]
    calm = train({**given, "run": {"name": "calm", "storage": str(bench.folder)}})
    (bench.folder / "disk").mkdir()
    (bench.folder / "run.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    arguments = [str(bench.folder / "disk"), outside.DISTGD, str(bench.folder / "run.yaml"), str(bench.folder)]
    command = ["unshare", "-m", "bash", "-c", FILLS, "fills", *arguments]
    outside.run(command, bench.folder).checked()
    codes = {name: int((bench.folder / f"{name}.code").read_text()) for name in ("full", "ro", "again")}
    last = {name: (bench.folder / name).read_text(encoding="utf-8").strip().splitlines()[-1] for name in codes}
    again = json.loads(last["again"])
    same, found = again["weights_sha256"] == calm.weights_sha256, audit(read(bench.folder / "ledger.jsonl"))
    clear = "No space left" in last["full"] and codes["full"] == 1
    clear &= "Read-only" in (bench.folder / "ro").read_text(encoding="utf-8") and codes["ro"] in (1, 2)
    went_on = found.rollbacks >= 1 and again["steps"] == steps
    return Measured(
        f"full: exit {codes['full']}, read-only: exit {codes['ro']}, then exit {codes['again']}, same bits {same}, "
        f"ledger clean {found.clean}, {found.rollbacks} rollback; said: {last['full'][:160]}",
        clear and same and found.clean and went_on and codes["again"] == 0,
        "a disk of 2 MB in a namespace of its own, one process",
    )


@proof.row("every late push and late write without effect: same bits, every sample once")
def goes_on(bench: Bench) -> Measured:
    """A worker, a shard, a machine's adder or the evaluator stands still, is replaced, cannot be ended, and goes on.

    In virtual time, at each of some points of the protocol; over two machines worker 0 adds for its own.
    """
    cases = test_zombie.CASES[:: 8 if bench.quick else 1]
    lates = test_zombie.LATE[1:2] if bench.quick else (*test_zombie.LATE, 4e-3, 1.5e-2)
    wrong, who, sent, told = [], Counter[str](), Counter[str](), 0
    with BLIND:
        whole = test_resume.run(bench.folder / "whole")
        for number, (mode, machines, whom, when) in enumerate(cases):
            for late in lates:
                path = bench.folder / f"{number}-{late}"
                path.mkdir()
                done, cluster = test_zombie.stood_still(path, mode, machines, whom, when, late)
                right = test_recovery.right(done, path, whole, mode) and len(cluster.zombies) == 1
                wrong += [] if right else [f"{mode} {whom} {when}"]
                who["adder" if whom == "worker 0" and machines > 1 else whom.split()[0]] += 1
                sent.update(cluster.sent)
                told += cluster.told
                shutil.rmtree(path)
    counts = ", ".join(f"{role} {count}" for role, count in sorted(who.items()))
    found = (
        f"{len(wrong)} of {who.total()} wrong{wrong[:3] or ''}; {counts}; {sent.total():,} late messages, {told} told"
    )
    enough = bench.quick or min(who.values()) >= 20
    return Measured(found, not wrong and enough and sent.total() > 0 and told > 0, "three modes, 1 and 2 machines")


POINTS = {
    "worker 1": ["GradientArrived", "PullRequested", "GradientArrived"],
    "server 0": ["WeightsSent", "Commit", "StepCommitted"],
    "server 1": ["ShardFilled", "WeightsSent", "ShardWritten"],
    "evaluator": ["Evaluated"],
}


@proof.row("same bits, every sample once; a worker's death uses no checkpoint")
def points_on_ray(bench: Bench) -> Measured:
    """The main points of the protocol on real Ray: SIGKILL before and after a message of a kind, of each role."""
    lines, right = [], []
    for roles in (["worker 1"], ["server 0", "server 1", "evaluator"]):
        plan = [
            {"what": "kill", "whom": whom, "when": {"message": kind, "number": 2, "step": at, "sent": sent}}
            for whom in roles
            for at, (kind, sent) in enumerate(
                [(kind, sent) for kind in POINTS[whom] for sent in (False, True)][:: 3 if bench.quick else 1]
            )
        ]
        apart = 4000 if roles == ["worker 1"] else 2000  # nobody waits for a worker or evaluator that is started anew
        for number, fault in enumerate(plan):
            fault["when"]["step"] = apart * (number + 1)  # type: ignore[index]
        folder = bench.folder / roles[0].split()[0]
        folder.mkdir()
        (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
        cadence = {"eval": {"every": {"steps": 500}}, "checkpoint": {"every": {"seconds": 2.0}}}
        given = digits(folder, apart * (len(plan) + 2), **cadence)
        done = train({**given, "faults": {"plan": str(folder / "plan.yaml")}})
        calm = {"cluster": {"backend": "inprocess", "workers": 1, "servers": 1}, "checkpoint": {"every": None}}
        same = done.weights_sha256 == train({**given, **calm, "run": {**given["run"], "name": "calm"}}).weights_sha256
        found = audit(read(Path(done.run_dir) / "ledger.jsonl"))
        right += [same, found.clean, done.faults == f"{len(plan)} of {len(plan)} injected"]
        right += [found.rollbacks == 0] if roles == ["worker 1"] else [found.rollbacks > 0]
        lines.append(f"{', '.join(roles)}: {done.faults}, same bits {same}, {found.rollbacks} rollbacks")
    return Measured("; ".join(lines), all(right), "3 workers, 2 servers, a checkpoint every 2 s, digits, Adam")


@proof.row("memory, files and segments flat: within 10 % and 5 of the first third's")
def soak(bench: Bench) -> Measured:
    """180,000 steps in sync mode on Ray, a worker or server killed each minute."""
    steps, every, least = (4000, 10.0, 2) if bench.quick else (180_000, 60.0, 5)
    given = digits(bench.folder, steps, checkpoint={"every": {"seconds": 10.0}})
    config, mark, chance = bench.folder / "run.yaml", f"{outside.MARK}={secrets.token_hex(8)}", random.Random(0)
    config.write_text(yaml.safe_dump(given), encoding="utf-8")
    looks: list[tuple[int, watching.Seen]] = []
    environment = outside.environment() | dict([mark.split("=")])
    with (bench.folder / "said").open("w") as said:
        driver = subprocess.Popen(
            [outside.DISTGD, "train", str(config)], cwd=bench.folder, env=environment, stdout=said, stderr=said
        )
        kills, due = 0, time.monotonic() + every
        while driver.poll() is None:
            time.sleep(2.0)
            step = watching.last_step(bench.folder)
            if step >= 0:
                looks.append((step, watching.see(watching.of_the_run(outside.marked(mark)))))
            if time.monotonic() > due and step >= 0:
                victims = strike.children(psutil.Process(driver.pid), ["Worker", "Server"])
                if victims:
                    chance.choice(victims).kill()
                    kills, due = kills + 1, time.monotonic() + every
    third = max(1, len(looks) // 3)
    first, last = looks[2 : 2 + third], looks[-third - 2 : -2]

    def median(of: str, part: list[tuple[int, watching.Seen]]) -> float:
        return float(statistics.median(getattr(seen, of) for _, seen in part))

    memory = median("proportional", last) / median("proportional", first)
    more = {of: median(of, last) - median(of, first) for of in ("files", "segments", "processes")}
    found = audit(read(bench.folder / "runs" / "run" / "ledger.jsonl"))
    flat = memory <= 1.10 and all(abs(value) <= 5 for value in more.values())
    return Measured(
        f"{found.steps:,} steps, {kills} kills, ledger clean {found.clean}; memory {memory:.3f} x "
        f"({median('proportional', first) / 2**20:.0f} MB at first), files {more['files']:+.0f}, "
        f"segments {more['segments']:+.0f}, processes {more['processes']:+.0f}",
        flat and found.clean and driver.returncode == 0 and found.steps == steps and kills >= least,
        f"medians of the first and last third of {len(looks)} looks, 2 s apart; 3 workers, 2 servers",
    )
