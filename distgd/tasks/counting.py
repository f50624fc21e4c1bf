"""`counting`: proof from outside that every sample is applied exactly once.

There is one weight a sample, it starts at 0, and the gradient of sample i is -1 at weight i and 0 elsewhere. Under
plain SGD with lr = the samples of an update, each weight is the number of times that its sample was applied. That is
exact where `samples` is a multiple of the batch, and batch and slots are powers of two: in float32 n * (1/n) is not 1
for all n.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn


@dataclass(frozen=True)
class Counting:
    """Count how often each of `samples` samples is applied."""

    samples: PositiveInt = 64

    def model(self) -> nn.Module:
        """One parameter `w` of shape (samples,), zeros."""
        return Counts(self.samples)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """-mean(w[i]) over the batch's samples i; the gradient is dense."""
        chosen: Tensor = model(batch)
        return -chosen.mean()

    def train_data(self) -> Tensor:
        """The samples' own numbers, int64."""
        return torch.arange(self.samples)


class Counts(nn.Module):
    """A weight for each sample; calling it with samples' numbers gives their weights."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(samples))

    def forward(self, samples: Tensor) -> Tensor:
        """Shape of `samples`."""
        return self.w[samples]
