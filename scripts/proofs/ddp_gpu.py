"""PyTorch's DistributedDataParallel on GPUs: over NCCL with one for each process, over gloo where processes share one.

Gradients are views of the buckets, the graph is static, Adam is fused. Run as

    python -m proofs.ddp_gpu MODEL WORKERS STEPS BACKEND BUCKET_MB...

it prints a JSON object for each bucket size: mean seconds of a step, the last one waited for.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from proofs.contest import WARM, port
from proofs.models import contest, on


def train(name: str, device: torch.device, steps: int, bucket_mb: float) -> float:
    """Mean seconds of a step."""
    task, batch = contest(name)
    batch = on(device, batch)
    how = {"bucket_cap_mb": bucket_mb, "gradient_as_bucket_view": True, "static_graph": True}
    model = DistributedDataParallel(task.model().to(device), **how)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=False)
            task.loss(model, batch).backward()
            optimizer.step()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    run(10 * WARM)
    return run(steps)


def rank(me: int, name: str, workers: int, steps: int, backend: str, buckets: list[float]) -> None:
    """One process; the first one prints."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device("cuda", me % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group(backend, rank=me, world_size=workers)
    for bucket in buckets:
        seconds = train(name, device, steps, bucket)
        if me == 0:
            print(json.dumps({"bucket_mb": bucket, "step": seconds}), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # as in `proofs.ddp`


if __name__ == "__main__":
    asked = (sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], list(map(float, sys.argv[5:])))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "GLOO_SOCKET_IFNAME": "lo"}
    mp.spawn(rank, asked, nprocs=asked[1])
