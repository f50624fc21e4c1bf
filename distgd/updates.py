"""A run's record of updates, as files: `updates/t3.json` and `updates/t3-shard-0.rows` for shard 0 of timeline 3.

A timeline's files are begun with it and never touched by another one. The first says which state it began from: that of
a checkpoint, made in an earlier timeline, or the initial one; whatever that timeline recorded beyond the checkpoint is
void. The others are rows of `recording.row`, one behind the other, in the order of versions; a piece of a row at the
end was cut off by a kill. Rows up to a checkpoint are durable before its manifest is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from distgd import events as ev
from distgd.checkpoint import Checkpoint, sync_folder
from distgd.errors import BadInput
from distgd.layout import Slice
from distgd.recording import Rows, checks, row

FORMAT = 1
FOLDER = "updates"
INCOMPLETE = "replay a run whose updates/ folder is as the run left it"


class Updates:
    """The record as the driver writes it; a context, left when the run is over."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self._open = ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Updates:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def begin(self, timeline: int, slices: Sequence[Slice], checkpoint: Checkpoint | None) -> None:
        """Begin a timeline from a checkpoint, or from the initial weights; durably.

        Raises:
            OSError: the disk refuses it.
        """
        self._folder.mkdir(exist_ok=True)
        cuts, versions, origin = [[part.start, part.stop] for part in slices], [0] * len(slices), None
        if checkpoint is not None:
            manifest = checkpoint.manifest
            versions = [shard.version for shard in manifest.shards]
            origin = {"timeline": manifest.timeline, "versions": versions}
            if cuts != [[shard.start, shard.stop] for shard in manifest.shards]:
                versions = versions[:1] * len(slices)  # cut anew, which asks for one version of all
        begun = {"format": FORMAT, "timeline": timeline, "cuts": cuts, "versions": versions, "from": origin}
        self._open.close()
        paths = [_rows(self._folder, timeline, part.index) for part in slices]
        self._files = [self._open.enter_context(path.open("ab")) for path in paths]
        with (self._folder / f"t{timeline}.json").open("w", encoding="utf-8") as file:
            json.dump({**begun, "row": row(len(slices)).descr}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._folder)
        sync_folder(self._folder.parent)

    def add(self, updates: ev.UpdatesRecorded) -> None:
        """Write what a shard has told."""
        self._files[updates.shard].write(updates.rows.data)

    def sync(self) -> None:
        """Make all that was written durable.

        Raises:
            OSError: the disk refuses it.
        """
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Segment:
    """One timeline's share of what counts.

    Args:
        cuts: each shard's elements of the flat vector.
        begins, ends: versions by shard, between which updates count.
        origin: the timeline that it began from, None for the initial weights.
        rows: what is recorded, by shard, in the order of versions, the first of them that of `begins`; there may be
            more than what counts, and less.
    """

    timeline: int
    cuts: tuple[tuple[int, int], ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    origin: int | None
    rows: tuple[Rows, ...]


def segments(run_dir: Path, timeline: int | None, ends: Sequence[int] | int) -> list[Segment]:
    """What counts of a record, from the initial weights on.

    Args:
        timeline: where it ends; None for the last one that was begun.
        ends: at which versions, by shard, or at one of all.

    Raises:
        BadInput: a timeline is missing, or a file is damaged; the message names it.
    """
    folder = run_dir / FOLDER
    if timeline is None:
        begun = [int(path.stem[1:]) for path in folder.glob("t*.json") if path.stem[1:].isdigit()]
        timeline = max(begun, default=1)
    found: list[Segment] = []
    wanted: int | None = timeline
    while wanted is not None:
        begun_as = _begun(folder, wanted)
        cuts, versions, origin = begun_as["cuts"], begun_as["versions"], begun_as["from"]
        until = [ends] * len(cuts) if isinstance(ends, int) else ends
        rows = [_read(_rows(folder, wanted, shard), len(cuts), first) for shard, first in enumerate(versions)]
        before = None if origin is None else int(origin["timeline"])
        found.append(Segment(wanted, tuple(map(tuple, cuts)), tuple(versions), tuple(until), before, tuple(rows)))
        wanted, ends = before, () if origin is None else origin["versions"]
    return found[::-1]


def _rows(folder: Path, timeline: int, shard: int) -> Path:
    return folder / f"t{timeline}-shard-{shard}.rows"


def _begun(folder: Path, timeline: int) -> dict[str, Any]:
    path = folder / f"t{timeline}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["timeline"] != timeline:
            raise ValueError(f"format {found['format']}, timeline {found['timeline']}")
        if found["row"] != json.loads(json.dumps(row(len(found["cuts"])).descr)):
            raise ValueError("rows of another form")
        return found
    except FileNotFoundError as error:
        do = "replay a run that was trained with checkpoint.record=true from its beginning"
        raise BadInput.described(str(path), "a record of every update", "none", do) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput.described(str(path), "where a timeline began", str(error), INCOMPLETE) from error


def _read(path: Path, shards: int, first: int) -> Rows:
    """The rows of one shard, each version once."""
    form = row(shards)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput.described(str(path), "a shard's record", str(error.strerror), INCOMPLETE) from error
    rows: Rows = np.frombuffer(data[: len(data) - len(data) % form.itemsize], form)
    wrong = np.flatnonzero(checks(rows) != rows["check"])
    if len(wrong):
        found = f"a damaged row {wrong[0]}"
        raise BadInput.described(str(path), "rows as they were written", found, INCOMPLETE)
    rows = rows[np.unique(rows["version"], return_index=True)[1]]  # a message may come twice
    gaps = np.flatnonzero(rows["version"] != first + np.arange(len(rows)))
    return rows[: gaps[0]] if len(gaps) else rows
