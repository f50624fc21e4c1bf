"""The other side of `scripts/prove speed`: PyTorch's DistributedDataParallel over gloo, at its best.

Gradients are views of the buckets, the graph is static, Adam is fused, every process has one thread and talks over the
loopback device. The best of several bucket sizes counts. Run as

    python -m proofs.ddp MODE WORKERS PARAMETERS STEPS BUCKET_MB

it prints one JSON object: milliseconds of each step, and of backward alone without synchronization. MODE `train` is a
whole step of the task `synthetic`; `reduce` is an all-reduce of one flat tensor and fused Adam on each rank.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from distgd.tasks.synthetic import Synthetic

BATCH = 32  # samples a worker


def train(parameters: int, steps: int, bucket_mb: float) -> dict[str, list[float]]:
    """Seconds of every step, and of backward alone."""
    task = Synthetic(parameters=parameters)
    model = DistributedDataParallel(
        task.model(), bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True, static_graph=True
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    x = task.train_data()[:BATCH]

    def step(*, synchronize: bool) -> float:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        with nullcontext() if synchronize else model.no_sync():
            task.loss(model, x).backward()
        if synchronize:
            optimizer.step()
        return time.perf_counter() - began

    whole = [step(synchronize=True) for _ in range(steps)]
    return {"step": whole, "backward": [step(synchronize=False) for _ in range(max(3, steps // 4))]}


def reduce(parameters: int, steps: int) -> dict[str, list[float]]:
    """Seconds of an all-reduce of gradients that are there already, and of the update on each rank."""
    weights = torch.zeros(parameters)
    weights.grad = torch.full_like(weights, 1e-3)
    optimizer = torch.optim.Adam([weights], lr=1e-3, fused=True)

    def step() -> float:
        began = time.perf_counter()
        dist.all_reduce(weights.grad)
        optimizer.step()
        return time.perf_counter() - began

    return {"step": [step() for _ in range(steps)], "backward": []}


def rank(me: int, mode: str, workers: int, parameters: int, steps: int, bucket_mb: float) -> None:
    """One process; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=me, world_size=workers)
    found = train(parameters, steps, bucket_mb) if mode == "train" else reduce(parameters, steps)
    if me == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    mode, workers, parameters, steps, bucket = sys.argv[1], *map(float, sys.argv[2:6])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29571")}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    mp.spawn(rank, (mode, int(workers), int(parameters), int(steps), bucket), nprocs=int(workers))
