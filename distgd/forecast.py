"""What `--dry-run` says of a run's speed and memory: this machine and one slot are measured, the rest is worked out.

Nothing is started. The forecast is for one machine like this one with nothing else on it; of several nodes and their
network nothing is known before a cluster is asked.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from distgd import cost, machine
from distgd.device import threads_of
from distgd.plan import Plan, in_bytes
from distgd.reduce import maximal

SECONDS = 0.5
"""That slots are tried for, though one slot is tried however long it takes."""
MOST_SLOTS = 20
DISPLACED = 64 << 20
"""Bytes that go through the caches between two slots at most, in place of the shards' work there."""


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run.

    Attributes:
        unknown: why there is no prediction of the step; empty where there is one.
        shards: the number that is suggested.
        shards_seconds: a step's seconds with that number.
    """

    machine: cost.Machine
    memory: cost.Memory
    job: cost.Job | None
    parts: cost.Parts | None
    shards: int
    shards_seconds: float
    unknown: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Numbers for JSON: seconds, and bytes of a node."""
        parts = self.parts
        return {
            "unknown": self.unknown or None,
            "step_s": parts.total if parts else None,
            "parts_s": asdict(parts) if parts else None,
            "slot_s": self.job.slot if self.job else None,
            "bound_by": parts.bound if parts else None,
            "servers": self.shards if parts else None,
            "servers_step_s": self.shards_seconds if parts else None,
            "bytes_node": {**asdict(self.memory), "total": self.memory.total},
            "machine": asdict(self.machine),
        }

    def lines(self) -> list[str]:
        """In words, for a person."""
        held = self.memory
        room = (
            f"memory      {in_bytes(held.total)} where all is on one node: weights {in_bytes(held.weights)}, gradients "
            f"{in_bytes(held.gradients)}, optimizer {in_bytes(held.state)}, copies {in_bytes(held.copies)}; besides "
            "activations of one slot a worker, data, and about 400 MB of libraries a process"
        )
        if self.parts is None or self.job is None:
            return [room, f"speed       not predicted: {self.unknown}"]
        shares = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in self.parts.shares.items() if seconds)
        return [
            room,
            f"speed       about {_ms(self.parts.total)} a step on a machine like this one, idle: {shares}",
            f"bound by    {cost.WORDS[self.parts.bound]}; {self._advice(self.parts, self.job)}",
            f"servers     {self._suggestion(self.parts, self.job)}",
        ]

    def _advice(self, parts: cost.Parts, job: cost.Job) -> str:
        busy = min(job.workers, job.slots)
        if parts.bound == "compute":
            if busy < min(self.machine.cores, job.slots):
                return f"more workers help, up to {min(self.machine.cores, job.slots)} here"
            if busy < self.machine.cores:
                return "a larger batch.slots with more workers would help"
            return f"more workers help on more cores than the {self.machine.cores} here"
        if parts.bound == "memory":
            return "a larger batch makes it rarer; more workers do not help"
        return "a larger batch makes them rarer; more workers or servers do not help"

    def _suggestion(self, parts: cost.Parts, job: cost.Job) -> str:
        if self.shards == job.shards:
            return f"{job.shards} is right: no other number is predicted to be {cost.GAIN:.0%} faster"
        faster = 1 - self.shards_seconds / parts.total
        return f"cluster.servers={self.shards} would make a step {faster:.0%} shorter ({_ms(self.shards_seconds)})"


def forecast(plan: Plan) -> Forecast:
    """Measure this machine and a slot, in about a second where a slot takes no longer, and predict a step."""
    here = machine.measure()
    own, slots = plan.own_slots(), plan.order.slots
    state = plan.state_vectors()
    nodes = (cost.Node(plan.config.cluster.workers.max, plan.config.cluster.servers),)
    job = cost.Job(
        size=plan.layout.size,
        itemsize=plan.layout.itemsize,
        slots=slots,
        slot=0.0,
        nodes=nodes,
        pushes=sum(len(maximal(each, slots)) for each in own),
        additions=max(len(each) - len(maximal(each, slots)) for each in own),
        state=state,
        tensors=len(plan.layout.entries),
    )
    held, every_slot = [plan.gradients_held(each) for each in own], plan.staged and plan.quorum == slots
    needed = cost.memory(job, held, evaluated=plan.held_out is not None, shared=every_slot)
    if unknown := _unknown(plan):
        return Forecast(here, needed, None, None, job.shards, 0.0, unknown)
    job = replace(job, slot=slot_seconds(plan))
    parts = cost.predict(job, here)
    shards, seconds = cost.best_shards(job, here, most_shards(plan, here.cores))
    return Forecast(here, needed, job, parts, shards, seconds)


def most_shards(plan: Plan, cores: int) -> int:
    """The most shards that are suggested: a core each, as Ray places them, and a piece of the weights each."""
    return max(1, min(cores, len([part for part in plan.layout.slices(cores) if part.size])))


def _unknown(plan: Plan) -> str:
    """Why a step of this run cannot be predicted; empty where it can."""
    if not plan.staged or plan.quorum < plan.order.slots:
        return "only sync mode without a quorum is modelled"
    if plan.config.cluster.compute_device != "cpu":
        return "workers compute on a GPU, and what a slot takes there is not measured here"
    if plan.config.cluster.backend != "ray":
        return "with cluster.backend=inprocess everything takes turns on one thread"
    return ""


def slot_seconds(plan: Plan) -> float:
    """Seconds of the first slot's forward and backward, on this process with a worker's number of threads.

    The quicker ones of several tries count. It was tried before, so that no error of the task shows here.
    """
    out = plan.layout.zeros()
    size = min(2 * out.nbytes, DISPLACED // 2)
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    found: list[float] = []
    with threads_of(plan.config.cluster.threads):
        ends = time.perf_counter() + SECONDS
        while not found or (time.perf_counter() < ends and len(found) < MOST_SLOTS):
            np.copyto(target, source)
            began = time.perf_counter()
            plan.replica.gradient(plan.source, plan.order, 0, 0, out)
            found.append(time.perf_counter() - began)
    plan.replica.forget()
    return sorted(found)[ceil(len(found) / 4) - 1]


def _ms(seconds: float) -> str:
    """Milliseconds with two digits that mean something.

    >>> _ms(0.00123), _ms(0.0456)
    ('1.2 ms', '46 ms')
    """
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:,.0f} ms"
