"""Which samples slot k of step t takes, and the batch made of them.

`Order` is arithmetic: samples, places and seeds of a slot depend on (seed, epoch, step, slot) alone, never on who asks,
how often, or in which order. Its numbers are the same on every platform and numpy: they come from SHA-256 and from
numpy's frozen `RandomState` (NEP 19).

A `Source` holds the samples. `TensorSource` keeps them in memory; nothing here knows a model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distgd.errors import BadInput

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Batch = Any
"""A tensor, or a tuple, list or dict of batches; all tensors in it have one first dimension, the samples."""


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
    """The seed of one slot's chance (dropout, augmentation): 63 bits, the same on every platform."""
    return _digest("slot", seed, epoch, step, slot)


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


@runtime_checkable
class Source(Protocol):
    """Samples by number. The same numbers give the same batch in every process."""

    def __len__(self) -> int:
        """Samples in it."""

    def batch(self, indices: Indices) -> Batch:
        """The samples of these numbers, in this order, on the CPU."""

    def schema(self) -> dict[str, Any]:
        """What one sample is: by name, `dtype` and `shape`, plain data for a record of the run."""


class TensorSource:
    """Samples in memory: a tensor, or a tuple or dict of tensors with one first dimension.

    numpy arrays become tensors that share their memory where numpy allows writing to it, and are copied elsewhere.

    Raises:
        BadInput: no tensors, none of a tensor's type, no samples, or first dimensions that differ.

    >>> source = TensorSource({"x": torch.arange(6.0).view(3, 2), "y": torch.arange(3)})
    >>> source.batch(np.array([2, 0]))["y"]
    tensor([2, 0])
    """

    def __init__(self, data: object) -> None:
        self._kind = dict if isinstance(data, Mapping) else type(data)
        self._columns = {name: _tensor(name, value) for name, value in _named(data).items()}
        lengths = {str(name): len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise BadInput.at("data", "tensors with one first dimension", lengths, "give every sample a row in each")
        self._length = next(iter(lengths.values()))
        if not self._length:
            raise BadInput.at("data", "at least one sample", lengths)

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Indices) -> Batch:
        """These rows of every tensor, as copies, in the structure that was given."""
        rows = torch.from_numpy(indices)
        columns = {name: column.index_select(0, rows) for name, column in self._columns.items()}
        if self._kind is dict:
            return columns
        if issubclass(self._kind, tuple):
            return _like(self._kind, list(columns.values()))
        return columns["data"]

    def schema(self) -> dict[str, Any]:
        """By name (a tuple's are its places, a single tensor's is `data`): dtype, and shape without the samples."""
        return {
            str(name): {"dtype": str(column.dtype).removeprefix("torch."), "shape": list(column.shape[1:])}
            for name, column in self._columns.items()
        }


def open_source(data: object) -> Source:
    """Make a source of what a task's `train_data` or `eval_data` returned; a source passes as it is.

    Raises:
        BadInput: neither a source nor a tensor, nor a tuple or dict of tensors; or no samples in it.
    """
    if not isinstance(data, Source):
        return TensorSource(data)
    if not len(data):
        raise BadInput.at("data", "at least one sample", 0)
    return data


def count(batch: Batch) -> int:
    """Samples in a batch."""
    return len(next(_tensors(batch)))


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on `device`; what is no tensor passes as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return _like(type(batch), [to_device(value, device) for value in batch])
    return batch


def _like(kind: type, values: list[Any]) -> Any:
    """A tuple, named tuple or list of these values."""
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _named(data: object) -> dict[Any, object]:
    if isinstance(data, (Tensor, np.ndarray)):
        return {"data": data}
    if isinstance(data, Mapping) and data:
        return dict(data)
    if isinstance(data, tuple) and data:
        return dict(enumerate(data))
    found = repr(data) if isinstance(data, (Mapping, tuple)) else type(data).__name__
    raise BadInput(f"data: expected {_ACCEPTED}, found {found}")


def _tensor(name: object, value: object) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        # torch takes neither negative strides nor read-only memory nor another byte order
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        value = torch.from_numpy(np.require(native, requirements=["C", "W"]))
    if isinstance(value, Tensor) and value.ndim:
        return value.detach().cpu()
    expected = "a tensor or an array of numbers whose first dimension is the samples"
    found = " ".join(str(part) for part in (type(value).__name__, getattr(value, "dtype", "")) if part)
    raise BadInput(f"data {name}: expected {expected}, found {found} {list(getattr(value, 'shape', []))}")


_ACCEPTED = (
    "a tensor, a tuple or a dict of tensors (numpy arrays too), "
    "or an object with __len__(), batch(indices) and schema()"
)
