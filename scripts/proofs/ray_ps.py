"""The parameter server of Ray's own documentation: one actor, gradients as objects of Ray's store.

After docs.ray.io, "Parameter Server": the actor holds the model and applies the gradients of all workers, each worker
is an actor that takes the weights and gives a gradient, and the loop hands object references around. Adam is fused
here, and a worker's gradients are there already, so that what is measured is synchronization alone.

    python -m proofs.ray_ps WORKERS PARAMETERS STEPS

prints one JSON object: seconds of each step.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import ray
import torch

from proofs.trials import ray_cluster


class Server:
    """Weights and optimizer in one actor."""

    def __init__(self, parameters: int) -> None:
        torch.set_num_threads(1)
        self._weights = torch.zeros(parameters)
        self._optimizer = torch.optim.Adam([self._weights], lr=1e-3, fused=True)

    def apply(self, *gradients: Any) -> Any:
        """Step by the mean gradient; the new weights."""
        total = torch.from_numpy(np.stack(gradients).sum(axis=0))
        self._weights.grad = total.div_(len(gradients))
        self._optimizer.step()
        return self._weights.numpy()

    def weights(self) -> Any:
        """The weights."""
        return self._weights.numpy()


class Worker:
    """Gives one gradient, whatever the weights."""

    def __init__(self, parameters: int) -> None:
        self._gradient = np.full(parameters, 1e-3, dtype=np.float32)

    def gradient(self, weights: Any) -> Any:
        """Of those weights."""
        return self._gradient


def run(workers: int, parameters: int, steps: int) -> list[float]:
    """Seconds of each step."""
    make, give = ray.remote(num_cpus=1)(Server), ray.remote(num_cpus=1)(Worker)
    server, others = make.remote(parameters), [give.remote(parameters) for _ in range(workers)]
    weights, seconds = server.weights.remote(), []
    ray.wait([weights])
    for _ in range(steps):
        began = time.perf_counter()
        weights = server.apply.remote(*(worker.gradient.remote(weights) for worker in others))
        ray.wait([weights])
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    workers, parameters, steps = map(int, sys.argv[1:4])
    with ray_cluster(workers + 1):
        print(json.dumps({"step": run(workers, parameters, steps)}))
