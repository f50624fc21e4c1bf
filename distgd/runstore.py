"""A run folder's other files in an object store, beside its checkpoints: so that another machine can go on.

The run folder itself is on the driver's disk. What changed is stored with each checkpoint, before its manifest: lines
beyond that are of steps that are done again. A store has no locks. Each start of a driver raises the timeline in
`run.json`, and a driver that finds a higher one than its own has been followed by another, and ends.
"""

from __future__ import annotations

import json
from pathlib import Path

from distgd.checkpoint import Objects
from distgd.config import Config
from distgd.errors import BadInput, RunFailed

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
        there = self._timeline()
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
        if self._timeline() is not None:
            do = "choose another with run.name=, or give --resume auto"
            raise BadInput.at("run.name", "a new run", f"{self._objects.uri}", do)

    def begin(self, timeline: int) -> None:
        """Say who is at work on the run from now on.

        Raises:
            BadInput: the store refuses it.
        """
        try:
            self.send(timeline)
        except OSError as error:
            raise self._refused(error) from error

    def send(self, timeline: int) -> None:
        """Store what has changed.

        Raises:
            OSError: the store refuses it, or cannot be reached; what was not sent is sent the next time.
            RunFailed: another driver has begun on the run.
        """
        there = self._timeline()
        if there is not None and there > timeline:
            do = "let one of them go on; what this one has done since is not in the store"
            found = f"timeline {there} of another one"
            raise RunFailed(f"{self._objects.uri}: expected this driver's timeline {timeline}, found {found}; {do}")
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
        try:
            if IDENTITY not in self._objects.names():
                return None
            return int(json.loads(self._objects.read(IDENTITY))["timeline"])
        except OSError as error:
            raise self._refused(error) from error
        except (ValueError, KeyError, TypeError) as error:
            do = "restore the file, or start a new run with run.name="
            found = str(error)
            raise BadInput.described(f"{self._objects.uri}/{IDENTITY}", "the run's timeline", found, do) from error

    def _refused(self, error: OSError) -> BadInput:
        do = "look at the address, the credentials and the network"
        found = f"{self._objects.uri} ({str(error).splitlines()[0]})"
        return BadInput.described("checkpoint.storage", "a store that can be read and written", found, do)


def _timeline(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["timeline"])
    except (OSError, ValueError, KeyError, TypeError):  # whoever goes on from it says what is wrong
        return -1
