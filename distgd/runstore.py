"""A run folder's other files in an object store, beside its checkpoints: so that another machine can go on.

The run folder itself is on the driver's disk. What changed is stored with each checkpoint, before its manifest: lines
beyond that are of steps that are done again. A store has no locks. Each start of a driver puts its own name into
`run.json`, and a driver that finds another's there has been followed by it, and ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from distgd.checkpoint import Objects
from distgd.config import Config
from distgd.errors import BadInput, RunFailed
from distgd.runfolder import Start

T = TypeVar("T")

IDENTITY = "run.json"
STAY = ("lock", "checkpoints", "report")
"""What is of no use elsewhere, or is stored by others."""


def place(config: Config, run_dir: Path) -> str:
    """Where the checkpoints of a run are: a folder or a URI."""
    storage = config.checkpoint.storage
    return str(run_dir / "checkpoints") if storage is None else f"{storage.rstrip('/')}/{run_dir.name}/checkpoints"


def run_store(config: Config, run_dir: Path) -> RunStore | None:
    """The store of a run's other files; None where the run folder is all."""
    storage = config.checkpoint.storage
    return None if storage is None else RunStore(f"{storage.rstrip('/')}/{run_dir.name}", run_dir)


class RunStore:
    """The files of one run folder there.

    Raises:
        BadInput: there is no such store.
    """

    def __init__(self, uri: str, run_dir: Path) -> None:
        self._objects, self._run_dir = Objects(uri), run_dir
        self._sent: dict[str, tuple[int, int]] = {}  # bytes and time of change of each file as it was sent

    def bring(self) -> None:
        """Have the files here, where the store's are of a later start than those that are here, if any are.

        Raises:
            BadInput: the store cannot be reached.
        """
        there = self._refusing(self._timeline)
        if there is None or there <= _timeline(self._run_dir / IDENTITY):
            return
        try:
            names = [name for name in self._objects.names() if name.split("/")[0] not in STAY and name != IDENTITY]
            for name in (*names, IDENTITY):  # the last one makes it a run folder
                self._objects.get(name, self._run_dir / name)
        except OSError as error:
            raise self._refused(error) from error

    def check_new(self) -> None:
        """A run that begins must find nothing there.

        Raises:
            BadInput: there is a run of this name, or the store cannot be reached.
        """
        if self._refusing(self._timeline) is not None:
            do = "choose another with run.name=, or give --resume auto"
            raise BadInput.at("run.name", "a new run", f"{self._objects.uri}", do)

    def begin(self, start: Start) -> None:
        """Say who is at work on the run from now on.

        Raises:
            BadInput: the store refuses it.
            RunFailed: another driver has begun since the files were looked at.
        """
        there = self._refusing(self._timeline)
        if there is not None and there >= start.timeline:
            raise self._followed(there, start)
        self._refusing(self._send)

    def send(self, start: Start) -> None:
        """Store what has changed.

        Raises:
            OSError: the store refuses it, or cannot be reached; what was not sent is sent the next time.
            RunFailed: another driver has begun on the run.
        """
        there = self._identity()
        if there is not None and there.get("driver") != start.driver:
            raise self._followed(there["timeline"], start)
        self._send()

    def _followed(self, there: int, start: Start) -> RunFailed:
        do = "let one of them go on; what this one has done since is not in the store"
        mine, found = f"this driver's timeline {start.timeline}", f"timeline {there} of another one"
        return RunFailed(f"{self._objects.uri}: expected {mine}, found {found}; {do}")

    def _send(self) -> None:
        for path in sorted(self._run_dir.rglob("*")):
            name = path.relative_to(self._run_dir).as_posix()
            if name.split("/")[0] in STAY or name.endswith(".part") or not path.is_file():
                continue
            state = path.stat()
            now = (state.st_size, state.st_mtime_ns)
            if self._sent.get(name) != now:
                self._objects.put(path, name)
                self._sent[name] = now

    def _timeline(self) -> int | None:
        there = self._identity()
        return None if there is None else int(there["timeline"])

    def _identity(self) -> dict[str, Any] | None:
        try:
            if IDENTITY not in self._objects.names():
                return None
            there = json.loads(self._objects.read(IDENTITY))
            return {**there, "timeline": int(there["timeline"])}
        except (ValueError, KeyError, TypeError) as error:
            do = "restore the file, or start a new run with run.name="
            found = str(error)
            raise BadInput.described(f"{self._objects.uri}/{IDENTITY}", "the run's timeline", found, do) from error

    def _refusing(self, ask: Callable[[], T]) -> T:
        """At a start the store must be there."""
        try:
            return ask()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> BadInput:
        do = "look at the address, the credentials and the network"
        found = f"{self._objects.uri} ({str(error).splitlines()[0]})"
        return BadInput.described("checkpoint.storage", "a store that can be read and written", found, do)


def _timeline(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["timeline"])
    except (OSError, ValueError, KeyError, TypeError):  # whoever goes on from it says what is wrong
        return -1
