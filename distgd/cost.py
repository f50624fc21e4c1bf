"""What a synchronous step costs, worked out before it is run. Seconds and bytes; no clock, no machine, no tensor.

A step is a chain of parts; each waits for the one before:

    compute    the busiest worker's slots, one after the other
    add        its partial sums
    push       gradients on the wire, where shards are on other nodes
    apply      every shard reads what was pushed to it and steps its slice, in one pass
    pull       weights on the wire
    messages   sending, taking and deciding, whatever their size
    driver     its bookkeeping, where the workers leave it no core

With V bytes of weights, G vectors pushed, m vectors of optimizer state and S shards on a node, `apply` moves
(G + 2 + 2 m) V / S bytes in each: W + 6 passes over the weights for Adam and one push a worker.
On one node nothing is copied between processes, so that `push` and `pull` are 0.

What memory and messages cost on a machine is measured (`distgd.machine`); how much of the program's own work there is
around them are the constants below. They were set by the points of `CALIBRATED`; docs/scaling.md holds the model
against others, and says how clean that check is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

SLOT_PASSES = 4
"""Passes over the weights in a slot: read forward and backward, a gradient made and moved to its place."""
WORKER, SHARD, PIECE, WAKE, DRIVER = 4.0, 5.0, 0.2, 1.5, 15.0
"""In messages: a worker's own work a step, a shard's, a shard's for each tensor, a sleeper's waking, the driver's."""
WAIT = 0.35e-3
"""Seconds that a process which is woken waits for a core, for each process a core that there are too many."""
CALIBRATED = ((1, 1, 100_000), (2, 2, 100_000), (1, 1, 5_000_000), (2, 2, 5_000_000))
"""Workers, shards and parameters of `synthetic` by which the constants were set."""
BUCKET = 4 << 20
"""Bytes that are sent at once between nodes."""
GAIN = 0.05
"""The smallest gain for which another number of shards is suggested."""

WORDS = {
    "compute": "computing gradients",
    "memory": "memory traffic where gradients are added and applied",
    "network": "the network",
    "messages": "messages and the program's own work",
}
"""What a step may be bound by."""


@dataclass(frozen=True)
class Machine:
    """One node.

    Args:
        cores: that processes may use.
        bandwidth: bytes a second, read and written ones both counted, that one core copies.
        bandwidth_all: the same of all cores together.
        message: seconds that a core spends on one message, sender's and receiver's together.
    """

    cores: int
    bandwidth: float
    bandwidth_all: float
    message: float

    def turns(self, longest: float, total: float) -> float:
        """Seconds of work of which one process has `longest` and all together `total`: they take turns on the cores."""
        return max(longest, total / self.cores)

    def stream(self, size: float, busy: int) -> float:
        """Seconds in which each of `busy` processes moves `size` bytes."""
        return size * max(self.turns(1.0, busy) / self.bandwidth, busy / self.bandwidth_all)


@dataclass(frozen=True)
class Network:
    """Between nodes.

    Args:
        bandwidth: bytes a second of a node, in each direction, both at once.
        latency: seconds one way.
        pipelined: sync mode without a quorum, where a node adds its workers' gradients before it sends, once, and
            shards send weights back while they apply. Elsewhere each worker sends and receives for itself, and sending
            begins when all is applied.
    """

    bandwidth: float
    latency: float
    pipelined: bool = True


@dataclass(frozen=True)
class Node:
    """How many workers and shards are on a node."""

    workers: int
    shards: int


@dataclass(frozen=True)
class Job:
    """A step's work.

    Args:
        size: elements of the flat vector.
        itemsize: bytes of one.
        slots: pieces of the batch.
        slot: seconds of forward and backward of one slot, alone on a core.
        nodes: where workers and shards are; the first has the driver.
        pushes: vectors that all workers push in a step.
        additions: of two vectors in the busiest worker.
        state: vectors that the optimizer keeps.
        tensors: in the model.
    """

    size: int
    itemsize: int
    slots: int
    slot: float
    nodes: tuple[Node, ...]
    pushes: int
    additions: int
    state: int
    tensors: int = 1

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self.size * self.itemsize

    @property
    def workers(self) -> int:
        """On all nodes."""
        return sum(node.workers for node in self.nodes)

    @property
    def shards(self) -> int:
        """On all nodes."""
        return sum(node.shards for node in self.nodes)

    def with_shards(self, shards: int) -> Job:
        """The same with another number of shards, spread over the nodes as evenly as can be."""
        each, more = divmod(shards, len(self.nodes))
        nodes = (replace(node, shards=each + (place < more)) for place, node in enumerate(self.nodes))
        return replace(self, nodes=tuple(nodes))


@dataclass(frozen=True)
class Parts:
    """Seconds of each part of a step."""

    compute: float
    add: float
    push: float
    apply: float
    pull: float
    messages: float
    driver: float

    @property
    def total(self) -> float:
        """Seconds from commit to commit."""
        return self.compute + self.add + self.push + self.apply + self.pull + self.messages + self.driver

    @property
    def shares(self) -> dict[str, float]:
        """Seconds by what a step may be bound by; the keys are those of `WORDS`."""
        return {
            "compute": self.compute,
            "memory": self.add + self.apply,
            "network": self.push + self.pull,
            "messages": self.messages + self.driver,
        }

    @property
    def bound(self) -> str:
        """What the step is bound by: the largest share, a key of `WORDS`."""
        return max(self.shares, key=self.shares.__getitem__)


def predict(job: Job, machine: Machine, network: Network | None = None) -> Parts:
    """The parts of one step.

    Args:
        machine: every node's.
        network: may be left out where there is one node.

    >>> Job(1_000_000, 4, 2, 0.0, (Node(2, 1),), pushes=2, additions=0, state=2).bytes
    4000000
    >>> job = Job(10_000_000, 4, 2, 0.0, (Node(2, 1),), pushes=2, additions=0, state=2)
    >>> parts = predict(job, Machine(2, 10e9, 10e9, 0.0))
    >>> parts.apply == (2 + 6) * 40e6 / 10e9
    True
    """
    if network is None and len(job.nodes) > 1:
        raise ValueError(f"expected the network between {len(job.nodes)} nodes, found None")
    apply = _apply(job, machine)
    push = pull = 0.0
    if network is not None and len(job.nodes) > 1:
        push, pull = _wires(job, network)
        if network.pipelined:  # applying goes on while what is applied already is sent
            pull = max(pull - apply, min(pull, BUCKET / network.bandwidth))
    return Parts(
        compute=max(_compute(job, node, machine) for node in job.nodes),
        add=job.additions * machine.stream(3 * job.bytes, max(1, max(node.workers for node in job.nodes))),
        push=push,
        apply=apply,
        pull=pull,
        messages=_messages(job, machine) + (2 * network.latency if network and len(job.nodes) > 1 else 0.0),
        driver=DRIVER * machine.message / machine.cores if job.nodes[0].workers >= machine.cores else 0.0,
    )


def best_shards(job: Job, machine: Machine, most: int, network: Network | None = None) -> tuple[int, float]:
    """The number of shards, `most` at most, with the shortest step, and the seconds of that step.

    It is the present number where no other is better by `GAIN`, and the smallest of those that are about as good.
    """
    now = predict(job, machine, network).total
    totals = {n: predict(job.with_shards(n), machine, network).total for n in range(1, max(1, most) + 1)}
    least = min(totals.values())
    if job.shards in totals and now <= least / (1 - GAIN):
        return job.shards, now
    return next((n, total) for n, total in totals.items() if total <= least * (1 + GAIN / 2))


def _compute(job: Job, node: Node, machine: Machine) -> float:
    if not node.workers:
        return 0.0
    rounds, here = ceil(job.slots / job.workers), job.slots * node.workers / job.workers
    slot = job.slot + _crowding(job, machine, min(here / rounds, machine.cores))
    return machine.turns(rounds * slot, here * slot)


def _crowding(job: Job, machine: Machine, busy: float) -> float:
    """Seconds that a slot's memory traffic takes longer among `busy` slots at once than alone."""
    moved = min(SLOT_PASSES * job.bytes, job.slot * machine.bandwidth)
    return moved * max(0.0, busy / machine.bandwidth_all - 1 / machine.bandwidth)


def _apply(job: Job, machine: Machine) -> float:
    """All shards apply side by side, as the others are told before shard 0 begins."""
    size = (job.pushes + 2 + 2 * job.state) * job.bytes / job.shards
    own = (SHARD + PIECE * ceil(job.tensors / job.shards)) * machine.message
    most = max(node.shards for node in job.nodes)
    return machine.stream(size, most) + machine.turns(own, most * own)


def _messages(job: Job, machine: Machine) -> float:
    """The chain of pushes, the decision where shards have to agree, and answers; or all of them, on the cores.

    A process that is woken waits for a core where there are more processes than cores.
    """
    pushes, workers, shards = job.pushes, job.workers, job.shards
    agree, hops = 2 * (shards - 1), 4 if shards > 1 else 2
    crowd = max(0.0, max(node.workers + node.shards for node in job.nodes) / machine.cores - 1)
    chain = hops * (1 + WAKE) + (pushes + workers - 2 + 2 * (shards - 1) + agree) / 2 + WORKER
    everything = shards * (pushes + workers) + agree + workers * WORKER
    return machine.message * machine.turns(chain, everything) + hops * crowd * WAIT


def _wires(job: Job, network: Network) -> tuple[float, float]:
    """Seconds of the busiest node's wire for gradients, and for weights."""
    moved = [_moved(job, node, pipelined=network.pipelined) for node in job.nodes]
    return max(out for out, _ in moved) / network.bandwidth, max(back for _, back in moved) / network.bandwidth


def _moved(job: Job, node: Node, *, pipelined: bool) -> tuple[float, float]:
    """Bytes of gradients through a node's wire in its busier direction, and bytes of weights."""
    here = node.shards / job.shards
    each = job.pushes / job.workers
    own = _vectors(node.workers, each, pipelined=pipelined)
    others = sum(_vectors(n.workers, each, pipelined=pipelined) for n in job.nodes) - own
    readers = _vectors(node.workers, 1.0, pipelined=pipelined)
    elsewhere = sum(_vectors(n.workers, 1.0, pipelined=pipelined) for n in job.nodes) - readers
    gradients = max(own * (1 - here), others * here)
    weights = max(readers * (1 - here), elsewhere * here)
    return gradients * job.bytes, weights * job.bytes


def _vectors(workers: int, each: float, *, pipelined: bool) -> float:
    """How many vectors of the weights' size cross for the workers of a node."""
    return min(workers * each, 1.0) if pipelined else workers * each


@dataclass(frozen=True)
class Memory:
    """Bytes on a node that the run's vectors take; libraries, activations and data come on top.

    `weights` are the shards', which workers of the node read in place where a step needs every slot; `gradients` those
    of all workers; `state` the optimizer's; `copies` what is kept for an evaluation, and workers' own where they have
    some.
    """

    weights: int
    gradients: int
    state: int
    copies: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.state + self.copies


def memory(job: Job, held: Sequence[int], *, evaluated: bool, shared: bool) -> Memory:
    """What one node with all workers and shards needs.

    Args:
        held: gradient vectors in each worker at once.
        evaluated: whether there is an evaluator: a snapshot, and the evaluator's weights.
        shared: whether workers read the shards' own weights; else each has a copy, and the shards keep one to be read.
    """
    copies = (2 if evaluated else 0) + (0 if shared else len(held) + 1)
    return Memory(job.bytes, sum(held) * job.bytes, job.state * job.bytes, copies * job.bytes)
