"""What a run will be, worked out and checked before anything is started.

`prepare` loads the task, builds the driver's model, tries one slot of real data, and says everything that can be wrong
with the input as one `BadInput`. Nothing is written. The plan's model is the run's: its initial weights go to the
servers, and the final ones come back into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distgd import weights
from distgd.assignment import Assignment, Cast
from distgd.config import Config, Every
from distgd.errors import BadInput, DistgdError
from distgd.evaluator import EvaluatorSpec
from distgd.layout import Layout, state, trainable
from distgd.ledger import assign
from distgd.optim import (
    OptimizerSpec,
    PieceOptimizer,
    Schedule,
    check_groups,
    resolve_optimizer,
    resolve_schedule,
)
from distgd.reduce import maximal
from distgd.replica import Blueprint, Replica, users_error
from distgd.server import ServerSpec
from distgd.shard import ShardRules
from distgd.sources import Order, Source
from distgd.stopping import Judge
from distgd.tasks import Pieces, Task
from distgd.worker import TaskSource, WorkerSpec

TRIAL = 8  # held-out samples that are tried before the start
EVAL_BATCH = 256  # samples per forward pass of an evaluation, at least
ENDLESS = 1 << 40
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
    def bits(self) -> str:
        """Whether the weights are a pure function of config, seed and data on one kind of CPU."""
        whole = self.staged and self.quorum == self.order.slots
        return "promised" if whole and self.config.cluster.compute_device == "cpu" else "not promised"

    @property
    def model_name(self) -> str:
        """The task as people call it."""
        section, given = self.config.task, self.task.given
        if given is not None and not isinstance(given, Pieces):
            return type(given).__name__
        return section.name or section.path or (section.model or "task").rpartition(":")[2]

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run has unless something ends it before; None where only that ends it."""
        return self.steps if self.steps < ENDLESS else None

    def every_steps(self, every: Every) -> int | None:
        """A cadence in steps, None where it is in seconds."""
        return every.steps or (every.epochs * self.order.steps_per_epoch if every.epochs else None)

    # Who will play what.

    def cast(self, timeline: int = 1) -> Cast:
        """Incarnations in the order: driver 0, shards, workers, evaluator."""
        cluster = self.config.cluster
        first_worker = 1 + cluster.servers
        after = first_worker + cluster.workers
        return Cast(
            timeline,
            tuple(range(1, first_worker)),
            tuple(range(first_worker, after)),
            after if self.held_out is not None else None,
        )

    def assignment(self) -> Assignment:
        """What the driver is to bring about."""
        every = self.config.eval.every
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
        )

    def specs(self, cast: Cast) -> dict[int, ServerSpec | WorkerSpec | EvaluatorSpec]:
        """Every process by incarnation, shards first."""
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
        )
        limits = [limit for limit in (clip.slot_norm, None if self.staged else clip.norm) if limit is not None]
        slices = self.layout.slices(len(cast.shards))
        flat = self.replica.flat.cpu().numpy()
        frozen = self.replica.frozen()
        blueprint = self.replica.blueprint(self.source)
        specs: dict[int, ServerSpec | WorkerSpec | EvaluatorSpec] = {}
        for part, incarnation in zip(slices, cast.shards, strict=True):
            initial = flat[part.start : part.stop].copy()
            buffers = self.replica.buffers.copy() if part.index == 0 else None
            specs[incarnation] = ServerSpec(
                rules,
                part,
                initial,
                buffers,
                self.optimizer,
                self.schedule,
                self.quorum,
                consistency.staleness,
                self.order,
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
            )
        if cast.evaluator is not None and self.held_out is not None:
            specs[cast.evaluator] = EvaluatorSpec(
                rules,
                cast.evaluator,
                slices,
                self.held_out,
                self.task,
                config.run.seed,
                frozen,
                "cuda" if config.eval.gpus else "cpu",
                config.cluster.threads,
                max(EVAL_BATCH, -(-self.order.batch // self.order.slots)),
            )
        return specs

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
            f"{_many(c.cluster.workers, 'worker')}, {_many(c.cluster.servers, 'server')}, {slots} {self.order.slots}, "
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
        copies = _state_copies(self.optimizer, self.layout)
        shard = max(part.size for part in self.layout.slices(self.config.cluster.servers)) * itemsize
        pushes = self._pushes()
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
            "workers": self.config.cluster.workers,
            "servers": self.config.cluster.servers,
            "shard_elements": [part.size for part in self.layout.slices(self.config.cluster.servers)],
            "bits": self.bits,
            "bytes_pushed_per_step": pushes * state,
            "bytes_pulled_per_step": (self.config.cluster.workers if self.staged else self.order.slots) * state,
            "bytes_worker": (2 + self._gradients_held()) * state,
            "bytes_shard": (3 + copies + self._gradients_staged()) * shard,
            "warnings": list(self.warnings),
        }

    def _own(self) -> Sequence[Sequence[int]]:
        """The slots of each worker under the first table."""
        table = assign(self.order.slots, list(range(self.config.cluster.workers)))
        return [[k for k, w in enumerate(table) if w == worker] for worker in range(self.config.cluster.workers)]

    def _pushes(self) -> int:
        if not self.staged or self.quorum < self.order.slots:
            return self.order.slots
        return sum(len(maximal(own, self.order.slots)) for own in self._own())

    def _gradients_held(self) -> int:
        """Gradient vectors in a worker at once: its pushed sums, and one per level of the sum under way."""
        if not self.staged:
            return 1
        most = max(self._own(), key=len)
        return len(maximal(most, self.order.slots)) + len(most).bit_length() - 1

    def _gradients_staged(self) -> int:
        return self.order.slots if self.quorum < self.order.slots else min(self._pushes(), 2)

    def lines(self) -> list[str]:
        """The plan in words, for `--dry-run`."""
        d = self.as_dict()
        shards = ", ".join(f"{elements:,}" for elements in d["shard_elements"])
        return [
            self.headline(),
            *(f"warning: {warning}" for warning in self.warnings),
            f"layout      {d['parameters']:,} parameters in {d['tensors']} tensors, {d['dtype']}; "
            f"elements by shard: {shards}",
            f"data        {d['samples']:,} samples, batch {d['batch']} in {d['slots']} slots, "
            f"{d['steps_per_epoch']:,} steps an epoch",
            f"traffic     a step pushes {_bytes(d['bytes_pushed_per_step'])} and pulls "
            f"{_bytes(d['bytes_pulled_per_step'])}, all workers together",
            f"memory      about {_bytes(d['bytes_worker'])} a worker plus activations of one slot and data, "
            f"{_bytes(d['bytes_shard'])} a shard; each process has about 400 MB of libraries besides",
            f"same bits   {d['bits']}",
        ]


def prepare(config: Config, task: Task | None = None, name: str = "run") -> Plan:
    """Check everything that can be checked here and work out the run.

    Raises:
        BadInput: config, task or data cannot be used; the message says what to do.
    """
    where = TaskSource(config.task, config.data, task)
    replica, source = _build(where, config)
    size = len(source) if config.batch.size == "full" else config.batch.size
    if size > len(source):
        do = "set batch.size=full or a smaller number"
        raise BadInput.at("batch.size", f"at most the {len(source)} samples of the training data", size, do)
    order = Order(len(source), size, _slots(config, size), config.run.seed)
    steps = _steps(config, order)
    optimizer = resolve_optimizer(config.optimizer)
    check_groups(optimizer, [entry.name for entry in replica.layout.entries])
    _check_schedule(config, steps)
    schedule = resolve_schedule(config.schedule, steps)
    _check_batch_norm(replica, order, steps)
    _check_model(replica, config)
    before = replica.flat.clone()
    example = _try_one_slot(replica, source, order)
    held_out = _try_evaluation(replica, config)
    _refuse_written(replica, before)
    warnings = _warnings(config, order)
    return Plan(config, name, where, replica, source, order, steps, optimizer, schedule, held_out, example, warnings)


def _build(where: TaskSource, config: Config) -> tuple[Replica, Source]:
    try:
        replica = Replica(where.load(), config.run.seed)
        return replica, replica.train_source()
    except DistgdError:
        raise
    except Exception as error:
        raise BadInput(f"task: it could not be built\n{users_error(error)}") from error


def _slots(config: Config, size: int) -> int:
    slots = config.batch.slots or min(config.cluster.workers, size)
    if slots > size:
        do = "a slot holds at least one sample"
        raise BadInput.at("batch.slots", f"at most the {size} samples of a batch", slots, do)
    quorum = config.consistency.quorum
    if quorum is not None and quorum > slots:
        raise BadInput.at("consistency.quorum", f"at most batch.slots={slots}", quorum, "set batch.slots")
    return slots


def _steps(config: Config, order: Order) -> int:
    limits = [config.stop.steps, config.stop.epochs and config.stop.epochs * order.steps_per_epoch, ENDLESS]
    return min(limit for limit in limits if limit)


def _check_schedule(config: Config, steps: int) -> None:
    if steps == ENDLESS and config.schedule.steps is None and config.schedule.name in ("linear", "cosine", "one-cycle"):
        expected = f"a number of steps with schedule.name={config.schedule.name}, as neither stop.steps nor stop.epochs"
        raise BadInput.at("schedule.steps", f"{expected} says how long the run is", None, "set schedule.steps")


def _check_model(replica: Replica, config: Config) -> None:
    weights.check(state(replica.model))
    for name, view in replica.layout.views(replica.flat).items():
        if not bool(view.isfinite().all()):
            raise BadInput.at("task.model", "finite initial weights", f"others in {name}", "look at its initialization")
    cluster = config.cluster
    if cluster.backend == "inprocess" and cluster.compute_device == "cuda" and not torch.cuda.is_available():
        raise BadInput.at("cluster.device", "a CUDA GPU on this machine", "none", "set cluster.device=cpu")


def _check_batch_norm(replica: Replica, order: Order, steps: int) -> None:
    if not replica.has_batch_norm():
        return
    for step in {0, min(steps, order.steps_per_epoch) - 1}:  # only an epoch's last batch differs from its first
        for slot in range(order.slots):
            first, stop = order.places(step, slot)
            if stop - first == 1:
                raise BadInput.at(
                    "batch.slots",
                    "two samples or more in every slot, as the model has BatchNorm",
                    f"one sample in slot {slot} of step {step}",
                    f"choose batch.size and batch.slots so that the last batch of the {order.samples} samples fits",
                )


def _try_one_slot(replica: Replica, source: Source, order: Order) -> Tensor | None:
    """Compute slot 0 of step 0 once: errors of the task show here, not on a cluster."""
    seen: list[Any] = []
    hook = replica.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    try:
        with _dense_only(replica):
            replica.gradient(source, order, 0, 0, replica.layout.zeros())
    except DistgdError:
        raise
    except Exception as error:
        raise BadInput(f"task: its first slot could not be computed\n{users_error(error)}") from error
    finally:
        hook.remove()
    takes_one = bool(seen) and len(seen[0]) == 1 and isinstance(seen[0][0], Tensor)
    return seen[0][0].detach().clone() if takes_one else None


@contextmanager
def _dense_only(replica: Replica) -> Iterator[None]:
    """Refuse gradients that come in a sparse form: shards step every element of a dense vector."""

    def check(name: str, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            do = "use a layer without sparse=True"
            raise BadInput.at(f"parameter {name}", "a dense gradient", f"a sparse one ({grad.layout})", do)

    hooks = [
        parameter.register_hook(lambda grad, name=name: check(name, grad))  # type: ignore[no-untyped-call]
        for name, parameter in trainable(replica.model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _try_evaluation(replica: Replica, config: Config) -> Blueprint | None:
    """Evaluate a few samples: errors of the task, and metrics that the config names and nobody gives, show here."""
    judge = Judge.of(config.stop, config.eval.best)
    if not hasattr(replica.task, "eval_data"):
        for key in ("stop.target", "stop.patience", "eval.best"):
            section, name = key.split(".")
            if getattr(getattr(config, section), name) is not None:
                raise BadInput.at(key, "null, as the task has no eval_data", "a metric", "add eval_data, or remove it")
        return None
    try:
        source = replica.eval_source()
        found = replica.evaluate(source, TRIAL, samples=TRIAL)
    except DistgdError:
        raise
    except Exception as error:
        raise BadInput(f"task: it could not be evaluated\n{users_error(error)}") from error
    if not hasattr(replica.task, "evaluate"):  # what that one returns is known once it has seen the whole set
        judge.check({f"eval/{name}": value for name, value in found.items()})
    return replica.blueprint(source)


def _refuse_written(replica: Replica, before: Tensor) -> None:
    views, former = replica.layout.views(replica.flat), replica.layout.views(before)
    written = [name for name, view in views.items() if not torch.equal(view, former[name])]
    if written:
        do = "keep running values in buffers (register_buffer)"
        raise BadInput.at("task.model", "parameters that only the optimizer changes", written, do)


def _warnings(config: Config, order: Order) -> tuple[str, ...]:
    workers, sync = config.cluster.workers, config.consistency.mode == "sync"
    if not sync or workers <= order.slots:
        return ()
    return (f"{workers - order.slots} of {workers} workers are idle: a step has {_many(order.slots, 'slot')}",)


def _state_copies(spec: OptimizerSpec, layout: Layout) -> int:
    """Vectors of the weights' size that the optimizer keeps, counted on one element."""
    trial = torch.zeros(1, dtype=layout.torch_dtype)
    optimizer = PieceOptimizer(replace(spec, groups=()), [("trial", trial)])
    optimizer.step([torch.ones(1, dtype=layout.torch_dtype)])
    return len(optimizer.state_dict()["elementwise"].get("trial", {}))


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")
