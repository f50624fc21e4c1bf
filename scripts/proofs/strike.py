"""Runs whose processes are killed or stopped by signal while they train."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from distgd import train
from distgd.audit import Audit, audit, read
from proofs.outside import DISTGD, environment

BLIND = mock.patch("distgd.run.write_report", lambda run_dir: run_dir / "report" / "index.html")
GIVE_UP = 600.0  # seconds that a run gets, restarts included


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


def alone(folder: Path, steps: int) -> str:
    """The fingerprint of the same run on one thread, where nobody is lost."""
    calm = digits(folder, steps, cluster={"backend": "inprocess", "workers": 1, "servers": 1})
    return str(train({**calm, "run": {**calm["run"], "name": "calm"}, "checkpoint": {"every": None}}).weights_sha256)


@dataclass
class Struck:
    """A run to its end: its result, what was said of losses, the times of signals and of commits in seconds."""

    run_dir: Path
    result: Mapping[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    signals: list[float] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    starts: int = 1

    def audit(self) -> Audit:
        """What the ledger says."""
        return audit(read(self.run_dir / "ledger.jsonl"))

    def gaps(self, after: float = 0.0) -> list[float]:
        """Seconds from each signal to the first commit that is more than `after` seconds later."""
        return [min((c for c in self.commits if c > at + after), default=float("nan")) - at for at in self.signals]


def struck(
    config: Mapping[str, Any], roles: Sequence[str], *, every: float, times: int, number: int = signal.SIGKILL
) -> Struck:
    """Train; every so many seconds a random process of these roles (Worker, Server, Evaluator) gets the signal."""
    run = Struck(Path(config["run"]["storage"], config["run"]["name"]))
    chance, over = random.Random(0), threading.Event()

    def strike() -> None:
        while len(run.signals) < times and not over.wait(every):
            if victims := children(psutil.Process(), roles):
                with suppress(psutil.Error):
                    chance.choice(victims).send_signal(number)
                    run.signals.append(time.monotonic())

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            if not run.commits:
                threading.Thread(target=strike, daemon=True).start()
            run.commits.append(time.monotonic())
        elif event["event"] in ("fault", "joined"):
            run.said.append(event["message"])

    try:
        run.result = train(config, on_event=watch).as_dict()
    finally:
        over.set()
    return run


def struck_with_driver(
    config: Path, folder: Path, roles: Sequence[str], *, every: float, times: int, due: Callable[[float], bool]
) -> Struck:
    """The command line, started again with `--resume auto` whenever its driver is killed.

    Args:
        roles: Driver among them; the driver's own process.
        due: whether the run may be struck yet, so many seconds after a start.
    """
    run = Struck(folder / "runs" / "struck")
    command = [DISTGD, "train", str(config), "run.name=struck", "--resume", "auto", "--json"]
    chance, until = random.Random(0), time.monotonic() + GIVE_UP
    while time.monotonic() < until:
        began = last = time.monotonic()
        driver = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
        while driver.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
            if len(run.signals) < times and due(time.monotonic() - began) and time.monotonic() > last + every:
                with suppress(psutil.Error):
                    process = psutil.Process(driver.pid)
                    victims = children(process, roles) + ([process] if "Driver" in roles else [])
                    chance.choice(victims).kill()
                    last = time.monotonic()
                    run.signals.append(last)
        if driver.poll() != -signal.SIGKILL:
            driver.kill()
            said = driver.communicate()[0]
            run.result = json.loads(said.splitlines()[-1]) if said else {"status": f"exit {driver.returncode}"}
            return run
        run.starts += 1
    raise RuntimeError(f"not at its end after {GIVE_UP:g} s and {len(run.signals)} signals")


def children(of: psutil.Process, roles: Sequence[str]) -> list[psutil.Process]:
    """Processes of these roles that live, as Ray names them."""
    found = []
    for process in of.children(recursive=True):
        with suppress(psutil.Error, IndexError):
            name = process.cmdline()[0]
            lives = process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
            if lives and any(name.startswith(f"ray::{role}") for role in roles):
                found.append(process)
    return found
