"""What a run's ledger says about its samples: how often each was counted. An outsider needs nothing else.

A ledger is only ever added to. Its lines:

    begin     where samples come from: `samples`, `batch`, `slots`, `mode`; the first line
    applied   slot `slot` of step `step` counted: places `first` to `last` of the epoch's order
    dropped   the same, but its step was decided without it (quorum)
    skipped   the same, but it counted without effect, as a slot was not finite
    rollback  what was counted from step `step` on is void; what is not done again follows once more
    bits      from step `step` on the bits are not promised, and why; the first line says whether they ever were
    end       the run went through `step` steps; where it is missing, the run was cut off or goes on

Places are counted and not slots, so that a slot that is cut otherwise than its fellows is found out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distgd.errors import BadInput

Line = Mapping[str, Any]
Spans = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""[n, 2]: first and one-past-last place."""


@dataclass(frozen=True)
class Count:
    """Samples of one epoch.

    `granted` are those of all steps that the run went through, `twice` the times that one was counted beyond its first,
    `lost` those that were neither applied nor dropped; what was skipped counts as dropped.
    """

    epoch: int
    granted: int
    applied: int
    twice: int
    lost: int
    dropped: int


@dataclass(frozen=True)
class Audit:
    """All epochs; `finished` says that the run has ended and wrote so.

    `bits` is what is promised of them, None where the ledger does not say; `why` is what broke a promise.
    """

    epochs: tuple[Count, ...]
    steps: int
    finished: bool
    rollbacks: int
    bits: str | None = None
    why: str | None = None

    @property
    def clean(self) -> bool:
        """Whether nothing was counted twice or lost."""
        return not any(count.twice or count.lost for count in self.epochs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; its `status` is `failed` where it is not clean."""
        return {"status": "clean" if self.clean else "failed", **asdict(self)}


def read(path: Path) -> Iterator[Line]:
    """The lines of a ledger. A last one without an end was cut off by a kill and is left out.

    Raises:
        BadInput: there is no ledger, or a line in it is none.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith("\n"):
                    return
                yield _parsed(text, f"{path}, line {number}")
    except OSError as error:
        do = "audit the folder of a run of this version"
        raise BadInput.described("RUN", "a run's ledger.jsonl", f"{path} ({error.strerror})", do) from error


def _parsed(text: str, where: str) -> Line:
    try:
        line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("state"), str):
            return line
    except ValueError:
        pass
    raise BadInput.described(where, "a line of a ledger", repr(text[:60]), "restore the file; it is only added to")


def audit(lines: Iterable[Line]) -> Audit:
    """Count.

    Raises:
        BadInput: the first line does not begin a ledger, or a line lacks what its state needs.
    """
    history = _History()
    try:
        for line in lines:
            history.take(line)
    except (KeyError, TypeError, ValueError) as error:
        do = "audit a ledger of this version, with all of its lines"
        raise BadInput.described("ledger", "what its state needs in every line", f"none: {error}", do) from error
    if history.samples == 0:
        do = "audit a ledger of this version, with its first line"
        raise BadInput.described("ledger", "a first line that begins it", "none", do)
    return history.counted()


class _History:
    """What is valid after every line so far."""

    def __init__(self) -> None:
        self.samples = self.batch = 0
        self.whole_steps = True  # whether a step's lines are written at once
        self.end: int | None = None
        self.rollbacks = 0
        self.planned_bits: str | None = None  # what the first line promises
        self.bits: str | None = None  # the same, or what the last line says
        self.marks: list[tuple[int, str, str]] = []  # from which step on it is otherwise, and why
        self.applied: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # by step: slot, first, last
        self.dropped: dict[int, list[tuple[int, int, int]]] = defaultdict(list)

    def take(self, line: Line) -> None:
        match line["state"]:
            case "begin":
                self.samples, self.batch = int(line["samples"]), int(line["batch"])
                self.whole_steps = line["mode"] == "sync"
                self.bits = self.planned_bits = line.get("bits")
            case "bits":
                self.marks.append((int(line["step"]), str(line["bits"]), str(line["why"])))
            case "applied" | "dropped" | "skipped" as state:
                where = self.applied if state == "applied" else self.dropped
                where[int(line["step"])].append((int(line["slot"]), int(line["first"]), int(line["last"])))
            case "rollback":
                self._rollback(int(line["step"]))
            case "end":
                self.end = int(line["step"])
                self.bits = line.get("bits", self.bits)
            case other:
                raise ValueError(f"a state {other!r}")

    def _rollback(self, step: int) -> None:
        self.rollbacks += 1
        self.end, self.bits = None, self.planned_bits
        self.marks = [mark for mark in self.marks if mark[0] < step]
        for where in (self.applied, self.dropped):
            for later in [each for each in where if each >= step]:
                del where[later]

    def counted(self) -> Audit:
        steps = self.end if self.end is not None else self._reached()
        epoch_steps = -(-self.samples // self.batch)
        reached = max([steps, *(step + 1 for step in self.applied), *(step + 1 for step in self.dropped)])
        epochs = [
            self._epoch(epoch, range(first, min(first + epoch_steps, reached)), steps)
            for epoch, first in enumerate(range(0, reached, epoch_steps))
        ]
        bits, why = self.marks[0][1:] if self.marks else (self.bits, None)
        return Audit(tuple(epochs), steps, self.end is not None, self.rollbacks, bits, why)

    def _reached(self) -> int:
        """Steps that a run went through which did not say so itself: those without a gap, where slots come singly."""
        lines = {step for where in (self.applied, self.dropped) for step, slots in where.items() if slots}
        if self.whole_steps:
            return max(lines, default=-1) + 1
        step = 0
        while step in lines and not _missing(self._batch(step), _spans(self.applied[step] + self.dropped[step])):
            step += 1
        return step

    def _batch(self, step: int) -> tuple[int, int]:
        first = step % -(-self.samples // self.batch) * self.batch
        return first, min(first + self.batch, self.samples)

    def _epoch(self, epoch: int, steps: range, through: int) -> Count:
        applied = _spans([slot for step in steps for slot in self.applied.get(step, ())])
        dropped = _spans([slot for step in steps for slot in self.dropped.get(step, ())])
        batches = [self._batch(step) for step in steps if step < through]
        granted = sum(stop - first for first, stop in batches)
        once, all_ = _covered(applied), int((applied[:, 1] - applied[:, 0]).sum())
        either = _covered(np.concatenate([applied, dropped]))
        lost = _missing((batches[0][0], batches[-1][1]), np.concatenate([applied, dropped])) if batches else 0
        return Count(epoch, granted, once, all_ - once, lost, either - once)


def _spans(slots: Iterable[tuple[int, int, int]]) -> Spans:
    return np.array([(first, last + 1) for _, first, last in slots], np.int64).reshape(-1, 2)


def _covered(spans: Spans) -> int:
    """How many places lie in at least one span."""
    return _missing((0, 1 << 62), np.empty((0, 2), np.int64)) - _missing((0, 1 << 62), spans)


def _missing(whole: tuple[int, int], spans: Spans) -> int:
    """How many places of `whole` lie in no span."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(np.concatenate([[whole[0]], spans[:, 1]]))
    gaps = np.minimum(np.concatenate([spans[:, 0], [whole[1]]]), whole[1]) - np.minimum(reach, whole[1])
    return int(np.maximum(gaps, 0).sum())
