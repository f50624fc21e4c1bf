"""Processes of a command while it runs: their memory, their open files, their shared segments.

They are found by a mark in their environment, as in `proofs.outside`, so that Ray's are among them.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from proofs import outside

LOOK = 0.05  # seconds between two looks
ROLES = {  # words of command lines
    b"ray::Server": "servers",
    b"ray::Worker": "workers",
    b"ray::Evaluator": "evaluator",
    b"-m\0distgd\0": "driver",
    b"ray": "Ray",
}
TAIL = 20_000  # bytes of a file of events that are read


@dataclass(frozen=True)
class Seen:
    """What all processes together hold at one moment; sizes in bytes, `shares` are proportional ones by role."""

    processes: int
    proportional: int
    resident: int
    files: int
    segments: int
    shares: Mapping[str, int]


def watched(
    command: Sequence[str], cwd: Path, environment: dict[str, str], look: Callable[[list[str]], bool]
) -> outside.Ended:
    """Run a command to its end and call `look` with its processes' ids again and again, until it is true.

    Raises:
        RuntimeError: the command failed, or did not end in time.
    """
    mark = {outside.MARK: secrets.token_hex(8)}
    (name, value), began = *mark.items(), time.perf_counter()
    with (cwd / "out").open("w+", encoding="utf-8") as out, (cwd / "err").open("w+", encoding="utf-8") as err:
        process = subprocess.Popen(command, cwd=cwd, env=environment | mark, stdout=out, stderr=err)
        try:
            looking = True
            while process.poll() is None and time.perf_counter() < began + outside.PATIENCE:
                looking = looking and not look(outside.marked(f"{name}={value}"))
                time.sleep(LOOK)
        finally:
            process.kill()
        code, seconds = process.wait(), time.perf_counter() - began
        said = [(cwd / file).read_text(encoding="utf-8") for file in ("out", "err")]
    return outside.Ended(code, *said, seconds).checked()


def see(processes: Sequence[str]) -> Seen:
    """All of them now; those that end meanwhile count nothing."""
    rollups = [_rollup(pid) for pid in processes]
    shares: Counter[str] = Counter()
    for pid, rollup in zip(processes, rollups, strict=True):
        shares[_role(pid)] += rollup.get("Pss", 0)
    segments = {inode for pid in processes for inode in _segments(pid)}
    return Seen(
        len(processes),
        sum(rollup.get("Pss", 0) for rollup in rollups),
        sum(rollup.get("Rss", 0) for rollup in rollups),
        sum(map(_files, processes)),
        len(segments),
        shares,
    )


def _role(pid: str) -> str:
    """What a process is, from its command line."""
    line = outside.content(pid, "cmdline")
    return next((role for word, role in ROLES.items() if word in line), "others")


def of_the_run(processes: Sequence[str]) -> list[str]:
    """Those of them that are the run's driver and actors; Ray's own come and go and open files as they like."""
    return [pid for pid in processes if _role(pid) not in ("Ray", "others")]


def _rollup(pid: str) -> dict[str, int]:
    """Bytes by name; empty for a process that has ended."""
    lines = outside.content(pid, "smaps_rollup").decode().splitlines()[1:]
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in map(str.split, lines)}


def _segments(pid: str) -> list[bytes]:
    """Inodes of a run's segments that a process has mapped: the fifth word of a line (proc(5), maps)."""
    return [line.split()[4] for line in outside.content(pid, "maps").splitlines() if b"memfd:distgd" in line]


def _files(pid: str) -> int:
    """Open files but for TCP connections: on one machine these are Ray's own, which it opens by its clock."""
    links: list[str] = []
    with suppress(OSError):  # it ends, or closes one just now
        links.extend(os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd"))
    connections = {f"socket:[{inode}]" for inode in _tcp(pid)}
    return sum(link not in connections for link in links)


def _tcp(pid: str) -> set[str]:
    """The inodes of all TCP connections, as words of text."""
    tables = (outside.content(pid, f"net/{name}").decode().splitlines()[1:] for name in ("tcp", "tcp6"))
    return {line.split()[9] for table in tables for line in table}


def last_step(folder: Path) -> int:
    """The last step that the only run below `folder` has written down; -1 before there is one."""
    for path in folder.glob("runs/*/metrics.jsonl"):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = [line for line in file.read().splitlines() if line.startswith(b'{"event": "step"')]
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except ValueError:
                continue  # half of it is written so far
    return -1
