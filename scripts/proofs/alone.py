"""Synchronization alone: gradients lie in place already, and what is left is push, commit, apply and pull.

Everything is the run's own: driver, servers, workers, their messages and their memory. Two things differ. A worker
computes nothing: it pushes again what lies in its segment. And processes are forked from this one instead of started by
Ray, which no byte of a step goes through anyway. Run as

    python -m proofs.alone WORKERS PARAMETERS STEPS SERVERS

it prints one JSON object: milliseconds of a step, as quantiles.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import chdir
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from distgd import events as ev
from distgd.config import load
from distgd.process import Process, Spec
from distgd.replica import SlotGradient
from distgd.result import Result
from distgd.trainer import launch
from distgd.transport import Endpoint, Place
from distgd.wire import Codec
from distgd.worker import Computed, SlotWork, Worker, WorkerSpec

HERE = "here"  # the only node
MOST = 1 << 40  # bytes of a message; nothing travels between machines
PATIENCE = 10.0  # seconds that processes get to end
VALUE = 1e-3  # of every gradient's element


class InPlace:
    """A worker whose gradients are there before they are asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._filled: set[int] = set()  # addresses of the gradients that have been written

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        """As the worker does."""
        return self._worker.handle(source, event)

    def perform(self, work: SlotWork, emit: Callable[[ev.Effect], None]) -> Computed:
        """Nothing, but for the first time that a piece of memory is used."""
        if work.out.data_ptr() not in self._filled:
            self._filled.add(work.out.data_ptr())
            work.out.fill_(VALUE)
        stats = ev.SlotStats(work.slot, 1, 1.0, 0.0, 0.0, 0.0)
        return Computed(work, SlotGradient(stats, bad=False, buffers=None))


@dataclass(frozen=True)
class InPlaceSpec:
    """A worker's specification that builds an `InPlace`."""

    spec: WorkerSpec
    role = "worker"

    @property
    def rules(self) -> Any:
        return self.spec.rules

    def build(self, clock: Any, allocate: Any) -> InPlace:
        """As the worker is built."""
        return InPlace(self.spec.build(clock, allocate))


class Forked:
    """The verbs of a cluster, over processes that are forked from this one."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._endpoint: Endpoint | None = None

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.monotonic()

    def spawn(self, specs: Mapping[int, Spec], _patient: Collection[int] = ()) -> None:
        """Fork everybody, then tell all where all are."""
        secret, pipes = secrets.token_bytes(32), {}
        context = mp.get_context("fork")
        for incarnation, spec in specs.items():
            pipes[incarnation], theirs = context.Pipe()
            wanted = InPlaceSpec(spec) if isinstance(spec, WorkerSpec) else spec
            self._processes.append(context.Process(target=_live, args=(incarnation, wanted, secret, theirs)))
            self._processes[-1].start()
        codec = Codec(ev.MESSAGES)
        self._endpoint = Endpoint(ev.DRIVER, "driver", secret, codec, listen="all", host=None, max_bytes=MOST)
        places = {incarnation: pipe.recv() for incarnation, pipe in pipes.items()}
        places[ev.DRIVER] = Place(HERE, self._endpoint.addresses)
        self._endpoint.meet(HERE, {incarnation: Place(HERE, ()) for incarnation in places})
        for pipe in pipes.values():
            pipe.send(places)

    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """One machine."""
        return ()

    def send(self, to: int, message: Any) -> None:
        """From the driver."""
        assert self._endpoint is not None
        self._endpoint.send(to, message)

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """What arrives at the driver next; a process that ends early is found by the deadline."""
        assert self._endpoint is not None
        return self._endpoint.receive(timeout)

    def close(self) -> None:
        """End everybody."""
        for process in self._processes:
            process.join(PATIENCE)
            process.kill()
        if self._endpoint is not None:
            self._endpoint.close()


def _live(incarnation: int, spec: Spec, secret: bytes, pipe: Connection) -> None:
    process = Process([], lambda: (HERE, HERE))
    pipe.send(process.become(incarnation, spec.role, secret, "all" if spec.role == "server" else "", True, MOST))
    process.run(spec, pipe.recv())
    os._exit(0)  # nothing that the parent has open is this process's to close


def synchronize(workers: int, parameters: int, steps: int, servers: int) -> Result:
    """A run of so many steps in the current folder."""
    torch.set_num_threads(1)  # also because threads do not survive a fork
    config = {
        "task": {"name": "synthetic", "args": {"parameters": parameters}},
        "batch": {"size": workers, "slots": workers},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "cluster": {"workers": workers, "servers": servers},
        "stop": {"steps": steps},
        "tracking": {"uri": "none"},
    }
    return launch(load(config, [], {}), "alone", lambda event: None, cluster=Forked())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="prove-") as folder, chdir(folder):
        print(json.dumps(synchronize(*map(int, sys.argv[1:5])).step_ms))
