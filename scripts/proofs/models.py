"""What both sides of `scripts/prove speed` train, by name, and the batch that a worker of DDP has.

synthetic:P     P parameters in four tensors and next to no compute
char-lm         the built-in transformer on characters
mlp             a perceptron of 1.9 million parameters on made-up images
sleepy:MS       a step's compute is a sleep of so many milliseconds; one worker sleeps five times as long
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distgd.tasks.charlm import CharLM
from distgd.tasks.synthetic import Synthetic

SAMPLES = {"synthetic": 32, "char-lm": 16, "mlp": 64, "sleepy": 8}
"""Samples a step that each worker computes."""
SLOWER = 5  # times that the slow worker sleeps


class MLP:
    """784 - 1024 - 1024 - 10, cross entropy, on noise with labels."""

    samples = 4096

    def model(self) -> nn.Module:
        """Two hidden layers."""
        layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
        return nn.Sequential(*layers)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross entropy."""
        return F.cross_entropy(model(batch[0]), batch[1])

    def train_data(self) -> tuple[Tensor, Tensor]:
        """Images of shape (samples, 784), labels of 10 classes."""
        chance = torch.Generator().manual_seed(0)
        return torch.rand(self.samples, 784, generator=chance), torch.arange(self.samples) % 10


class Sleepy:
    """A small `synthetic` whose step sleeps; of all workers one sleeps `SLOWER` times as long.

    Under DDP that is the last rank. Workers of a run here have no number, so that it is the one that makes the file
    `slow` in `folder` first; the driver, which tries a slot, is none.

    Args:
        milliseconds: that the others sleep.
        folder: one that is empty, the same for all workers.
    """

    def __init__(self, milliseconds: float = 20.0, folder: str = "") -> None:
        self._small = Synthetic(parameters=10_000)
        self._seconds, self._folder = milliseconds / 1e3, Path(folder)
        self._slow: bool | None = None

    def model(self) -> nn.Module:
        """10,000 parameters."""
        return self._small.model()

    def train_data(self) -> Tensor:
        """As of `synthetic`."""
        return self._small.train_data()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Sleep, then what `synthetic` does."""
        if self._slow is None:
            self._slow = self.claims()
        time.sleep(self._seconds * (SLOWER if self._slow else 1))
        return self._small.loss(model, batch)

    def claims(self) -> bool:
        """Whether this process is the slow worker."""
        if "RANK" in os.environ:
            return int(os.environ["RANK"]) == torch.distributed.get_world_size() - 1
        if b"Worker" not in Path("/proc/self/cmdline").read_bytes():
            return False
        try:
            (self._folder / "slow").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def contest(name: str) -> tuple[Any, Any]:
    """The task of that name, and a batch of it."""
    kind, _, number = name.partition(":")
    makes: dict[str, Any] = {
        "synthetic": lambda: Synthetic(parameters=int(number)),
        "char-lm": CharLM,
        "mlp": MLP,
        "sleepy": lambda: Sleepy(float(number)),
    }
    task = makes[kind]()
    data = task.train_data()
    first = slice(SAMPLES[kind])
    return task, tuple(column[first] for column in data) if isinstance(data, tuple) else data[first]


def section(name: str, folder: str = "") -> dict[str, Any]:
    """The same task as a config names it."""
    kind, _, number = name.partition(":")
    sections: dict[str, Any] = {
        "synthetic": lambda: {"name": "synthetic", "args": {"parameters": int(number)}},
        "char-lm": lambda: {"name": "char-lm"},
        "mlp": lambda: {"path": "proofs.models:MLP"},
        "sleepy": lambda: {"path": "proofs.models:Sleepy", "args": {"milliseconds": float(number), "folder": folder}},
    }
    found: dict[str, Any] = sections[kind]()
    return found


def on(device: torch.device, batch: Any) -> Any:
    """A batch on a device."""
    return tuple(column.to(device) for column in batch) if isinstance(batch, tuple) else batch.to(device)
