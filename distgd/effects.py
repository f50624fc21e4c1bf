"""What the driver asks the trainer to do, and what it goes on from: data alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distgd import events as ev
from distgd.errors import DistgdError
from distgd.evaluations import Best
from distgd.policy import Applied
from distgd.saving import Progress, Whole


@dataclass(frozen=True, slots=True)
class Log:
    """An event for trackers and the live line."""

    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Account:
    """A line of the ledger file."""

    line: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Keep:
    """The weights of the best evaluation so far are here."""

    best: Best


@dataclass(frozen=True, slots=True)
class Save:
    """Every shard has written its file: make a checkpoint of them, and tell the driver with `saved`."""

    whole: Whole


@dataclass(frozen=True, slots=True)
class Record:
    """A shard's updates are to be written down, before any checkpoint that is asked for later is made."""

    updates: ev.UpdatesRecorded


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start process `incarnation` of the driver's cast, in the place of one that is gone.

    A `patient` one may wait for room as long as it takes: the run has enough without it.
    """

    incarnation: int
    patient: bool = False


@dataclass(frozen=True, slots=True)
class Refuse:
    """End a process that is ready and may not take part."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class Recover:
    """All shards go back to the newest checkpoint: one is gone, or a worker is not to be trusted, and is replaced.

    With None the run has diverged, and nobody is replaced.
    """

    gone: int | None


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over: `error` is None where it was completed or stopped."""

    error: DistgdError | None


Effect = ev.Send | Log | Account | Keep | Save | Record | Spawn | Refuse | Recover | Finish


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: at `step`, with what `Driver.progress` gave; `applied` in bounded and async mode.

    `version` is a number that stands for all that is done.
    """

    step: int
    version: int
    progress: Progress
    applied: Applied | None = None
