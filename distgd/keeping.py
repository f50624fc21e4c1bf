"""The driver's side of checkpoints: files that are all there become one, and old ones go."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from distgd.assignment import Assignment
from distgd.checkpoint import Checkpoint, commit, prune
from distgd.plan import Plan
from distgd.resume import manifest_of
from distgd.runfolder import Start
from distgd.saving import Whole


class Keeping:
    """The checkpoints of one run folder, of which the newest `checkpoint.keep` stay.

    Args:
        begins: the checkpoint that the run goes on from, None where it begins.
    """

    def __init__(self, run_dir: Path, start: Start, plan: Plan, assignment: Assignment, begins: Checkpoint | None):
        self.folder = run_dir / "checkpoints"
        self._start, self._plan, self._assignment = start, plan, assignment
        self._kept: deque[Path] = deque([begins.folder] if begins else [], maxlen=plan.config.checkpoint.keep)

    def make(self, whole: Whole) -> Checkpoint:
        """Commit one, and only then remove what is not kept any more.

        Raises:
            OSError: the disk refuses it; those before are still there.
        """
        manifest = manifest_of(whole, self._plan, self._start, self._assignment)
        made = commit(self.folder / whole.parts[0].folder, manifest)
        self._kept.append(made.folder)
        prune(self.folder, self._kept)
        return made
