"""One task three ways: as functions, by their names, and as a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def make_model() -> nn.Module:
    """A network with dropout, whose chance must be the same each way."""
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))


def error(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy, nats a sample."""
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])


def points() -> tuple[Tensor, Tensor]:
    """1,000 points of the plane, and whether they lie where both coordinates have one sign."""
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1] > 0).float()


class Mine:
    """The same as a class."""

    def model(self) -> nn.Module:
        return make_model()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return error(model, batch)

    def train_data(self) -> tuple[Tensor, Tensor]:
        return points()
