"""Everything that can be wrong with the input is found here, before anything is started or written.

`prepare` loads the task, builds the driver's model, tries one slot of real data and a few held-out samples, and says
what is wrong as one `BadInput`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgd import weights
from distgd.config import Config
from distgd.errors import BadInput, blaming
from distgd.faults import FaultPlan, check, parse
from distgd.layout import state, trainable
from distgd.optim import check_groups, resolve_optimizer, resolve_schedule
from distgd.plan import ENDLESS, Plan, many
from distgd.replica import Blueprint, Replica
from distgd.sources import Order, Source
from distgd.stopping import Judge
from distgd.tasks import Task, checked
from distgd.worker import TaskSource

TRIAL = 8  # held-out samples that are tried before the start


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
    faults = _faults(config, evaluator=held_out is not None)
    warnings = _warnings(config, order, faults)
    return Plan(
        config, name, where, replica, source, order, steps, optimizer, schedule, held_out, example, warnings, faults
    )


def _build(where: TaskSource, config: Config) -> tuple[Replica, Source]:
    task = where.load()
    if where.given is not None:
        checked("task", type(task).__name__, task)
    with blaming("task.model", "a model that can be built"):
        replica = Replica(task, config.run.seed)
    with blaming("task.train_data", "data that can be opened"):
        return replica, replica.train_source()


def _slots(config: Config, size: int) -> int:
    slots = config.batch.slots or min(config.cluster.workers.max, size)
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
        raise BadInput.described("schedule.steps", f"{expected} says how long the run is", "null", "set schedule.steps")


def _check_model(replica: Replica, config: Config) -> None:
    weights.check(state(replica.model))
    for name, view in replica.layout.views(replica.flat).items():
        if not bool(view.isfinite().all()):
            do = "look at its initialization"
            raise BadInput.described("task.model", "finite initial weights", f"NaN or infinity in {name}", do)
    cluster = config.cluster
    devices = {"cluster.device": cluster.compute_device, "cluster.server_device": cluster.server_device}
    key = next((key for key, device in devices.items() if device == "cuda"), None)
    if cluster.backend == "inprocess" and key and not torch.cuda.is_available():
        raise BadInput.described(key, "a CUDA GPU on this machine", "none", f"set {key}=cpu")


def _check_batch_norm(replica: Replica, order: Order, steps: int) -> None:
    if not replica.has_batch_norm():
        return
    for step in {0, min(steps, order.steps_per_epoch) - 1}:  # only an epoch's last batch differs from its first
        for slot in range(order.slots):
            first, stop = order.places(step, slot)
            if stop - first == 1:
                raise BadInput.described(
                    "batch.slots",
                    "two samples or more in every slot, as the model has BatchNorm",
                    f"one sample in slot {slot} of step {step}",
                    f"choose batch.size and batch.slots so that the last batch of the {order.samples} samples fits",
                )


def _try_one_slot(replica: Replica, source: Source, order: Order) -> Tensor | None:
    """Compute slot 0 of step 0 once: errors of the task show here, not on a cluster."""
    seen: list[Any] = []
    with blaming("task.train_data", "samples that make a batch"):
        replica.batch(source, order, 0, 0)
    hook = replica.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    try:
        with blaming("task.loss", "loss(model, batch) to give the mean of a slot"), _dense_only(replica):
            replica.gradient(source, order, 0, 0, replica.layout.zeros())
    finally:
        hook.remove()
        replica.forget()
    takes_one = bool(seen) and len(seen[0]) == 1 and isinstance(seen[0][0], Tensor)
    return seen[0][0].detach().clone() if takes_one else None


@contextmanager
def _dense_only(replica: Replica) -> Iterator[None]:
    """Refuse gradients that come in a sparse form: shards step every element of a dense vector."""

    def check(name: str, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            do = "use a layer without sparse=True"
            raise BadInput.described(f"task.model: {name}", "a dense gradient", f"a sparse one ({grad.layout})", do)

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
                do = "add eval_data, or remove the key"
                raise BadInput.described(key, "null, as the task has no eval_data", "a metric", do)
        return None
    with blaming("task.eval_data", "data that can be opened"):
        source = replica.eval_source()
    with blaming("task", "loss and metrics to take samples of eval_data"):
        found = replica.evaluate(source, TRIAL, samples=TRIAL)
    if not hasattr(replica.task, "evaluate"):  # what that one returns is known once it has seen the whole set
        judge.check({f"eval/{name}": value for name, value in found.items()})
    return replica.blueprint(source)


def _refuse_written(replica: Replica, before: Tensor) -> None:
    views, former = replica.layout.views(replica.flat), replica.layout.views(before)
    written = [name for name, view in views.items() if not torch.equal(view, former[name])]
    if written:
        do = "keep running values in buffers (register_buffer)"
        raise BadInput.at("task.model", "parameters that only the optimizer changes", written, do)


def _faults(config: Config, *, evaluator: bool) -> FaultPlan | None:
    """The faults that are to be injected; each must be meant for somebody of this run."""
    if config.faults.plan is None:
        return None
    path = Path(config.faults.plan)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"{path} ({getattr(error, 'strerror', None) or 'other bytes'})"
        raise BadInput.described("faults.plan", "a file that lists faults", found, "correct the path") from None
    plan = FaultPlan(text, path.name, parse(text, path.name))
    counts = {"worker": config.cluster.workers.max, "server": config.cluster.servers, "evaluator": int(evaluator)}
    check(plan.faults, {**counts, "driver": 1}, plan.where)
    return plan


def _warnings(config: Config, order: Order, faults: FaultPlan | None) -> tuple[str, ...]:
    workers, sync = config.cluster.workers.max, config.consistency.mode == "sync"
    found = []
    if sync and workers > order.slots:
        found.append(f"{workers - order.slots} of {workers} workers are idle: a step has {many(order.slots, 'slot')}")
    if faults is not None:
        found.append(f"{many(len(faults.faults), 'fault')} of {faults.where} to be injected on purpose")
    return tuple(found)
