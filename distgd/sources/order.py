"""Which samples slot k of step t takes, and where its chance comes from.

`Order` is arithmetic: samples, places and seeds of a slot depend on (seed, epoch, step, slot) alone, never on who asks,
how often, or in which order. Its numbers are the same on every platform and numpy: they come from SHA-256 and from
numpy's frozen `RandomState` (NEP 19).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Order:
    """The order in which samples are used. Steps are counted from 0 through all epochs.

    Step t belongs to epoch t // steps_per_epoch and takes global batch t % steps_per_epoch of that epoch's permutation
    of the samples. The batch is cut into `slots` pieces as `numpy.array_split` cuts; so is the last one of an epoch,
    which may be short, and then its last slots may be empty. Every sample comes exactly once an epoch.

    Args:
        samples: in the whole set.
        batch: samples of a step.
        slots: pieces of a batch.

    >>> order = Order(samples=10, batch=4, slots=2, seed=0)
    >>> [order.places(step=2, slot=k) for k in (0, 1)]  # the last two samples of epoch 0
    [(8, 9), (9, 10)]
    """

    samples: int
    batch: int
    slots: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, a short last one too."""
        return -(-self.samples // self.batch)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that `step` is in."""
        return step // self.steps_per_epoch

    def filled(self, step: int) -> int:
        """How many slots of `step` hold samples: slots 0 to `filled` - 1 do."""
        first, stop = self._batch(step)
        return min(self.slots, stop - first)

    def places(self, step: int, slot: int) -> tuple[int, int]:
        """First and one-past-last place of the slot in its epoch's order; equal where the slot is empty."""
        first, stop = self._batch(step)
        size, longer = divmod(stop - first, self.slots)
        start = first + slot * size + min(slot, longer)
        return start, start + size + (slot < longer)

    def indices(self, step: int, slot: int) -> Indices:
        """Numbers of the slot's samples, int64; a copy that the caller may change."""
        first, stop = self.places(step, slot)
        return _permutation(self.samples, self.seed, self.epoch_of(step))[first:stop].copy()

    def _batch(self, step: int) -> tuple[int, int]:
        first = step % self.steps_per_epoch * self.batch
        return first, min(first + self.batch, self.samples)


@lru_cache(maxsize=2)  # slots of two epochs can be under way around an epoch's end
def _permutation(samples: int, seed: int, epoch: int) -> Indices:
    bits = np.random.MT19937(_digest("order", seed, epoch))
    return np.random.RandomState(bits).permutation(samples).astype(np.int64, copy=False)


def slot_seed(seed: int, epoch: int, step: int, slot: int) -> int:
    """The seed of a slot's forward pass (dropout): 63 bits, the same on every platform."""
    return _digest("slot", seed, epoch, step, slot)


def data_seed(seed: int, epoch: int, step: int, slot: int) -> int:
    """The seed of what reads a slot's samples (random crops, flips), apart from that of its forward pass."""
    return _digest("data", seed, epoch, step, slot)


def _digest(*parts: str | int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed this process's generators: torch's (CUDA's where it has started), numpy's global one and `random`.

    Called for every slot, so it leaves out `torch.manual_seed`, which remembers each call, with a traceback, for every
    device that has not started.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give back as they were: torch's threads and the generators of torch on the CPU, numpy (global) and `random`."""
    threads, before = torch.get_num_threads(), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
