"""The folder of a run: made before the start, given back where nothing began, and what its disk refuses, in words."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from distgd.checkpoint import sync_folder
from distgd.config import Config
from distgd.errors import BadInput

TAIL = 1 << 16  # bytes that are looked through at a time
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def new_folder(config: Config, name: str) -> Path:
    """The folder of a run that is yet to come, made; one that holds files is `BadInput`."""
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run_dir = Path(config.run.storage) / (config.run.name or stamp)
    made = missing(run_dir)
    try:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise BadInput.at("run.name", "a new run folder", str(run_dir), "choose another with run.name=")
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        found = f"{config.run.storage} ({error.strerror})"
        do = "set it to a folder that can be written"
        raise BadInput.described("run.storage", "a folder for run folders", found, do) from error
    return run_dir


def missing(folder: Path) -> list[Path]:
    """Those of a folder and the folders above it that are not there, the innermost first."""
    with suppress(OSError):
        return [part for part in (folder, *folder.parents) if not part.exists()]
    return []


def give_back(run_dir: Path, made: Sequence[Path]) -> None:
    """Remove a run folder in which nothing began, and the folders that were `made` for it and hold nothing else."""
    shutil.rmtree(run_dir, ignore_errors=True)
    _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):  # not made, or somebody else's run is in it by now
        for folder in folders:
            folder.rmdir()


@dataclass(frozen=True)
class Start:
    """One start of a driver on a run folder: the run's identity, the timeline that begins, and the folder's lock."""

    run: str
    timeline: int
    lock: IO[bytes]
    driver: str  # tells this start from all others, also where two could begin the same timeline

    def begin(self, run_dir: Path) -> None:
        """Say durably whose timeline it is, before anything carries its number."""
        _write_durably(run_dir / "run.json", {"run": self.run, "timeline": self.timeline, "driver": self.driver})


def begin(run_dir: Path) -> Start:
    """Begin the next timeline of a run, durably, before anything carries its number.

    Raises:
        BadInput: another driver is at work on the folder, or `run.json` in it is damaged.
    """
    lock = (run_dir / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        do = "wait for it to end, or choose another with run.name="
        raise BadInput.at("run.name", "a run folder that no other driver works on", str(run_dir), do) from error
    path = run_dir / "run.json"
    before = _identity(path)
    start = Start(before["run"], before["timeline"] + 1, lock, secrets.token_hex(8))
    start.begin(run_dir)
    return start


def next_timeline(run_dir: Path, start: Start) -> Start:
    """Begin another timeline, as durably, for all shards go back."""
    new = replace(start, timeline=start.timeline + 1)
    new.begin(run_dir)
    return new


def identity(run_dir: Path) -> str | None:
    """What tells a run from all others; None where no driver has begun on the folder."""
    return str(_identity(run_dir / "run.json")["run"]) if (run_dir / "run.json").exists() else None


def _identity(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"run": str(found["run"]), "timeline": int(found["timeline"])}
    except FileNotFoundError:
        return {"run": secrets.token_hex(8), "timeline": 0}
    except (ValueError, KeyError, TypeError) as error:
        do = "restore the file, or start a new run with run.name="
        raise BadInput.described(str(path), "the run's identity and timeline", str(error), do) from error


def _write_durably(path: Path, value: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def mend(path: Path) -> None:
    """Cut off what a kill left of a last line: a file of lines goes on behind its last whole one."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = at = file.seek(0, os.SEEK_END)
        while at > 0:
            at = max(0, at - TAIL)
            file.seek(at)
            if (found := file.read(end - at).rfind(b"\n")) >= 0:
                file.truncate(at + found + 1)
                return
        file.truncate(0)


def refused_by_disk(error: OSError, run_dir: Path) -> BadInput | None:
    """The message where a disk is full, read-only or broken; None for any other error."""
    if error.errno not in OF_THE_DISK:
        return None
    free = shutil.disk_usage(run_dir).free
    found = f"{error.strerror} ({free / 1e6:,.1f} MB free)"
    do = "free some space, or set run.storage to another disk"
    return BadInput.described("run.storage", f"room for the run's files in {run_dir}", found, do)
