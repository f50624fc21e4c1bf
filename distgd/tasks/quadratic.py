"""`quadratic`: f(x) = 1/2 x'A x - b'x, the problem whose every rate is known.

A has eigenvalues spaced evenly in their logarithm from mu = 1 to L = `condition`, in a random basis. Sample i
contributes f_i(x) = f(x) - xi_i'x with noise xi_i whose mean over the samples is zero, so the mean of the f_i is f. All
is float64, and A, b and the noise depend on `seed` alone, not on the run's.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn


@dataclass(frozen=True)
class Quadratic:
    """Minimize a strongly convex quadratic from a random start.

    Args:
        dim: length of x.
        condition: L / mu; with `dim` 1 both are 1.
        noise: standard deviation of each coordinate of xi_i; 0 makes every gradient exact.
        samples: terms of the mean.
        seed: decides A, b and the noise.
    """

    dim: PositiveInt = 10
    condition: Annotated[float, Field(ge=1)] = 10.0
    noise: Annotated[float, Field(ge=0)] = 0.0
    samples: PositiveInt = 64
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def mu(self) -> float:
        """The smallest eigenvalue of A: strong convexity."""
        return 1.0

    @property
    def L(self) -> float:
        """The largest eigenvalue of A: the gradient's Lipschitz constant."""
        return self.condition if self.dim > 1 else 1.0

    @property
    def A(self) -> Tensor:
        """Symmetric, shape (dim, dim)."""
        return self._problem[0]

    @property
    def b(self) -> Tensor:
        """Shape (dim,)."""
        return self._problem[1]

    def model(self) -> nn.Module:
        """One parameter `x` of shape (dim,), standard normal."""
        return Point(self.dim)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean of f_i over the batch; its gradient is A x - b - mean(xi)."""
        x: Tensor = model()
        return 0.5 * x @ (self.A.to(x.device) @ x) - (self.b.to(x.device) + batch.mean(0)) @ x

    def train_data(self) -> Tensor:
        """The noise xi, shape (samples, dim): each value once with either sign, so that it adds up to zero."""
        return self._problem[2]

    @cached_property
    def _problem(self) -> tuple[Tensor, Tensor, Tensor]:
        chance = np.random.RandomState(self.seed)
        basis, _ = np.linalg.qr(chance.standard_normal((self.dim, self.dim)))
        A = basis * np.geomspace(self.mu, self.L, self.dim) @ basis.T
        b = chance.standard_normal(self.dim)
        half = self.noise * chance.standard_normal((self.samples // 2, self.dim))
        xi = np.concatenate([half, -half, np.zeros((self.samples % 2, self.dim))])
        return torch.from_numpy((A + A.T) / 2), torch.from_numpy(b), torch.from_numpy(xi)


class Point(nn.Module):
    """A vector to move; calling it gives the vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(dim, dtype=torch.float64))

    def forward(self) -> Tensor:
        """Shape (dim,)."""
        return self.x
