"""The floor of a synchronous step on one machine: shared memory, pipes as doorbells, fused Adam, a commit round.

As little as there can be: no names, no checks, no messages, nothing that survives a fault. Each server owns a slice of
the weights; gradients lie in place. In a step every worker rings every server. A server that has heard all workers
tells server 0, which rings all servers when all are full; each then adds, divides and steps its slice block by block,
and rings every worker. Run as

    python -m proofs.floor WORKERS PARAMETERS STEPS SERVERS

it prints one JSON object: seconds of each step of worker 0.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 19  # elements that are summed and stepped while they are in the cache
LR, VALUE = 1e-3, 1e-3  # Adam's, and every gradient's elements


def shared(size: int) -> Tensor:
    """Zeros that forked processes share, all pages there."""
    memory = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 4 * size), dtype=np.float32))
    return memory.zero_()


class Bell:
    """A pipe: `ring` wakes whoever waits for so many rings."""

    def __init__(self) -> None:
        self._ear, self._hand = os.pipe()

    def ring(self) -> None:
        """Once."""
        os.write(self._hand, b"!")

    def hear(self, times: int) -> None:
        """Wait until it has rung so often."""
        while times:
            times -= len(os.read(self._ear, times))


class Adam:
    """A slice of the weights and its optimizer, stepped by the mean of the workers' gradients."""

    def __init__(self, weights: Tensor, gradients: list[Tensor]) -> None:
        self._weights, self._gradients = weights, gradients
        self._first, self._second = torch.zeros_like(weights), torch.zeros_like(weights)
        self._sum, self._step = torch.empty(min(BLOCK, len(weights))), torch.zeros(())

    def step(self) -> None:
        """One block after the other."""
        self._step += 1
        for start in range(0, len(self._weights), BLOCK):
            block = slice(start, min(start + BLOCK, len(self._weights)))
            mean = self._sum[: block.stop - block.start]
            torch.add(self._gradients[0][block], self._gradients[1][block], out=mean)
            for gradient in self._gradients[2:]:
                mean.add_(gradient[block])
            mean.div_(len(self._gradients))
            torch._fused_adam_(
                [self._weights[block]], [mean], [self._first[block]], [self._second[block]], [], [self._step],
                lr=LR, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip


def serve(me: int, steps: int, workers: list[Bell], servers: list[Bell], commit: list[Bell], optimizer: Adam) -> None:
    """Server `me`: gather, agree, apply, answer."""
    for _ in range(steps):
        servers[me].hear(len(workers))
        commit[0].ring()
        if me == 0:
            commit[0].hear(len(servers))
            for other in commit[1:]:
                other.ring()
        commit[me + 1].hear(1)
        optimizer.step()
        for worker in workers:
            worker.ring()


def work(me: int, steps: int, workers: list[Bell], servers: list[Bell]) -> list[float]:
    """Worker `me`: push and pull; seconds of each step."""
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        for server in servers:
            server.ring()
        workers[me].hear(len(servers))
        seconds.append(time.perf_counter() - began)
    return seconds


def run(workers: int, parameters: int, steps: int, servers: int) -> tuple[list[float], Tensor]:
    """Seconds of each step of worker 0, which is this process, and the weights. At least two workers."""
    torch.set_num_threads(1)
    weights, gradients = shared(parameters), [shared(parameters).fill_(VALUE) for _ in range(workers)]
    at_worker, at_server = ([Bell() for _ in range(count)] for count in (workers, servers))
    commit = [Bell() for _ in range(servers + 1)]
    children = []
    for number in range(1, workers + servers):
        if child := os.fork():
            children.append(child)
        elif number < workers:
            work(number, steps, at_worker, at_server)
            os._exit(0)
        else:
            me = number - workers
            part = slice(parameters * me // servers, parameters * (me + 1) // servers)
            serve(me, steps, at_worker, at_server, commit, Adam(weights[part], [g[part] for g in gradients]))
            os._exit(0)
    seconds = work(0, steps, at_worker, at_server)
    for child in children:
        os.waitpid(child, 0)
    return seconds, weights


if __name__ == "__main__":
    print(json.dumps({"step": run(*map(int, sys.argv[1:5]))[0]}))
