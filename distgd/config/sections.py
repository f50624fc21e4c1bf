"""The config's sections: what each key means, its type, its default, and which keys exclude one another.

`extra="forbid"`, strict types (true is no number, "4" is no integer, infinity and NaN are refused), frozen. The text
under a field is its description in `distgd config schema` and `docs/config.md`. `distgd.config.load` is the door: it
turns pydantic's errors into one `BadInput`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    field_validator,
    model_serializer,
    model_validator,
)

from distgd.config.data import Data
from distgd.config.stop import Best, Stop
from distgd.config.strict import Amount, Count, ImportPath, Open, Positive, Section, Text, refuse
from distgd.config.task import TaskSection
from distgd.config.text import dump

Name = Annotated[
    str,
    Field(
        pattern=r"^\.*[A-Za-z0-9_-][A-Za-z0-9._-]*$", json_schema_extra={"expected": "text of letters, digits, . _ -"}
    ),
]


class Run(Section):
    """The run's name, place and seed."""

    name: Name | None = None
    """The run folder's name; null makes it of the config's name, the date and four random digits."""
    storage: Text = "runs"
    """The folder in which run folders are made."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the initial weights, the order of the data and every random number of a slot."""
    bits: Literal["auto", "strict"] = "auto"
    """Where a machine computes other bits than the first: auto admits it and marks the run, strict refuses it."""


class Batch(Section):
    """The global batch of a step and its pieces."""

    size: Count | Literal["full"] = 32
    """Samples in the global batch of a step; full is the whole training set."""
    slots: Count | None = None
    """Pieces that a batch is cut into, whatever the number of workers; decides the bits; null is one a worker."""

    @model_validator(mode="after")
    def _cut(self) -> Self:
        if self.slots is not None and self.size != "full" and self.slots > self.size:
            refuse("batch.slots", f"at most batch.size={self.size}", self.slots, "a slot holds at least one sample")
        return self


class Group(Open):
    """Parameters with arguments of their own; all other keys are the optimizer's."""

    match: Text
    """A pattern on parameter names, such as *.bias; the first group that matches takes the parameter."""


class Clip(Section):
    """Limits on the gradient's norm."""

    norm: Positive | None = None
    """Limit on the norm of the step's mean gradient."""
    slot_norm: Positive | None = None
    """Limit on the norm of each slot's gradient, before they are added."""


class Optimizer(Open):
    """The update rule. All other keys are the optimizer's own arguments, such as momentum or betas."""

    name: Text = "sgd"
    """An elementwise optimizer of torch.optim, such as sgd, adam, adamw or rmsprop."""
    lr: Positive | None = None
    """The learning rate; null is torch's default for the optimizer."""
    groups: Annotated[tuple[Group, ...], Strict(False)] = ()
    """Parameter groups: a list of {match: PATTERN, lr: ..., ...}."""
    clip: Clip = Clip()
    """Limits on the gradient's norm."""


class Schedule(Section):
    """The learning rate as a function of the step."""

    name: Literal["constant", "step", "exponential", "linear", "cosine", "inverse-sqrt", "one-cycle"] = "constant"
    """The shape after the warm-up."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly."""
    steps: Count | None = None
    """Length of linear, cosine and one-cycle; null is the length of the run."""
    gamma: Positive | None = None
    """Factor of step and exponential."""
    step_size: Count | None = None
    """Steps between two factors of step."""
    final: Amount = 0.0
    """The fraction of the learning rate at the end of linear, cosine and one-cycle."""
    pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The fraction of one-cycle in which the learning rate rises."""
    div_factor: Positive = 25.0
    """one-cycle begins at the learning rate divided by this."""


class Consistency(Section):
    """How servers treat gradients that arrive at different times."""

    mode: Literal["sync", "bounded", "async"] = "sync"
    """sync: one update a step; bounded: one a slot, within the staleness; async: one a slot, as they come."""
    staleness: Annotated[int, Field(ge=0)] | None = None
    """Most updates between the weights read and the weights changed; 2 when unset; only with bounded."""
    quorum: Count | None = None
    """Slots that are enough for a step, later ones are dropped; null is all of them; only with sync."""
    scale_lr: bool = False
    """Divide the learning rate by the staleness of each gradient; not with sync."""
    on_poison: Literal["stop", "skip"] = "stop"
    """What happens to a slot that is not finite, computed by two workers: the run ends, or it counts without effect."""
    max_grad_norm_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A slot whose gradient norm is above so many times the median of the last 64 is as one that is not finite."""
    max_skips: Count = 10
    """Steps (sync) or slots that may be skipped, with on_poison skip; the next one ends the run."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """Where such a slot would end the run: it ends, or goes back to the last checkpoint and on behind that step."""

    @model_validator(mode="before")
    @classmethod
    def _bounded_is_two(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("mode") == "bounded" and given.get("staleness") is None:
            return {**given, "staleness": 2}
        return given

    @model_validator(mode="after")
    def _fits_mode(self) -> Self:
        mode = f"consistency.mode={self.mode}"
        if self.staleness is not None and self.mode != "bounded":
            refuse("consistency.staleness", f"null with {mode}", self.staleness, "set consistency.mode=bounded")
        if self.quorum is not None and self.mode != "sync":
            refuse("consistency.quorum", f"null with {mode}", self.quorum, "set consistency.mode=sync")
        if self.scale_lr and self.mode == "sync":
            refuse("consistency.scale_lr", f"false with {mode}", True, "no gradient is stale there")
        return self


NUMBER_OR_RANGE = "a whole number, at least 1, or {min: A, max: B}"


class Workers(Section):
    """How many there may be, `N` or `{min: A, max: B}`: the run begins with `min`, and grows as there is room."""

    model_config = ConfigDict(json_schema_extra={"expected": NUMBER_OR_RANGE})

    min: Count
    """So many are waited for at the start."""
    max: Count
    """So many there are at most."""

    @model_validator(mode="before")
    @classmethod
    def _as_range(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return {"min": given, "max": given}
        if not isinstance(given, Mapping | Workers):
            refuse("", NUMBER_OR_RANGE, given, "correct it, or leave it out for 2")
        return given

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            refuse("cluster.workers.min", f"at most cluster.workers.max={self.max}", self.min, "lower it")
        return self

    @model_serializer(mode="plain")
    def _short(self) -> int | dict[str, int]:
        return self.max if self.min == self.max else {"min": self.min, "max": self.max}

    def __str__(self) -> str:
        return str(self.max) if self.min == self.max else f"{self.min} to {self.max}"


class Cluster(Section):
    """Processes and machines."""

    backend: Literal["ray", "inprocess"] = "ray"
    """ray: actors on one or many machines; inprocess: everything on one thread, for debugging."""
    address: Text | None = None
    """A running Ray cluster, as host:port or auto; null starts one on this machine; only with ray."""
    workers: Workers = Workers(min=2, max=2)
    """Processes that compute gradients; with {min: A, max: B} the run begins with A and grows to B as there is room."""
    servers: Count = 1
    """Processes that hold the weights, a shard each."""
    cpus: Amount = 1.0
    """CPUs that Ray sets aside for a worker."""
    gpus: Amount = 0.0
    """GPUs that Ray sets aside for a worker."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; auto is cuda when gpus > 0, else cpu."""
    server_device: Literal["cpu", "cuda"] = "cpu"
    """Where servers keep the optimizer's state and step; with cuda host memory holds a copy of the weights."""
    server_gpus: Annotated[float, Field(ge=0, le=1)] = 0.0
    """GPUs, or a part of one, that Ray sets aside for a server; only with server_device cuda."""
    threads: Count = 1
    """Threads of a worker's torch; part of what decides the bits."""
    start_timeout: Positive | None = None
    """Seconds that all processes have to start; null is 90 on this machine and 600 by address."""
    standby: bool = True
    """Keep an idle process on each machine with memory for it, to take over from one that is lost; not inprocess."""
    deadline: Positive = 300.0
    """Seconds without a commit and without an evaluation after which the run ends: longer than any one takes."""

    @property
    def compute_device(self) -> Literal["cpu", "cuda"]:
        """`device`, with auto resolved."""
        if self.device == "auto":
            return "cuda" if self.gpus > 0 else "cpu"
        return self.device

    @property
    def start_seconds(self) -> float:
        """`start_timeout`, with null resolved."""
        if self.start_timeout is None:
            return 90.0 if self.address is None else 600.0
        return self.start_timeout

    @model_validator(mode="after")
    def _servers_find_their_cards(self) -> Self:
        if self.server_device == "cpu" and self.server_gpus:
            do = "set cluster.server_device=cuda, or remove it"
            refuse("cluster.server_gpus", "0 with cluster.server_device=cpu", self.server_gpus, do)
        if self.server_device == "cuda" and not self.server_gpus and self.backend == "ray":
            do = "set it, such as cluster.server_gpus=0.25, as Ray hides the GPUs from whoever asks for none"
            refuse("cluster.server_gpus", "more than 0 with cluster.server_device=cuda", self.server_gpus, do)
        return self

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.address is None:
            return self
        if self.backend != "ray":
            refuse("cluster.address", f"null with cluster.backend={self.backend}", self.address, "remove it")
        if self.address.startswith("ray://"):
            do = "Ray Client is not for training; run distgd on a node of the cluster"
            refuse("cluster.address", "host:port or auto", self.address, do)
        return self


class Every(Section):
    """How often: `{steps: N}`, `{seconds: N}` or `{epochs: N}`."""

    model_config = ConfigDict(json_schema_extra={"expected": "exactly one of {steps: N}, {seconds: N}, {epochs: N}"})

    steps: Count | None = None
    """After so many steps."""
    seconds: Positive | None = None
    """After so many seconds."""
    epochs: Count | None = None
    """After so many passes over the data."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = {key: value for key, value in self if value is not None}
        if len(given) != 1:
            refuse("", "exactly one of {steps: N}, {seconds: N}, {epochs: N}", given, "leave one of them")
        return self

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}


class Eval(Section):
    """Evaluation on held-out data, by an actor of its own; the last version is always evaluated."""

    every: Every = Every(epochs=1)
    """How often; skipped where the evaluation before still runs and neither stop.target nor stop.patience waits."""
    best: Best | None = None
    """The weights of the best evaluation are kept in best.safetensors; null keeps the last ones alone."""
    cpus: Amount = 0.0
    """CPUs that Ray sets aside for the evaluator."""
    gpus: Amount = 0.0
    """GPUs that Ray sets aside for the evaluator."""


class Checkpoint(Section):
    """What a run can go on from, each a folder in the run folder; one is before the first step, one at the end."""

    every: Every | None = Every(seconds=60.0)
    """How often, beside training; null keeps none at all."""
    keep: Count = 2
    """So many of the newest are kept."""
    storage: Text | None = None
    """An object store for them, such as s3://bucket/folder; null is the run folder, which all machines share then."""
    keep_best: bool = False
    """Keep also the newest one that is not beyond the best evaluation; with every as eval.every it is of that step."""
    record: bool = True
    """Record every update in bounded and async mode, so that distgd replay can repeat the run bit for bit."""

    @field_validator("storage")
    @classmethod
    def _somewhere_else(cls, given: str | None) -> str | None:
        if given is not None and "://" not in given:
            do = "for a folder that all machines share set run.storage"
            refuse("checkpoint.storage", "a URI, such as s3://bucket/folder", given, do)
        return given


class Transport(Section):
    """How gradients and weights travel between machines; within one machine they do not travel."""

    dtype: Literal["model", "bfloat16"] = "model"
    """What numbers travel as in sync mode without a quorum: the model's own type, or two bytes (bits not promised)."""


class Tracking(Section):
    """Where metrics go; metrics.jsonl in the run folder is always written and complete."""

    uri: Text = "sqlite:///mlflow.db"
    """MLflow's store; none turns MLflow off."""
    experiment: Text = "distgd"
    """MLflow's experiment."""
    every: Every | None = None
    """How often a step is logged to MLflow; null is as often as makes about 1,000 points."""
    also: Annotated[tuple[ImportPath, ...], Strict(False)] = ()
    """More trackers, as module:Class: a class with the methods start(info), log(event) and finish(end)."""


class Faults(Section):
    """Faults that are injected on purpose, to rehearse what a run does about them."""

    plan: Text | None = None
    """A file that lists faults: what, whom, when (docs/faults.md); null injects none."""


class Config(Section):
    """A whole run. Made by `distgd.config.load`; equal configs, seeds and data give equal bits in sync mode."""

    run: Run = Run()
    task: TaskSection
    data: Data = Data()
    batch: Batch = Batch()
    stop: Stop
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    consistency: Consistency = Consistency()
    cluster: Cluster = Cluster()
    transport: Transport = Transport()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    faults: Faults = Faults()

    @field_validator("task", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _enough_slots(self) -> Self:
        quorum, slots = self.consistency.quorum, self.batch.slots
        if quorum is not None and slots is not None and quorum > slots:
            do = "lower it, or cut the batch in more slots"
            refuse("consistency.quorum", f"at most batch.slots={slots}", quorum, do)
        return self

    @model_validator(mode="after")
    def _room_for_all(self) -> Self:
        slots, workers = self.batch.slots, self.cluster.workers
        if slots is not None and workers.min < workers.max > slots:
            do = "a worker without a slot would be idle; lower it, or cut the batch in more slots"
            refuse("cluster.workers.max", f"at most batch.slots={slots}", workers.max, do)
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Self:
        if self.checkpoint.keep_best and self.eval.best is None:
            refuse("checkpoint.keep_best", "false without eval.best", True, "set eval.best={metric: eval/loss}")
        return self

    @model_validator(mode="after")
    def _can_go_back(self) -> Self:
        if self.consistency.on_divergence == "rollback" and self.checkpoint.every is None:
            refuse("consistency.on_divergence", "stop with checkpoint.every=null", "rollback", "keep checkpoints")
        return self

    @model_validator(mode="after")
    def _strict_can_be_promised(self) -> Self:
        if self.run.bits == "auto":
            return self
        mode, quorum, dtype = self.consistency.mode, self.consistency.quorum, self.transport.dtype
        why = f"consistency.mode={mode}" if mode != "sync" else None
        why = why or (f"consistency.quorum={quorum}" if quorum is not None and quorum != self.batch.slots else None)
        why = why or (f"transport.dtype={dtype}" if dtype != "model" else None)
        why = why or ("consistency.on_divergence=rollback" if self.consistency.on_divergence == "rollback" else None)
        if why is not None:
            refuse("run.bits", f"auto with {why}", self.run.bits, "no bits are promised there; remove one of the two")
        return self

    def to_yaml(self) -> str:
        """Every key with its value; `load` reads it back as an equal config."""
        return dump(self.model_dump(mode="json"))

    def flat(self) -> dict[str, str | int | float | bool | None]:
        """Dotted keys to scalars, for MLflow's params; lists and empty mappings as JSON text.

        >>> Config(task=TaskSection(name="digits"), stop=Stop(epochs=1)).flat()["batch.size"]
        32
        """
        return dict(_leaves("", self.model_dump(mode="json")))


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, str | int | float | bool | None]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, json.dumps(value) if isinstance(value, list | dict) else value
