"""The other side of `scripts/prove speed`: PyTorch's DistributedDataParallel over gloo, at its best.

Gradients are views of the buckets, the graph is static, Adam is fused, every process has one thread. Run as

    python -m proofs.ddp MODEL WORKERS STEPS BUCKET_MB...

on loopback, or as the one rank RANK; prints JSON: seconds of steps and of backward alone. `reduce:P` sums P numbers.
"""

import json
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from proofs.models import contest


def train(name: str, steps: int, bucket_mb: float) -> dict[str, list[float]]:
    """Seconds of every step, and of backward alone."""
    task, batch = contest(name)
    how = {"bucket_cap_mb": bucket_mb, "gradient_as_bucket_view": True, "static_graph": True}
    model = DistributedDataParallel(task.model(), **how)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step(*, synchronize: bool) -> float:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        with nullcontext() if synchronize else model.no_sync():
            task.loss(model, batch).backward()
        if synchronize:
            optimizer.step()
        return time.perf_counter() - began

    return {which: [step(synchronize=which == "step") for _ in range(steps)] for which in ("step", "backward")}


def reduce(parameters: int, steps: int) -> dict[str, list[float]]:
    """Seconds of an all-reduce of gradients that are there already and of the update."""
    weights = torch.zeros(parameters)
    weights.grad = torch.full_like(weights, 0.0)  # zeros stay what they are, however often they are added
    optimizer = torch.optim.Adam([weights], lr=1e-3, fused=True)

    def step() -> float:
        began = time.perf_counter()
        dist.all_reduce(weights.grad)
        optimizer.step()
        return time.perf_counter() - began

    return {"step": [step() for _ in range(steps)], "backward": []}


def rank(me: int, name: str, workers: int, steps: int, buckets: list[float]) -> None:
    """One process; the first one prints."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    os.environ["RANK"] = str(me)
    dist.init_process_group("gloo", rank=me, world_size=workers)
    kind, _, size = name.partition(":")
    for bucket in buckets:
        found = reduce(int(size), steps) if kind == "reduce" else train(name, steps, bucket)
        if me == 0:
            print(json.dumps({"bucket_mb": bucket, **found}), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # one in ten otherwise aborts while the interpreter ends: a thread of torch's is still there


if __name__ == "__main__":
    asked = (sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), list(map(float, sys.argv[4:])))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    if "RANK" in os.environ:
        rank(int(os.environ["RANK"]), *asked)
    else:
        mp.spawn(rank, asked, nprocs=asked[1])
