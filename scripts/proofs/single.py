"""A plain loop of one process over a model of `proofs.models`.

    python -m proofs.single MODEL STEPS

prints one JSON object: seconds of each step.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from proofs.models import contest


def run(name: str, steps: int) -> list[float]:
    """Seconds of each step, with one thread and fused Adam."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task, batch = contest(name)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    print(json.dumps({"step": run(sys.argv[1], int(sys.argv[2]))}))
