"""The driver's side of checkpoints: files that are all there become one, and old ones go."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from distgd.assignment import Assignment
from distgd.checkpoint import Checkpoint, commit, newest, prune
from distgd.errors import RunFailed
from distgd.plan import Plan
from distgd.resume import manifest_of
from distgd.runfolder import Start
from distgd.saving import Whole


class Keeping:
    """The checkpoints of one run folder, of which the newest `checkpoint.keep` stay.

    Args:
        begins: the checkpoint that the run goes on from, None where it begins.

    Attributes:
        start: whose timeline they are of; another one after a rollback.
        newest: the last one that was made, or that it began with.
    """

    def __init__(self, run_dir: Path, start: Start, plan: Plan, assignment: Assignment, begins: Checkpoint | None):
        self.folder = run_dir / "checkpoints"
        self.start = start
        self._plan, self._assignment = plan, assignment
        self.newest = begins
        self._kept: deque[Path] = deque([begins.folder] if begins else [], maxlen=plan.config.checkpoint.keep)

    def make(self, whole: Whole) -> Checkpoint:
        """Commit one, and only then remove what is not kept any more.

        Raises:
            OSError: the disk refuses it; those before are still there.
        """
        manifest = manifest_of(whole, self._plan, self.start, self._assignment)
        made = commit(self.folder / whole.parts[0].folder, manifest)
        self.newest = made
        self._kept.append(made.folder)
        prune(self.folder, self._kept)
        return made

    def find(self) -> None:
        """Look for the newest whole one again: what was whole once may have been damaged since.

        Raises:
            RunFailed: there is none.
        """
        damaged: list[str] = []
        self.newest = newest(self.folder, self.start.run, damaged)
        if self.newest is None:
            raise RunFailed("no checkpoint to go back to: " + "; ".join(damaged or [f"none in {self.folder}"]))
