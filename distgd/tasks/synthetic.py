"""`synthetic`: any number of parameters and next to no compute, to measure what a step costs besides its compute."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from distgd.errors import BadInput


@dataclass(frozen=True)
class Synthetic:
    """The loss is mean(x) times the sum of all parameters: one read of the weights, one write of the gradient.

    Args:
        parameters: float32 numbers in all.
        tensors: how many tensors they are spread over, as evenly as possible.
        samples: numbers x; their mean is zero, so that the weights stay small however long a run is.
    """

    parameters: PositiveInt = 1_000_000
    tensors: PositiveInt = 4
    samples: PositiveInt = 1024

    def __post_init__(self) -> None:
        if self.tensors > self.parameters:
            raise BadInput.at("task.args.tensors", f"at most task.args.parameters = {self.parameters}", self.tensors)

    def model(self) -> nn.Module:
        """`tensors` vectors of zeros."""
        size, longer = divmod(self.parameters, self.tensors)
        return Vectors([size + (place < longer) for place in range(self.tensors)])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Every element of the gradient is mean(x)."""
        total: Tensor = model()
        return batch.mean() * total

    def train_data(self) -> Tensor:
        """x, evenly spaced in [-1, 1], shape (samples,)."""
        return torch.linspace(-1, 1, self.samples) if self.samples > 1 else torch.zeros(1)


class Vectors(nn.Module):
    """Vectors of zeros; calling it gives the sum of all their elements."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self) -> Tensor:
        """A scalar."""
        return torch.stack([vector.sum() for vector in self.vectors]).sum()
