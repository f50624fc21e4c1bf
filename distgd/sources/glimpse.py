"""A few numbers of a few samples, by which a process sees that it has other data than the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distgd.sources.batch import Batch, tensors
from distgd.sources.order import Indices, data_seed, seed_everything, undisturbed

MOST = 192  # numbers of a tensor
TOLERANCE = 0.05  # of the norms: machines may decode or scale the same sample in slightly other bits


@dataclass(frozen=True)
class Numbers:
    """Evenly spaced numbers of one tensor; `exact` where two machines cannot round them in two ways."""

    values: tuple[float, ...]
    exact: bool

    def like(self, other: Numbers) -> bool:
        """Whether both are of the same samples."""
        if np.array_equal(self.values, other.values, equal_nan=True):
            return True
        if self.exact or len(self.values) != len(other.values):
            return False
        mine, others = np.nan_to_num(self.values), np.nan_to_num(other.values)
        apart = np.linalg.norm(mine - others)
        return bool(apart <= TOLERANCE * (np.linalg.norm(mine) + np.linalg.norm(others)))

    def __str__(self) -> str:
        return ", ".join(f"{value:.4g}" for value in self.values[:4])


Glimpse = tuple[Numbers, ...]
"""One entry for each tensor in a batch of the first, the middle and the last sample."""


def glimpse(read: Callable[[Indices], Batch], samples: int, seed: int) -> Glimpse:
    """Read three of so many samples; their chance is seeded as a slot's is."""
    places = np.array(sorted({0, samples // 2, samples - 1}), dtype=np.int64)
    with undisturbed():
        seed_everything(data_seed(seed, 0, 0, 0))
        return tuple(_numbers(tensor) for tensor in tensors(read(places)))


def _numbers(tensor: Tensor) -> Numbers:
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    chosen = torch.linspace(0, max(0, len(flat) - 1), min(MOST, len(flat))).long()
    exact = not tensor.is_floating_point() and not tensor.is_complex() and tensor.element_size() > 1
    return Numbers(tuple(flat[chosen].double().tolist()), exact)


def difference(theirs: Glimpse, ours: Glimpse) -> str | None:
    """The first numbers of the first tensor that is another one here, in words; None where all are alike."""
    if len(theirs) != len(ours):
        return f"{len(theirs)} tensors in a batch at the driver, {len(ours)} here"
    for place, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        if not one.like(other):
            return f"tensor {place} of sample 0 begins with {one} at the driver, with {other} here"
    return None
