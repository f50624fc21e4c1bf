"""What processes tell one another: events in the past tense, commands in the imperative, all frozen and all data.

A message names the timeline that it belongs to; its sender's incarnation is established by the transport and handed to
`handle(source, event)` beside it. Arrays are numpy arrays; everything else is a scalar, a string or a tuple of them, so
that a message can be written as JSON plus raw bytes and nothing is ever unpickled. What a class leaves out on purpose
is said in its docstring.

Steps are numbered from 0 over the whole run, versions count updates (sync: one a step; bounded and async: one a slot).
Ranges of slots are `first` inclusive, `stop` exclusive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Protocol

import numpy as np

DRIVER = 0
"""The driver's incarnation in every timeline."""
FINAL = 1 << 30
"""The number of a run's last snapshot, above all others."""


# What one slot did. Carried by pushes to shard 0 (sync) or by the end of a lease (bounded, async).


@dataclass(frozen=True, slots=True)
class SlotStats:
    """One slot's contribution: `loss` is the mean over `weight`, `squared_norm` that of its mean gradient.

    `worker` is the incarnation that computed it, where that is known.
    """

    slot: int
    samples: int
    weight: float
    loss: float
    squared_norm: float
    seconds: float
    worker: int = -1


# Driver to everybody.


@dataclass(frozen=True, slots=True)
class MembershipChanged:
    """Who lives, and who computes what. The highest `number` wins; an older one is ignored.

    `live` holds every live incarnation and `newest` the highest ever started. `table[k]` is the incarnation that
    computes slot k (sync only, else empty). `nodes` are the live shards and workers by machine, those of a machine in
    the order in which they came; empty where there is one machine.
    """

    timeline: int
    number: int
    live: frozenset[int]
    newest: int
    table: tuple[int, ...]
    nodes: tuple[tuple[int, ...], ...] = ()

    def places(self, incarnation: int) -> bool:
        """Whether it is known on which machine a shard or a worker is; of one that is still starting it is not."""
        return not self.nodes or any(incarnation in node for node in self.nodes)

    def beside(self, incarnation: int) -> frozenset[int]:
        """Who is on the machine of `incarnation`, itself among them; all that live where there is one machine."""
        return next((frozenset(node) for node in self.nodes if incarnation in node), self.live)

    def adder(self, incarnation: int, shards: Collection[int]) -> int:
        """Who adds for the machine of `incarnation`: the worker that came first, so that nobody takes it over."""
        return next(i for node in self.nodes if incarnation in node for i in node if i not in shards)


@dataclass(frozen=True, slots=True)
class TimelineBegun:
    """All shards go back to a checkpoint, and these are their incarnations from now on, by index.

    Whoever was in another timeline drops what it has of that: staged gradients, decisions, reads, pushes, weights.
    """

    timeline: int
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a process is that came later; for the host, not for what runs on it."""

    incarnation: int
    node: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inject:
    """A fault of the run's plan is due, or begins to count: the one at this place of the plan (`distgd.faults`)."""

    timeline: int
    fault: int


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault of the run's plan was delivered; from the cluster to the driver, as a loss is."""

    text: str


@dataclass(frozen=True, slots=True)
class Alive:
    """A process's heartbeat, from a thread that does not compute; the cluster hears it, nobody else."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class Load:
    """A shard's state; the first that it is sent. Where the run keeps checkpoints, it writes number 0 of them.

    `weights`, [its elements], begin a run; else all is read from the folder `checkpoint`. `version` is what that number
    0 is called by. `norms` are the squared ones of the slots that were applied last (`distgd.norms`; sync).
    """

    timeline: int
    weights: np.ndarray[Any, Any] | None
    checkpoint: str = ""
    version: int = 0
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A shard has its state, at `version`."""

    timeline: int
    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process. Nothing that was pushed and not committed survives."""

    timeline: int


@dataclass(frozen=True, slots=True)
class StatusRequested:
    """The driver asks what a process is doing."""

    timeline: int


@dataclass(frozen=True, slots=True)
class StatusSent:
    """What a process is doing, in words for an error message."""

    timeline: int
    text: str


@dataclass(frozen=True, slots=True)
class ProcessReady:
    """A process is built and waits. `facts` are for the record: pid, host, device."""

    timeline: int
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class ProcessFailed:
    """A process ends because of an error. `kind` names a class of `distgd.errors`."""

    timeline: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class ProcessLost:
    """Made by the cluster, never sent: an incarnation is gone, confirmed."""

    incarnation: int
    why: str


@dataclass(frozen=True, slots=True)
class Drained:
    """Made by the cluster, never sent: the machine of an incarnation is about to go. Said until it is left."""

    incarnation: int


# Workers and shards.


@dataclass(frozen=True, slots=True)
class PullRequested:
    """Send a version of at least `at_least`; a `lease` (bounded, async) opens a read for (step, slot).

    `buffers` is the version of the model's buffers that the reader holds already, `holds` that of the weights.
    """

    timeline: int
    at_least: int
    buffers: int
    lease: int = -1
    step: int = -1
    slot: int = -1
    holds: int = -1


@dataclass(frozen=True, slots=True)
class WeightsSent:
    """One shard's weights at `version`. `buffers` come from shard 0 alone, and only where the reader's are older.

    `weights` are None where they came before, in so many `parts`.
    """

    timeline: int
    shard: int
    version: int
    lease: int
    buffers_version: int
    weights: np.ndarray[Any, Any] | None
    buffers: np.ndarray[Any, Any] | None
    parts: int = 0


@dataclass(frozen=True, slots=True)
class WeightsPart:
    """Elements of a shard's weights at `version`, from its element `start` on; a `WeightsSent` follows the last part.

    `delta` says that they are to be added to those of the version before.
    """

    timeline: int
    shard: int
    version: int
    start: int
    weights: np.ndarray[Any, Any]
    delta: bool


@dataclass(frozen=True, slots=True)
class GradientArrived:
    """One shard's slice of the sum of S_k over slots [first, stop), S_k = w_k times the mean gradient of slot k.

    `version` is the version read from this shard. `gradient` is None where every slot of the range is empty. `bad` are
    the slots whose loss or gradient is not finite. `stats`, `times` (a worker's seconds by phase) and `buffers` go to
    shard 0. `reads`, where it is not negative, also asks for the version that this step makes, as
    `PullRequested.buffers` would. `gradient` is None, too, where it came before, in so many `parts`.

    What goes to the worker that adds for its machine is for all shards of other machines: `gradient` is then the whole
    flat vector.

    Under a lease (bounded, async) `versions` are those read from all shards, and `square` is the squared norm of the
    slot's mean gradient before it was clipped: both are for the record alone.
    """

    timeline: int
    step: int
    attempt: int
    first: int
    stop: int
    version: int
    weight: float
    bad: tuple[int, ...]
    lease: int
    gradient: np.ndarray[Any, Any] | None
    buffers: np.ndarray[Any, Any] | None
    stats: tuple[SlotStats, ...] = ()
    times: dict[int, dict[str, float]] = field(default_factory=dict)
    reads: int = -1
    parts: int = 0
    versions: tuple[int, ...] = ()
    square: float = 0.0

    def without_facts(self) -> GradientArrived:
        """Without what only shard 0 records."""
        return replace(self, buffers=None, stats=(), times={})


@dataclass(frozen=True, slots=True)
class GradientPart:
    """Elements of what a `GradientArrived` will close, from the shard's element `start` on."""

    timeline: int
    step: int
    attempt: int
    first: int
    stop: int
    start: int
    gradient: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class PushAnswered:
    """What became of a lease's push on one shard: applied, covered or gone (bounded, async).

    `seconds` is the time that the shard took to apply it.
    """

    timeline: int
    shard: int
    lease: int
    outcome: str
    staleness: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Fenced:
    """The receiver is not among the living any more and ends, whatever timeline it is in."""

    timeline: int


# Shards among themselves (sync).


@dataclass(frozen=True, slots=True)
class ShardFilled:
    """Shard `shard` holds `slots` of the step, `bad` among them; `squares` are sums of squares per block of the mean.

    `squares` is None unless the global norm is needed.
    """

    timeline: int
    shard: int
    step: int
    attempt: int
    slots: tuple[int, ...]
    bad: tuple[int, ...]
    squares: np.ndarray[Any, Any] | None


@dataclass(frozen=True, slots=True)
class Measure:
    """Shard 0 proposes a set of slots and asks for its norm (quorum with a clipped global norm)."""

    timeline: int
    step: int
    attempt: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """The step's one decision. `snapshots` are the numbers to be taken of the version that it makes."""

    timeline: int
    step: int
    slots: tuple[int, ...]
    apply: bool
    clip: float
    snapshots: tuple[int, ...]


# Shards and the driver.


@dataclass(frozen=True, slots=True)
class StepCommitted:
    """Shard 0 committed a step. `times` maps a worker's incarnation to its seconds by phase.

    `since` are the seconds since the commit before, by the shard's clock: the driver may hear of several at once.
    """

    timeline: int
    step: int
    applied: bool
    slots: tuple[int, ...]
    bad: tuple[int, ...]
    stats: tuple[SlotStats, ...]
    times: dict[int, dict[str, float]]
    late: int
    norm: float | None
    clip: float
    apply_seconds: float
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class LeaseExpired:
    """A lease ended otherwise than applied everywhere: close its read, drop its held push."""

    timeline: int
    worker: int
    lease: int


@dataclass(frozen=True, slots=True)
class Limit:
    """Sync, to shard 0: decide no step from `steps` on, until a higher limit comes. Gradients go on gathering.

    A limit below the steps that are decided already stands for their number: 0 ends the run as soon as possible.
    """

    timeline: int
    steps: int


@dataclass(frozen=True, slots=True)
class Limited:
    """Shard 0's answer to a `Limit`, behind its reports of all steps that it had decided: the limit that holds."""

    timeline: int
    steps: int


@dataclass(frozen=True, slots=True)
class Poisoned:
    """Sync: shard 0 holds back a step, as slots of it are not finite, or out of proportion.

    `stats` are those of the `bad` slots.
    """

    timeline: int
    step: int
    bad: tuple[int, ...]
    stats: tuple[SlotStats, ...]


@dataclass(frozen=True, slots=True)
class Examine:
    """Sync, to a worker: compute a slot of a step that is held back, and push nothing."""

    timeline: int
    step: int
    slot: int


@dataclass(frozen=True, slots=True)
class Examined:
    """What came of it."""

    timeline: int
    step: int
    bad: bool
    stats: SlotStats


@dataclass(frozen=True, slots=True)
class Skip:
    """Sync, to shard 0: a step that is held back counts as a version and changes nothing.

    Of one that is not held back it says so ahead of time, and of all before it.
    """

    timeline: int
    step: int


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Copy the first version that is at least `version` (the last at most). Sync: sent to shard 0 alone.

    Numbers above 0 are of evaluations, those below of checkpoints, which go to files. Each is taken once.
    """

    timeline: int
    number: int
    version: int


@dataclass(frozen=True, slots=True)
class ShardWritten:
    """One shard's file of checkpoint `number` is durable, in `folder` of the run's; or `error` says why not.

    `applied` is JSON: which slots are in it (bounded, async), else empty.
    """

    timeline: int
    number: int
    shard: int
    folder: str
    file: str
    sha256: str
    size: int
    version: int
    buffers_version: int
    applied: str
    error: str


# The record of updates (bounded, async): shards and the driver.


@dataclass(frozen=True, slots=True)
class UpdatesRecorded:
    """What a shard has applied since it said so last: rows of `recording.row`, as bytes.

    `number` is that of the `RecordsRequested` which it answers, 0 where nobody asked.
    """

    timeline: int
    shard: int
    number: int
    rows: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class RecordsRequested:
    """Send the record of all that is applied by now; checkpoint `number` waits for it."""

    timeline: int
    number: int


# Leases (bounded, async): workers and the driver.


@dataclass(frozen=True, slots=True)
class LeaseRequested:
    """A worker has room for one more slot."""

    timeline: int


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """Compute slot `slot` of step `step`; or, with `skip`, push that it is to count without effect.

    A gradient whose squared norm is above `limit` is not to be pushed.
    """

    timeline: int
    lease: int
    step: int
    slot: int
    skip: bool = False
    limit: float = inf


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Every shard has answered: `outcome` is applied, or gone where a shard refused; `staleness` is by shard.

    Or nothing was pushed, as the gradient is `poisoned`: not finite, or above the lease's limit.
    """

    timeline: int
    lease: int
    step: int
    slot: int
    outcome: str
    bad: bool
    staleness: tuple[int, ...]
    stats: SlotStats
    times: dict[str, float]


# Evaluation.


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate snapshot `number`."""

    timeline: int
    number: int


@dataclass(frozen=True, slots=True)
class SnapshotPulled:
    """Send snapshot `number` as soon as it exists."""

    timeline: int
    number: int


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """One shard's slice of snapshot `number`, taken at `version`; `buffers` come from shard 0 alone."""

    timeline: int
    number: int
    shard: int
    version: int
    weights: np.ndarray[Any, Any]
    buffers: np.ndarray[Any, Any] | None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The metrics of snapshot `number` over the whole evaluation set."""

    timeline: int
    number: int
    version: int
    metrics: dict[str, float]
    seconds: float


MESSAGES: tuple[type, ...] = (
    SlotStats,
    MembershipChanged,
    TimelineBegun,
    Placed,
    Inject,
    Alive,
    Load,
    Loaded,
    Stop,
    StatusRequested,
    StatusSent,
    ProcessReady,
    ProcessFailed,
    PullRequested,
    WeightsSent,
    WeightsPart,
    GradientArrived,
    GradientPart,
    PushAnswered,
    Fenced,
    ShardFilled,
    Measure,
    Commit,
    StepCommitted,
    LeaseExpired,
    Limit,
    Limited,
    Poisoned,
    Examine,
    Examined,
    Skip,
    TakeSnapshot,
    ShardWritten,
    UpdatesRecorded,
    RecordsRequested,
    LeaseRequested,
    LeaseGranted,
    LeaseEnded,
    Evaluate,
    SnapshotPulled,
    SnapshotSent,
    Evaluated,
)
"""Every kind that crosses a process boundary."""


# Effects: what a state machine asks its host to do.


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to incarnation `to`."""

    to: int
    message: Any


@dataclass(frozen=True, slots=True)
class Compute:
    """Do the work that takes time, then feed what `perform` returns back to `handle`."""

    work: Any


@dataclass(frozen=True, slots=True)
class End:
    """The process is done."""

    why: str


@dataclass(frozen=True, slots=True)
class Strike:
    """Be killed, or be stopped for so many seconds, for good with None: a fault of the run's plan (`distgd.faults`)."""

    what: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """Perform these effects one by one, before anything else is handled: what they send is made as they are taken."""

    effects: Iterator[Effect]


class Store:
    """Write this state of a shard to a file, at once: it lies where the next update will change it.

    Whoever is about to make that update calls `keep`, in case that nobody has written it yet.

    Args:
        name: the version that the checkpoint is called by.
        optimizer: tensors by label, parameter and entry, as `optim.StateParts`.
    """

    def __init__(
        self,
        timeline: int,
        number: int,
        name: int,
        version: int,
        weights: np.ndarray[Any, Any],
        optimizer: Any,
        buffers: np.ndarray[Any, Any] | None,
        buffers_version: int,
        applied: str,
    ) -> None:
        self.timeline, self.number, self.name, self.version = timeline, number, name, version
        self.weights, self.optimizer, self.buffers = weights, optimizer, buffers
        self.buffers_version, self.applied = buffers_version, applied
        self.written = False

    def keep(self) -> None:
        """Have copies of what is not written yet."""
        if not self.written:
            self.weights = self.weights.copy()
            self.optimizer = _copied(self.optimizer)

    def release(self) -> None:
        """It is written: let go of the arrays."""
        self.written = True
        self.weights, self.optimizer, self.buffers = self.weights[:0], {}, None


def _copied(tensors: Any) -> Any:
    if isinstance(tensors, dict):
        return {key: _copied(value) for key, value in tensors.items()}
    return [tensor.clone() for tensor in tensors]


class Chore(Protocol):
    """What is begun at once, and finished beside what comes next; its answer is fed back to `handle`."""

    def begin(self) -> None: ...

    def finish(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Beside:
    """Begin a chore now, and finish it beside everything else."""

    chore: Chore


Effect = Send | Compute | End | Update | Store | Beside | Strike
