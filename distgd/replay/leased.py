"""One timeline of a bounded or async run again, in one process: the same gradients in the same updates.

Each shard goes through its own updates in its own order. A slot's gradient is computed when a shard comes to the update
that has it, once every shard has been where its lease read it; a version that will be read is kept until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distgd import events as ev
from distgd.errors import BadInput
from distgd.layout import Slice
from distgd.optim import PieceOptimizer
from distgd.plan import Plan
from distgd.replay.tape import Tape
from distgd.replica import SlotGradient
from distgd.rules import ShardRules
from distgd.staging import Block, Mean
from distgd.updates import INCOMPLETE
from distgd.worker import SlotWork, Worker

Array = np.ndarray[Any, Any]


class Differs(Exception):
    """Something is not as it was recorded; the message names the first such thing."""


@dataclass
class Part:
    """One shard, and what of it will be read.

    Args:
        buffers: the model's, shard 0 only.
        readers: how many leases are still to read each version, from version `first` on.
        kept: weights and buffers of earlier versions.
    """

    cut: Slice
    weights: Tensor
    optimizer: PieceOptimizer
    buffers: Array | None
    version: int
    first: int = 0
    readers: list[int] = field(default_factory=list)
    kept: dict[int, tuple[Tensor, Array | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._blocks = [Block.of(self.cut, cuts) for cuts in self.optimizer.blocks]

    def step(self, mean: Mean, scale: float) -> None:
        """One update."""
        for number, block in enumerate(self._blocks):
            grad = mean.block(block.first, block.stop, torch.empty(block.stop - block.first, dtype=self.weights.dtype))
            self.optimizer.step_block(number, [grad[lo:hi] for lo, hi in block.parts], scale)

    def keep(self) -> None:
        """Before an update: a version that will be read stays."""
        if self.readers[self.version - self.first]:
            self.kept[self.version] = self.weights.clone(), self.buffers

    def read(self, version: int) -> tuple[Tensor, Array | None]:
        """A version that a lease read; it goes with its last reader."""
        left = self.readers[version - self.first] = self.readers[version - self.first] - 1
        if version == self.version:
            return self.weights, self.buffers
        return self.kept[version] if left else self.kept.pop(version)


@dataclass
class _Gradient:
    """A slot's; `uses` are the shards that have not applied it yet."""

    out: Tensor
    slot: SlotGradient
    uses: int


class Leased:
    """A tape on its way.

    Args:
        parts: every shard, at the version at which the tape begins.
        worker: of the run's own specification; it computes slots.
        passed: told of each shard when it is where it ends to count.
    """

    def __init__(
        self, plan: Plan, tape: Tape, parts: Sequence[Part], worker: Worker, passed: Callable[[Part], None]
    ) -> None:
        self._plan, self._tape, self._parts, self._worker, self._passed = plan, tape, parts, worker, passed
        self._rules: ShardRules = worker.spec.rules
        self._cuts = tuple(part.cut for part in parts)
        self._gradients: dict[int, _Gradient] = {}
        self._spare: list[Tensor] = []
        self.computed = 0
        for part in parts:
            part.first, part.readers = part.version, tape.readers(part.cut.index).tolist()

    def run(self) -> None:
        """Make every update of the tape again.

        Raises:
            Differs: a gradient or a learning rate is another than what is recorded.
            BadInput: the record contradicts itself.
        """
        left = [part for part in self._parts if not self._pass(part)]
        while left:
            moved = [part for part in left if self._advance(part)]
            if not moved:
                waiting = ", ".join(f"shard {p.cut.index} at version {p.version}" for p in left)
                key = f"updates of timeline {self._tape.segment.timeline}"
                raise BadInput.described(key, "reads of versions that came before", f"none for {waiting}", INCOMPLETE)
            left = [part for part in left if not (part in moved and self._pass(part))]

    def _pass(self, part: Part) -> bool:
        """Say that a shard is where it ends to count, if it is; whether it is where its tape ends."""
        shard = part.cut.index
        if part.version == self._tape.segment.ends[shard]:
            self._passed(part)
        return part.version - part.first >= len(self._tape.rows[shard])

    def _advance(self, part: Part) -> bool:
        """One update of a shard, if its gradient can be known."""
        shard, at = part.cut.index, part.version - part.first
        lease, row = int(self._tape.lease[shard][at]), self._tape.rows[shard][at]
        if lease not in self._gradients and not self._compute(lease, row):
            return False
        gradient = self._gradients[lease]
        self._check(part, row, gradient)
        part.keep()
        if row["applied"] and gradient.slot.stats.weight:
            mean = Mean.of(gradient.out[part.cut.start : part.cut.stop], gradient.slot.stats.weight)
            part.step(mean, float(row["scale"]))
            if part.buffers is not None and row["slot"] == 0 and gradient.slot.buffers is not None:
                part.buffers = gradient.slot.buffers
        part.version += 1
        gradient.uses -= 1
        if not gradient.uses:
            self._spare.append(self._gradients.pop(lease).out)
        return True

    def _compute(self, lease: int, row: Any) -> bool:
        """The gradient of a lease, if every shard has been where it was read."""
        reads = self._tape.reads[lease].tolist()
        if any(part.version < version for part, version in zip(self._parts, reads, strict=True)):
            return False
        found = [part.read(version) for part, version in zip(self._parts, reads, strict=True)]
        weights = {part.cut.index: values.numpy() for part, (values, _) in zip(self._parts, found, strict=True)}
        self._worker.replica.install(self._cuts, weights, found[0][1])
        out = self._spare.pop() if self._spare else self._plan.layout.zeros()
        work = SlotWork(
            self._worker.spec.rules.timeline, self._worker.work.token, int(row["step"]), int(row["slot"]), out
        )
        torch.set_num_threads(self._worker.spec.threads)
        done = self._worker.perform(work, _unheard)
        torch.set_num_threads(1)  # as servers have it
        self._gradients[lease] = _Gradient(out, done.gradient, int(self._tape.uses[lease]))
        self.computed += 1
        return True

    def _check(self, part: Part, row: Any, gradient: _Gradient) -> None:
        factor = self._plan.schedule.factor(int(row["step"]))
        square = float(row["square"]) if row["applied"] else gradient.slot.stats.squared_norm  # of a skip there is none
        consistency = self._plan.config.consistency  # a finite one may have been skipped
        limited = consistency.max_grad_norm_ratio is not None or consistency.on_divergence == "rollback"
        counts = not gradient.slot.bad and (bool(row["applied"]) or not limited)
        for what, recorded, found in (
            ("squared gradient norm", square, gradient.slot.stats.squared_norm),
            ("whether the gradient is finite", float(row["applied"]), float(counts)),
            ("factor of the learning rate", float(row["scale"]), self._rules.lr_scale(factor, int(row["staleness"]))),
        ):
            if recorded != found and not (np.isnan(recorded) and np.isnan(found)):
                where = f"timeline {self._tape.segment.timeline}, shard {part.cut.index}, version {part.version}"
                slot = f"step {row['step']}, slot {row['slot']}, read at versions {row['reads'].tolist()}"
                raise Differs(f"{where} ({slot}): {what} {recorded!r} recorded, {found!r} found")


def _unheard(effect: ev.Effect) -> None:
    raise AssertionError(f"under a lease nothing leaves before a slot is done: {effect!r}")
