"""The driver's side of checkpoints: files that are all there become one, and old ones go."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from distgd.assignment import Assignment
from distgd.checkpoint import Checkpoint, Checkpoints, version_of
from distgd.errors import RunFailed
from distgd.plan import Plan
from distgd.promise import Promise
from distgd.resume import manifest_of
from distgd.runfolder import Start, next_timeline
from distgd.runstore import place, run_store
from distgd.saving import Whole


class Keeping:
    """The checkpoints of one run folder, of which the newest `checkpoint.keep` stay, and the best if that is wanted.

    Args:
        begins: the checkpoint that the run goes on from, None where it begins.
        promise: of the run's bits, as manifests say it.

    Attributes:
        start: whose timeline they are of; another one after a rollback.
        newest: the last one that was made, or that it began with.
        place: where they are.
        store: of the run folder's other files, where there is one.
        best: the name of the newest one that is not beyond the best evaluation, where it is to stay.
    """

    def __init__(
        self,
        run_dir: Path,
        start: Start,
        plan: Plan,
        assignment: Assignment,
        begins: Checkpoint | None,
        promise: Promise,
    ) -> None:
        self.place = Checkpoints(place(plan.config, run_dir))
        self.store = run_store(plan.config, run_dir)
        self.start = start
        self._plan, self._assignment, self._promise = plan, assignment, promise
        self.newest = begins
        kept = [begins.folder.name] if begins else []
        self._kept: deque[str] = deque(kept, maxlen=plan.config.checkpoint.keep)
        self._keeps_best = plan.config.checkpoint.keep_best
        self._best: int | None = None  # the version of the best evaluation
        self._candidate: str | None = None  # the same of the evaluation that is under way
        self.best: str | None = None
        if begins is not None and (seen := begins.manifest.progress["evaluations"]["best"]) is not None:
            self._best = assignment.versions(seen["step"])
            self.best = _not_beyond(self._best, self.place.names())
        if self.store is not None:
            self.store.begin(start)

    def make(self, whole: Whole, evaluating: int | None = None) -> Checkpoint:
        """Commit one, and only then remove what is not kept any more.

        Args:
            evaluating: the version that is under evaluation, which may be the best one.

        Raises:
            OSError: the disk refuses it; those before are still there.
        """
        manifest = manifest_of(whole, self._plan, self.start, self._assignment, self._promise)
        if self.store is not None:
            self.store.send(self.start)
        made = self.place.commit(whole.parts[0].folder, manifest)
        self.newest = made
        self._made(made.folder.name, evaluating)
        return made

    def _made(self, folder: str, evaluating: int | None) -> None:
        """Keep a new one, and let go of what is not to stay beside it."""
        if evaluating is not None:
            self._candidate = _not_beyond(evaluating, [self._candidate, *self._kept, folder])
        if self._best is not None:
            self.best = _not_beyond(self._best, [self.best, folder])
        self._kept.append(folder)
        self.place.prune({*self._kept, *self._pinned()})

    def found_best(self, version: int) -> None:
        """The evaluation of a version is the best so far: nothing before it is kept for its sake any more."""
        self._best = version
        self.best = _not_beyond(version, [self.best, self._candidate, *self._kept])

    def _pinned(self) -> list[str]:
        return [folder for folder in (self.best, self._candidate) if folder is not None and self._keeps_best]

    def go_back(self, run_dir: Path) -> None:
        """Begin another timeline, as all shards go back.

        Raises:
            RunFailed: another driver has begun on the run.
        """
        self.start = next_timeline(run_dir, self.start)
        if self.store is not None:
            with suppress(OSError):  # it is sent with the next checkpoint
                self.store.send(self.start)

    def find(self) -> bool:
        """Look for the newest whole one again: what was whole once may have been damaged since.

        Returns:
            Whether a newer one was passed over, which may be whole again later.

        Raises:
            RunFailed: there is none, or they cannot be reached.
        """
        damaged: list[str] = []
        try:
            self.newest = self.place.newest(self.start.run, damaged)
        except OSError as error:
            do = "--resume auto goes on when it can be reached"
            raise RunFailed(f"{self.place.where}: expected checkpoints to go back to, found {error}; {do}") from error
        if self.newest is None:
            raise RunFailed("no checkpoint to go back to: " + "; ".join(damaged or [f"none in {self.place.where}"]))
        return bool(damaged)


def _not_beyond(version: int, names: Iterable[str | None]) -> str | None:
    """The newest that is not beyond a version."""
    fit = [name for name in names if name is not None and version_of(name) <= version]
    return max(fit, key=version_of, default=None)
