"""`distgd replay RUN`: the run's updates once more, in one process, and whether they give the same bits.

A bounded or async run is what it is by its record of updates (`distgd.updates`), a sync run by its ledger. Nothing is
written to the run's folder. What is compared are the run's last weights; where it has not ended by itself, those of its
newest checkpoint, shard by shard.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from distgd import weights
from distgd.audit import read as read_ledger
from distgd.checkpoint import Checkpoint, Checkpoints, Damaged, ShardState, name_parts, read, write
from distgd.config import Config, Workers, load
from distgd.errors import BadInput, RunFailed
from distgd.layout import Slice, state, tensor_of
from distgd.plan import Plan
from distgd.prepare import prepare
from distgd.records import events
from distgd.replay.leased import Differs, Leased, Part
from distgd.replay.staged import dropped, replay_steps
from distgd.replay.tape import tape
from distgd.result import Result, reached
from distgd.runfolder import identity
from distgd.runstore import place as place_of
from distgd.server import ServerSpec
from distgd.tasks import Task
from distgd.updates import Segment, segments
from distgd.worker import Worker, WorkerSpec

__all__ = ["Replayed", "replay"]


@dataclass(frozen=True)
class Replayed:
    """What a replay came to.

    `compared` says with what, `updates` and `gradients` count what was made again. `weights_sha256` is the replay's,
    `expected` the run's; both are None where a checkpoint was compared, shard by shard. `differs` is the first thing
    that is not as it was, as far as it is known; the replay ends there.
    """

    mode: str
    compared: str
    updates: int
    gradients: int
    timelines: int
    weights_sha256: str | None
    expected: str | None
    differs: str | None
    seconds: float

    @property
    def same(self) -> bool:
        """Whether every bit is."""
        return self.differs is None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; its `status` is `failed` where something differs."""
        return {"status": "same" if self.same else "failed", **asdict(self)}


@dataclass(frozen=True)
class _Aim:
    """What is compared: the run's result, or a checkpoint."""

    result: Result | None
    checkpoint: Checkpoint | None
    place: Checkpoints | None

    @property
    def words(self) -> str:
        if self.checkpoint is not None:
            return f"checkpoint {self.checkpoint.folder.name}"
        return "the last weights"


def replay(run_dir: Path, task: Task | None = None) -> Replayed:
    """Make every update of a run again.

    Args:
        task: the object that the run was given in Python, if it was.

    Raises:
        BadInput: the run has nothing to compare, or records are missing, damaged or contradict each other.
        RunFailed: the task cannot be built as it was.
    """
    began, threads = time.monotonic(), torch.get_num_threads()
    config = load(run_dir / "config.yaml", [], os.environ)
    plan = prepare(config, task)
    try:
        again = _Again(run_dir, plan, _aim(config, run_dir))
        try:
            again.run()
        except Differs as found:
            again.differs = str(found)
        return again.replayed(time.monotonic() - began)
    finally:
        torch.set_num_threads(threads)


def _aim(config: Config, run_dir: Path) -> _Aim:
    result = reached(run_dir)
    if result is not None and result.weights_sha256 is not None:
        return _Aim(result, None, None)
    damaged: list[str] = []
    run = identity(run_dir)
    there = Checkpoints(place_of(config, run_dir))
    found = there.newest(run, damaged) if run is not None else None
    if found is None:
        what = "; ".join(damaged) or "neither its last weights nor a checkpoint"
        do = "replay a run that has ended or keeps checkpoints"
        raise BadInput.described("RUN", "a run with something to compare", what, do)
    return _Aim(None, found, there)


class _Again:
    """One replay."""

    def __init__(self, run_dir: Path, plan: Plan, aim: _Aim) -> None:
        self._run_dir, self._plan, self._aim = run_dir, plan, aim
        self.differs: str | None = None
        self._sha256: str | None = None
        self._updates = self._gradients = self._timelines = 0

    def run(self) -> None:
        """Make it again and compare.

        Raises:
            Differs: what differs first.
        """
        parts = self._staged() if self._plan.staged else self._leased()
        if self._aim.checkpoint is not None:
            assert self._aim.place is not None
            self._compare_with(self._aim.place, self._aim.checkpoint, parts)
            return
        replica = self._plan.replica
        replica.install([p.cut for p in parts], {p.cut.index: p.weights.numpy() for p in parts}, parts[0].buffers)
        replica.buffer_layout.unpack(replica.buffers, replica.model)
        self._sha256 = weights.fingerprint(state(replica.model))
        if self._sha256 != self._expected:
            raise Differs(f"the last weights: {self._expected} expected, {self._sha256} found")

    @property
    def _expected(self) -> str | None:
        return self._aim.result.weights_sha256 if self._aim.result else None

    def replayed(self, seconds: float) -> Replayed:
        """What it came to."""
        counts = self._updates, self._gradients, self._timelines
        mode, found = self._plan.config.consistency.mode, (self._sha256, self._expected)
        return Replayed(mode, self._aim.words, *counts, *found, self.differs, seconds)

    # Sync.

    def _staged(self) -> list[Part]:
        aim, plan = self._aim, self._plan
        steps = aim.result.steps if aim.result is not None else aim.checkpoint.manifest.step  # type: ignore[union-attr]
        without = dropped(read_ledger(self._run_dir / "ledger.jsonl"), plan, steps)
        losses: dict[int, float] = {}
        if plan.quorum == plan.order.slots:  # else a step may have been logged before a rollback, and made otherwise
            logged = (e for e in events(self._run_dir / "metrics.jsonl") if e["event"] == "step")
            losses = {e["step"] - 1: e["metrics"]["train/loss"] for e in logged if "train/loss" in e["metrics"]}
        cuts = plan.layout.slices(1)
        servers, worker = _specs(plan, 1)
        (part,) = [self._part(servers[0], cuts[0], None)]
        try:
            self._gradients = replay_steps(plan, worker, part, without, losses, steps)
        finally:
            self._updates, self._timelines = part.version, 1
        return [part]

    # Bounded, async.

    def _leased(self) -> list[Part]:
        last: int | None = None
        until: Sequence[int] | int
        if self._aim.checkpoint is not None:
            manifest = self._aim.checkpoint.manifest
            last, until = manifest.timeline, [shard.version for shard in manifest.shards]
        else:
            assert self._aim.result is not None
            until = self._aim.result.versions
        with TemporaryDirectory(prefix="distgd-replay-") as folder:
            files: list[tuple[Path, int, int]] = []
            parts: list[Part] = []
            for segment in segments(self._run_dir, last, until):
                parts, files = self._segment(segment, files, Path(folder))
        return parts

    def _segment(
        self, segment: Segment, files: Sequence[tuple[Path, int, int]], folder: Path
    ) -> tuple[list[Part], list[tuple[Path, int, int]]]:
        """One timeline, from the files that the one before has left.

        Returns:
            Its shards, where they end to count, and files of what these are there.
        """
        plan, todo = self._plan, tape(segment)
        cuts = plan.layout.slices(len(segment.cuts))
        if [(cut.start, cut.stop) for cut in cuts] != list(segment.cuts):
            raise BadInput.described("updates", f"shards as the model is cut now, {cuts}", f"{segment.cuts}")
        servers, worker = _specs(plan, len(cuts))
        before = [read(cut, plan.layout, files) if files else None for cut in cuts]
        parts = [self._part(server, cut, there) for server, cut, there in zip(servers, cuts, before, strict=True)]
        left: list[tuple[Path, int, int]] = []
        for part, version in zip(parts, segment.begins, strict=True):
            part.version = version

        def passed(part: Part) -> None:
            path = folder / f"t{segment.timeline}-shard-{part.cut.index}.safetensors"
            write(path, name_parts(part.weights.numpy(), part.optimizer.state_parts(), part.buffers, plan.layout))
            left.append((path, part.cut.start, part.cut.stop))

        going = Leased(plan, todo, parts, worker, passed)
        self._timelines += 1
        try:
            going.run()
        finally:
            self._updates += sum(part.version - first for part, first in zip(parts, segment.begins, strict=True))
            self._gradients += going.computed
        for path, _, _ in files:
            path.unlink()
        left.sort(key=lambda each: each[1])
        return [self._part(s, cut, read(cut, plan.layout, left)) for s, cut in zip(servers, cuts, strict=True)], left

    def _part(self, server: ServerSpec, cut: Slice, there: ShardState | None) -> Part:
        """A shard with what a file had of it, or with its initial state."""
        if there is None:
            values = self._plan.replica.flat.cpu()[cut.start : cut.stop].clone()
            return Part(cut, values, server.stepper(values), server.buffers, 0)
        values = tensor_of(there.weights).clone()
        part = Part(cut, values, server.stepper(values), there.buffers, 0)
        part.optimizer.load_state_dict(there.optimizer)
        return part

    def _compare_with(self, place: Checkpoints, checkpoint: Checkpoint, parts: Sequence[Part]) -> None:
        for part in parts:
            try:
                there = place.restore(checkpoint.folder.name, part.cut, self._plan.layout).state
            except Damaged as error:
                raise RunFailed(str(error)) from error
            for what, ours, theirs in (
                ("weights", part.weights.numpy(), there.weights),
                ("buffers", part.buffers, there.buffers),
            ):
                if ours is None or theirs is None:
                    continue
                bits, others = ours.view(np.uint8), theirs.view(np.uint8)
                if not np.array_equal(bits, others):
                    first = int(np.flatnonzero(bits != others)[0]) // ours.itemsize
                    at = part.cut.start * (what == "weights") + first
                    where = f"{what} of {checkpoint.folder.name}, element {at}"
                    raise Differs(f"{where}: {theirs[first]!r} expected, {ours[first]!r} found")


def _specs(plan: Plan, servers: int) -> tuple[list[ServerSpec], Worker]:
    """The run's own shards, and a worker that is built as each of its workers was."""
    cluster = plan.config.cluster.model_copy(update={"servers": servers, "workers": Workers(min=1, max=1)})
    batch = plan.config.batch.model_copy(update={"slots": plan.order.slots})
    config = plan.config.model_copy(update={"cluster": cluster, "batch": batch})
    again = Plan(**{**plan.__dict__, "config": config})
    cast = again.cast()
    specs = again.specs(cast)
    worker = specs[cast.workers[0]]
    assert isinstance(worker, WorkerSpec)
    return [s for s in specs.values() if isinstance(s, ServerSpec)], worker.build(time.monotonic)
