"""A run seen from outside: the command line as a person types it, and what is left on the machine afterwards.

Processes of a run are known by a mark in their environment, which all that they start inherit, Ray's too. Segments,
folders and sockets are those that were not there before and that no process without the mark uses.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DISTGD = str(Path(sys.executable).with_name("distgd"))
MARK = "DISTGD_PROOF"
LEFT_OUT = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "PYTHONPATH")
PATIENCE = 900.0  # seconds that any command gets


@dataclass(frozen=True)
class Ended:
    """A command that has ended; `seconds` are from its start to its end."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def result(self) -> dict[str, Any]:
        """What `--json` printed."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found

    def checked(self) -> Ended:
        """Itself, where it ended with 0."""
        if self.code != 0:
            raise RuntimeError(f"the command ended with {self.code}: {self.err.strip()[-300:]}")
        return self


def distgd(*arguments: str, cwd: Path) -> Ended:
    """Run `distgd ARGUMENTS` to its end in a folder, with nothing of the shell's own settings."""
    return run([DISTGD, *arguments], cwd)


def run(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> Ended:
    """Run a command to its end, in a person's environment or in `env`; TimeoutExpired after `PATIENCE`."""
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr, time.perf_counter() - began)


def environment(**more: str) -> dict[str, str]:
    """The environment of a person who has set nothing."""
    return {name: value for name, value in os.environ.items() if name not in LEFT_OUT} | more


@dataclass(frozen=True)
class Aftermath:
    """A run's exit code and last words, the most processes it had, and what was still there `seconds` after its end."""

    code: int
    said: str
    processes: int
    left: frozenset[str]
    seconds: float


def aftermath(*arguments: str, cwd: Path, interrupt: Callable[[], bool] | None = None, patience: float) -> Aftermath:
    """Run `distgd ARGUMENTS`, then wait until nothing of it is left, at most `patience` seconds.

    Args:
        interrupt: once it is true, the run's process group gets SIGINT, which is what a terminal sends on Ctrl-C.
    """
    mark = f"{MARK}={secrets.token_hex(8)}"
    before = _traces(mark)
    # A shell's background job ignores SIGINT, and so would all that it starts.
    command = ["env", "--default-signal=INT", mark, DISTGD, *arguments]
    with (cwd / "output").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            processes = _watch(process, mark, interrupt or (lambda: False))
        finally:
            process.kill()
        code, ended = process.wait(), time.monotonic()
        said = (cwd / "output").read_text(encoding="utf-8").strip().splitlines()[-1:]
    while (left := _left(mark, before)) and time.monotonic() < ended + patience:
        time.sleep(0.1)
    return Aftermath(code, "".join(said), processes, left, time.monotonic() - ended)


def _watch(process: subprocess.Popen[bytes], mark: str, interrupt: Callable[[], bool]) -> int:
    """Wait for the run's end, with Ctrl-C on the way where wanted; the most processes seen at once."""
    most, interrupted, until = 0, False, time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        most = max(most, len(marked(mark)))
        if not interrupted and interrupt():
            os.killpg(process.pid, signal.SIGINT)
            interrupted = True
        time.sleep(0.2)
    return most


def _left(mark: str, before: frozenset[str]) -> frozenset[str]:
    """The traces that are new, without those that somebody else's process uses."""
    left = _traces(mark) - before
    used = _used_by_others(mark) if left else ""
    return frozenset(trace for trace in left if trace.startswith("process ") or trace.split()[1] not in used)


def _traces(mark: str) -> frozenset[str]:
    """What can be seen of runs now: processes with the mark, folders, segments, sockets."""
    folders = [f"folder {path}" for path in Path("/tmp").glob("distgd-*")]
    segments = [f"segment {path}" for path in Path("/dev/shm").iterdir()]
    sockets = [f"socket {name}" for name in _sockets().values() if "distgd" in name]
    return frozenset([*(f"process {pid}" for pid in marked(mark)), *folders, *segments, *sockets])


def _sockets() -> dict[str, str]:
    """Names of Unix sockets by inode."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()[1:])
    return {words[6]: words[7] for words in lines if len(words) > 7}


def marked(mark: str) -> list[str]:
    """The ids of all processes that have NAME=VALUE in their environment."""
    return [pid for pid in _everybody() if mark.encode() in content(pid, "environ").split(b"\0")]


def _everybody() -> list[str]:
    return [path.name for path in Path("/proc").glob("[0-9]*")]


def content(pid: str, name: str) -> bytes:
    """A file of a process; empty where the process has ended or is somebody else's."""
    try:
        return Path("/proc", pid, name).read_bytes()
    except OSError:
        return b""


def _used_by_others(mark: str) -> str:
    """Command lines, mapped and open files and socket names of all processes without the mark."""
    sockets, ours, used = _sockets(), marked(mark), []
    for pid in set(_everybody()) - set(ours):
        used += [content(pid, name).decode(errors="replace") for name in ("cmdline", "maps")]
        with suppress(OSError):
            for link in Path("/proc", pid, "fd").iterdir():
                target = os.readlink(link)
                used.append(sockets.get(target.removeprefix("socket:[").rstrip("]"), target))
    return "\n".join(used)
