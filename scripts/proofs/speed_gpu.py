"""The row of `scripts/prove speed` about GPUs: samples a second beside DDP's, with the same models.

NCCL wants a GPU for each process. Where there are fewer, processes share one, and DDP goes over gloo.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from proofs import contest, outside
from proofs.contest import ours
from proofs.models import SAMPLES
from proofs.rows import Bench, Measured, Proof, Skipped

proof = Proof()

STEPS = {"char-lm": 400, "mlp": 1000, "synthetic:10000000": 300, "synthetic:50000000": 100}
TURNS = 2


def ddp(name: str, workers: int, steps: int, backend: str, bench: Bench) -> float:
    """DDP's samples a second, with its best bucket size."""
    command = contest.python("proofs.ddp_gpu", name, workers, steps, backend, *(5, 25, 100))
    printed = outside.run(command, bench.folder, contest.environment(OMP_NUM_THREADS="1")).checked().out
    found = [json.loads(line)["step"] for line in printed.splitlines() if line.startswith("{")]
    return workers * SAMPLES[name.partition(":")[0]] / min(found)


def setting(name: str, workers: int, server_device: str, steps: int, bench: Bench) -> dict[str, Any]:
    """One model, so many workers, servers on the CPU or on a GPU."""
    cards = torch.cuda.device_count()
    servers = {"server_device": "cuda", "server_gpus": 0.2} if server_device == "cuda" else {}
    share = 1.0 if cards > workers or (cards == workers and not servers) else round(0.8 * cards / workers, 2)
    backend = "nccl" if cards >= workers else "gloo"
    runs = {
        "ours": lambda: float(
            ours(name, workers, steps, bench.folder, cluster={"gpus": share, **servers})["samples_per_s"]
        ),
        "DDP": lambda: ddp(name, workers, steps, backend, bench),
    }
    rates = contest.take_turns(runs, 1 if bench.quick else TURNS)
    return {
        "model": name,
        "W": workers,
        "servers on": server_device,
        "ours samples/s": rates["ours"].median,
        "least-most": rates["ours"].spread,
        "DDP samples/s": rates["DDP"].median,
        "over": backend,
        "ours / DDP": rates["ours"].median / rates["DDP"].median,
    }


@proof.row("printed: samples/s beside DDP's; skipped where there is no GPU")
def on_gpus(bench: Bench) -> Measured:
    """Models on GPUs, servers on the CPU and on a GPU: samples/s beside DDP/NCCL with the same model."""
    if not torch.cuda.is_available():
        raise Skipped("there is no CUDA GPU")
    names = list(STEPS)[:1] if bench.quick else list(STEPS)
    settings = [
        setting(name, workers, device, STEPS[name], bench)
        for name in names
        for workers in (1, 2)
        for device in ("cpu", "cuda")
    ]
    told = (f"{s['model']} W={s['W']} {s['servers on']} {s['ours / DDP']:.2f}" for s in settings)
    cards = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return Measured("ours / DDP: " + ", ".join(told), True, cards, settings=settings)
