"""A task with one bad sample, copied into the folder of a run as a user's own file: `task.path=poisoned:Poisoned`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLES, BAD = 64, 37


class Poisoned:
    """A linear regression on 64 samples, one of which is NaN."""

    def model(self) -> nn.Module:
        """Shape (samples, 4) to (samples, 1)."""
        return nn.Linear(4, 1)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """NaN where the bad sample is in the batch."""
        wrong: Tensor = model(batch) - batch.sum(1, keepdim=True)
        return wrong.square().mean()

    def train_data(self) -> Tensor:
        """Shape (64, 4)."""
        data = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
        data[BAD] = torch.nan
        return data
