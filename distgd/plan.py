"""What a run will be: its parts, who is to play what, and what it will cost. `distgd.prepare` makes and checks it.

The plan's model is the run's: its initial weights go to the servers, and the final ones come back into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distgd.assignment import Assignment, Cast
from distgd.config import Config, Every, Workers
from distgd.evaluator import EvaluatorSpec
from distgd.events import Load
from distgd.faults import FaultPlan
from distgd.layout import Layout
from distgd.ledger import assign
from distgd.optim import (
    OptimizerSpec,
    PieceOptimizer,
    Schedule,
)
from distgd.promise import NOT_PROMISED, PROMISED
from distgd.reduce import maximal
from distgd.replica import Blueprint, Replica
from distgd.rules import ShardRules
from distgd.server import ServerSpec
from distgd.sources import Order, Source
from distgd.stopping import Judge
from distgd.tasks import Pieces
from distgd.worker import TaskSource, WorkerSpec

EVAL_BATCH = 256  # samples per forward pass of an evaluation, at least
ENDLESS = 1 << 40
ROLLBACKS = 3  # so often a run goes back that diverges; one that does so again has another reason than a few samples
"""Steps of a run that no number of steps or epochs ends: more than any run commits."""


@dataclass(frozen=True)
class Plan:
    """A checked run.

    `held_out` is what an evaluator must build, None where nothing is evaluated; `example` a model input seen in the
    trial slot, None where the model takes something else.
    """

    config: Config
    name: str
    task: TaskSource
    replica: Replica
    source: Source
    order: Order
    steps: int
    optimizer: OptimizerSpec
    schedule: Schedule
    held_out: Blueprint | None
    example: Tensor | None
    warnings: tuple[str, ...]
    faults: FaultPlan | None = None

    @property
    def layout(self) -> Layout:
        return self.replica.layout

    @property
    def staged(self) -> bool:
        """Whether the mode is sync."""
        return self.config.consistency.mode == "sync"

    @property
    def quorum(self) -> int:
        """Slots that are enough for a step (sync)."""
        return self.config.consistency.quorum or self.order.slots

    @property
    def records(self) -> bool:
        """Whether every update is recorded; in sync mode the ledger says all that there is to say."""
        return not self.staged and self.config.checkpoint.record

    @property
    def bits(self) -> str:
        """Whether the weights are a pure function of config, seed and data on one kind of CPU."""
        whole = self.staged and self.quorum == self.order.slots and self.config.transport.dtype == "model"
        cluster = self.config.cluster
        on_cpu = cluster.compute_device == cluster.server_device == "cpu"
        return PROMISED if whole and on_cpu else NOT_PROMISED

    @property
    def model_name(self) -> str:
        """The task as people call it."""
        section, given = self.config.task, self.task.given
        if given is not None and not isinstance(given, Pieces):
            return type(given).__name__
        return section.name or section.path or section.model or "task"

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run has unless something ends it before; None where only that ends it."""
        return self.steps if self.steps < ENDLESS else None

    def every_steps(self, every: Every) -> int | None:
        """A cadence in steps, None where it is in seconds."""
        return every.steps or (every.epochs * self.order.steps_per_epoch if every.epochs else None)

    @property
    def largest_message(self) -> int:
        """Bytes of all weights and buffers."""
        return self.layout.size * self.layout.itemsize + self.replica.buffer_layout.size

    # Who will play what.

    def cast(self, timeline: int = 1) -> Cast:
        """Incarnations in the order: driver 0, shards, workers, evaluator."""
        cluster = self.config.cluster
        first_worker = 1 + cluster.servers
        after = first_worker + cluster.workers.max
        return Cast(
            timeline,
            tuple(range(1, first_worker)),
            tuple(range(first_worker, after)),
            after if self.held_out is not None else None,
        )

    def patient(self, cast: Cast) -> tuple[int, ...]:
        """The workers that the start does not wait for."""
        return cast.workers[self.config.cluster.workers.min :]

    def assignment(self) -> Assignment:
        """What the driver is to bring about."""
        every, saves = self.config.eval.every, self.config.checkpoint.every
        return Assignment(
            self.order,
            self.steps,
            self.staged,
            self.config.consistency.staleness,
            self.optimizer,
            self.schedule,
            self.every_steps(every),
            every.seconds,
            self.config.stop.seconds,
            Judge.of(self.config.stop, self.config.eval.best),
            self.every_steps(saves) if saves else None,
            saves.seconds if saves else None,
            self.records,
            self.config.consistency.max_skips if self.config.consistency.on_poison == "skip" else 0,
            self.config.consistency.max_grad_norm_ratio,
            ROLLBACKS if self.config.consistency.on_divergence == "rollback" else 0,
            self.config.cluster.workers.min,
        )

    def specs(self, cast: Cast, checkpoints: str | None = None) -> dict[int, ServerSpec | WorkerSpec | EvaluatorSpec]:
        """Every process by incarnation, shards first; checkpoints, where any are kept, go to that folder or URI."""
        config, consistency = self.config, self.config.consistency
        clip = config.optimizer.clip
        rules = ShardRules(
            timeline=cast.timeline,
            incarnations=cast.shards,
            slots=self.order.slots,
            last=self.assignment().versions(self.steps),
            staged=self.staged,
            clip=clip.norm if self.staged else None,
            scale_lr=consistency.scale_lr,
            dtype=config.transport.dtype,
            record=self.records,
            norm_ratio=consistency.max_grad_norm_ratio if self.staged else None,
        )
        limits = [limit for limit in (clip.slot_norm, None if self.staged else clip.norm) if limit is not None]
        slices = self.layout.slices(len(cast.shards))
        frozen = self.replica.frozen()
        blueprint = self.replica.blueprint(self.source)
        strict = config.run.bits == "strict"
        looks = strict or self.bits == PROMISED  # whether canaries are of use
        specs: dict[int, ServerSpec | WorkerSpec | EvaluatorSpec] = {}
        for part, incarnation in zip(slices, cast.shards, strict=True):
            buffers = self.replica.buffers.copy() if part.index == 0 else None
            specs[incarnation] = ServerSpec(
                rules,
                part,
                self.layout.dtype,
                buffers,
                self.optimizer,
                self.schedule,
                self.quorum,
                consistency.staleness,
                self.order,
                config.cluster.server_device,
                self.layout,
                checkpoints,
                looks,
                strict and config.cluster.server_device == "cuda",
            )
        for incarnation in cast.workers:
            specs[incarnation] = WorkerSpec(
                rules,
                incarnation,
                slices,
                blueprint,
                self.task,
                self.order,
                config.run.seed,
                frozen,
                min(limits, default=None),
                config.cluster.compute_device,
                config.cluster.threads,
                self.quorum,
                looks,
                strict and config.cluster.compute_device == "cuda",
            )
        if cast.evaluator is not None and self.held_out is not None:
            specs[cast.evaluator] = self._evaluator(cast.evaluator, rules, self.held_out)
        return specs

    def loads(
        self, cast: Cast, checkpoint: str | None = None, version: int = 0, norms: Sequence[float] = ()
    ) -> dict[int, Load]:
        """What each shard begins with, by incarnation: a checkpoint, or the initial weights, as views of the plan's.

        Args:
            norms: of the slots that were applied last before the checkpoint, squared.
        """
        if checkpoint is not None:
            return {shard: Load(cast.timeline, None, checkpoint, version, tuple(norms)) for shard in cast.shards}
        flat = self.replica.flat.cpu().numpy()
        slices = zip(self.layout.slices(len(cast.shards)), cast.shards, strict=True)
        return {shard: Load(cast.timeline, flat[part.start : part.stop]) for part, shard in slices}

    def _evaluator(self, incarnation: int, rules: ShardRules, held_out: Blueprint) -> EvaluatorSpec:
        return EvaluatorSpec(
            rules,
            incarnation,
            self.layout.slices(len(rules.incarnations)),
            held_out,
            self.task,
            self.config.run.seed,
            self.replica.frozen(),
            "cuda" if self.config.eval.gpus else "cpu",
            self.config.cluster.threads,
            max(EVAL_BATCH, -(-self.order.batch // self.order.slots)),
        )

    # In words.

    def headline(self) -> str:
        """The first line of a run's output."""
        c, mode = self.config, self.config.consistency.mode
        how = {"sync": "", "bounded": f" (staleness {c.consistency.staleness})", "async": ""}[mode]
        if self.quorum < self.order.slots:
            how = f" (quorum {self.quorum} of {self.order.slots})"
        slots = "batch.slots" if c.batch.slots else "batch.slots (unset, so one a worker)"
        return (
            f"{self.name}: {self.model_name}, {self.layout.count:,} parameters, {mode}{how}, "
            f"{_workers(c.cluster.workers)}, {many(c.cluster.servers, 'server')}, {slots} {self.order.slots}, "
            f"{self._length()} of {self.order.batch} samples"
        )

    def _length(self) -> str:
        """How long the run is, in words."""
        stop, steps = self.config.stop, self.planned_steps
        rules = [f"{stop.seconds:g} s"] if stop.seconds else []
        rules += [f"stop.{name}" for name in ("target", "patience") if getattr(stop, name)]
        if steps is None:
            return f"steps until {' or '.join(rules)}"
        return f"{steps:,} steps" + (f", or until {' or '.join(rules)}," if rules else "")

    def as_dict(self) -> dict[str, Any]:
        """The plan as numbers: sizes in bytes; `steps` is null where their number is not known."""
        itemsize, size = self.layout.itemsize, self.layout.size
        state = size * itemsize
        shard = max(part.size for part in self.layout.slices(self.config.cluster.servers)) * itemsize
        pushes = self._pushes()
        on_card, copies = self.config.cluster.server_device == "cuda", self.state_vectors()
        return {
            "task": self.model_name,
            "mode": self.config.consistency.mode,
            "parameters": self.layout.count,
            "tensors": len(self.layout.entries),
            "dtype": self.layout.dtype,
            "samples": self.order.samples,
            "batch": self.order.batch,
            "slots": self.order.slots,
            "steps_per_epoch": self.order.steps_per_epoch,
            "steps": self.planned_steps,
            "workers": self.config.cluster.workers.max,
            "servers": self.config.cluster.servers,
            "shard_elements": [part.size for part in self.layout.slices(self.config.cluster.servers)],
            "bits": self.bits,
            "bytes_pushed_per_step": pushes * state,
            "bytes_pulled_per_step": (self.config.cluster.workers.max if self.staged else self.order.slots) * state,
            "bytes_worker": (2 + max(map(self.gradients_held, self.own_slots()))) * state,
            "bytes_shard": (3 + (0 if on_card else copies) + self._gradients_staged()) * shard,
            "bytes_shard_card": (1 + copies) * shard if on_card else 0,
            "warnings": list(self.warnings),
        }

    def own_slots(self) -> Sequence[Sequence[int]]:
        """The slots of each worker under the first table."""
        table = assign(self.order.slots, list(range(self.config.cluster.workers.max)))
        return [[k for k, w in enumerate(table) if w == worker] for worker in range(self.config.cluster.workers.max)]

    def _pushes(self) -> int:
        if not self.staged or self.quorum < self.order.slots:
            return self.order.slots
        return sum(len(maximal(own, self.order.slots)) for own in self.own_slots())

    def gradients_held(self, own: Sequence[int]) -> int:
        """Gradient vectors at once in a worker with these slots: its sums, and one per level of the one under way."""
        if not self.staged or not own:
            return min(1, len(own)) if self.staged else 1
        return len(maximal(own, self.order.slots)) + len(own).bit_length() - 1

    def state_vectors(self) -> int:
        """Vectors of the weights' size that the optimizer keeps, counted on one element."""
        trial = torch.zeros(1, dtype=self.layout.torch_dtype)
        optimizer = PieceOptimizer(replace(self.optimizer, groups=()), [("trial", trial)])
        optimizer.step([torch.ones(1, dtype=self.layout.torch_dtype)])
        return len(optimizer.state_dict()["elementwise"].get("trial", {}))

    def _gradients_staged(self) -> int:
        return self.order.slots if self.quorum < self.order.slots else min(self._pushes(), 2)

    def lines(self) -> list[str]:
        """The plan in words, for `--dry-run`."""
        d = self.as_dict()
        shards = ", ".join(f"{elements:,}" for elements in d["shard_elements"])
        card = [f"GPU memory  {in_bytes(d['bytes_shard_card'])} a shard"] if d["bytes_shard_card"] else []
        return [
            self.headline(),
            *(f"warning: {warning}" for warning in self.warnings),
            f"layout      {d['parameters']:,} parameters in {d['tensors']} tensors, {d['dtype']}; "
            f"elements by shard: {shards}",
            f"data        {d['samples']:,} samples, batch {d['batch']} in {d['slots']} slots, "
            f"{d['steps_per_epoch']:,} steps an epoch",
            f"traffic     a step pushes {in_bytes(d['bytes_pushed_per_step'])} and pulls "
            f"{in_bytes(d['bytes_pulled_per_step'])}, all workers together",
            *card,
            f"same bits   {d['bits']}",
        ]


def _workers(workers: Workers) -> str:
    return f"{workers} workers" if workers.max > 1 else "1 worker"


def in_bytes(count: int) -> str:
    """A number of bytes, in words.

    >>> in_bytes(1_500_000)
    '1.5 MB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def many(count: int, what: str) -> str:
    """A number of things, in words.

    >>> many(2, "slot")
    '2 slots'
    """
    return f"{count} {what}" + ("s" if count != 1 else "")
