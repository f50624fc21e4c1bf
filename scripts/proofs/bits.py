"""Runs whose bits are compared: with one another, in process and on Ray, and with plain torch loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from simulate import OddTask, run, simulate
from test_bits import DIGITS, OPTIMIZERS, Smooth, plain_loop
from torch import nn

import distgd
from distgd.config import load
from distgd.inprocess import InProcessCluster
from distgd.prepare import prepare
from distgd.sources import open_source
from distgd.weights import fingerprint


@dataclass(frozen=True)
class Case:
    """What decides the bits; who computes is said later. Both models have dropout, BatchNorm, uneven last batches."""

    model: str
    optimizer: str
    slots: int

    def train_with(self, **cluster: Any) -> tuple[dict[str, Any], Any]:
        """The config, and the task where it is no built-in one."""
        odd = OddTask(106 if self.slots < 8 else 112) if self.model == "odd shapes" else None
        config = {
            "task": {"path": "simulate:OddTask"} if odd else DIGITS,
            "optimizer": OPTIMIZERS[self.optimizer],
            "batch": {"size": 32 if odd else 450, "slots": self.slots},
            "stop": {"steps": 5},
            "tracking": {"uri": "none"},
            "cluster": cluster,
        }
        return config, odd

    def in_process(self, workers: int, servers: int) -> str:
        """The fingerprint of the weights, computed on one thread."""
        config, task = self.train_with(backend="inprocess", workers=workers, servers=servers)
        return run(prepare(load(config), task), InProcessCluster(seed=10 * workers + servers)).sha256

    def on_ray(self, workers: int, servers: int, storage: Path) -> str | None:
        """The same on Ray, through the public function."""
        config, task = self.train_with(workers=workers, servers=servers, start_timeout=120.0)
        return distgd.train({**config, "run": {"storage": str(storage)}}, task=task).weights_sha256


COVERING = (
    (Case("odd shapes", "sgd", 3), 1, 1),
    (Case("digits", "adam", 4), 2, 2),
    (Case("odd shapes", "adamw", 5), 3, 3),
    (Case("digits", "rmsprop", 8), 4, 1),
    (Case("digits", "sgd", 5), 2, 3),
    (Case("odd shapes", "adam", 8), 4, 2),
)
"""Every number of workers and servers, optimizer, number of slots and model, at least once."""


def torch_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """What torch itself makes of `OPTIMIZERS[name]`, fused where it can be."""
    arguments = {key: value for key, value in OPTIMIZERS[name].items() if key != "name"}
    match name:
        case "sgd":
            return torch.optim.SGD(model.parameters(), **arguments, fused=True)
        case "adam":
            return torch.optim.Adam(model.parameters(), **arguments, fused=True)
        case "adamw":
            return torch.optim.AdamW(model.parameters(), **arguments, fused=True)
        case _:
            return torch.optim.RMSprop(model.parameters(), **arguments)


@contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as a worker has: two change the bits of a matrix product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


SHARED: dict[str, Any] = {"batch": {"size": 32, "slots": 5}, "cluster": {"workers": 3, "servers": 2}}
"""What the comparisons with plain torch run with."""


def same_as_plain_torch(name: str, steps: int) -> bool:
    """Whether an optimizer's run has the bits of a plain loop that adds slots in the tree's order."""
    task = OddTask(106)
    done = simulate(task, optimizer=OPTIMIZERS[name], stop={"steps": steps}, **SHARED)
    torch.manual_seed(0)
    model = task.model()
    with one_thread():
        plain_loop(task, torch_optimizer(name, model), model, done.plan.order, steps)
    return done.sha256 == fingerprint(model.state_dict())


def distance_to_whole_batch(dtype: torch.dtype, steps: int) -> float:
    """How far the weights are from those of plain torch taking each batch whole: norm of the difference over norm."""
    task = Smooth(dtype)
    done = simulate(task, optimizer=OPTIMIZERS["adam"], stop={"steps": steps}, **SHARED)
    torch.manual_seed(0)
    model = task.model()
    optimizer, source, order = torch_optimizer("adam", model), open_source(task.train_data()), done.plan.order
    for step in range(steps):
        optimizer.zero_grad()
        whole = np.concatenate([order.indices(step, slot) for slot in range(order.slots)])
        task.loss(model, source.batch(whole)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    ours = nn.utils.parameters_to_vector([done.state[name] for name, _ in model.named_parameters()])
    theirs = nn.utils.parameters_to_vector(model.parameters()).detach()
    return float((ours - theirs).norm() / theirs.norm())
