"""Where samples come from: (epoch, step, slot) -> batch.

    order     which samples a slot takes, and the seeds of its chance
    memory    tensors, arrays and memory-mapped files, a row a sample
    dataset   map-style datasets, sample by sample
    batch     what a batch is

Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, IterableDataset

from distgd.errors import BadInput
from distgd.sources.batch import Batch, tensors, to_device
from distgd.sources.dataset import Collate, DatasetSource
from distgd.sources.memory import TensorSource, arrived, is_rows, travelling
from distgd.sources.order import Indices, Order, data_seed, seed_everything, slot_seed, undisturbed

__all__ = [
    "Batch",
    "Collate",
    "DatasetSource",
    "Indices",
    "Order",
    "Source",
    "TensorSource",
    "arrived",
    "data_seed",
    "is_data",
    "open_source",
    "seed_everything",
    "slot_seed",
    "tensors",
    "to_device",
    "travelling",
    "undisturbed",
]


@runtime_checkable
class Source(Protocol):
    """Samples by number. The same numbers give the same batch in every process."""

    def __len__(self) -> int:
        """Samples in it."""

    def batch(self, indices: Indices) -> Batch:
        """The samples of these numbers, in this order, on the CPU."""

    def schema(self) -> dict[str, Any]:
        """What one sample is: by name, `dtype` and `shape`, plain data for a record of the run."""


def is_data(value: object) -> bool:
    """Whether `value` is data itself, and no function that makes it."""
    return not isinstance(value, type) and (is_rows(value) or isinstance(value, Source) or _by_number(value))


def open_source(data: object, collate: Collate | None = None) -> Source:
    """Make a source of what a task's `train_data` or `eval_data` returned; a source passes as it is.

    Args:
        collate: makes a batch of a list of a dataset's samples; None is torch's default.

    Raises:
        BadInput: nothing that holds samples by number, or no samples in it.
    """
    if isinstance(data, DataLoader):
        do = "return its dataset: batch.size and run.seed decide the batches and their order"
        raise BadInput.at("data", _ACCEPTED, "a DataLoader", do)
    if isinstance(data, (IterableDataset, list)) or (isinstance(data, Iterable) and not is_data(data)):
        do = "give the samples numbers: data[i] and len(data)"
        if isinstance(data, list):
            do = "make it a tuple if it is one tensor a column, a Dataset if it is one item a sample"
        raise BadInput.at("data", _ACCEPTED, f"data that can only be iterated, {type(data).__name__}", do)
    if isinstance(data, Source):
        if not len(data):
            raise BadInput.at("data", "at least one sample", 0)
        return data
    if not is_rows(data) and _by_number(data):
        return DatasetSource(data, collate)
    if not is_rows(data):
        raise BadInput(f"data: expected {_ACCEPTED}, found {type(data).__name__}")
    return TensorSource(data)


def _by_number(value: object) -> bool:
    """Whether it is a map-style dataset: it has a length and gives samples by number."""
    if isinstance(value, (list, str, bytes, IterableDataset)):
        return False
    return hasattr(type(value), "__getitem__") and hasattr(type(value), "__len__")


_ACCEPTED = (
    "a tensor, a tuple or dict of tensors (numpy arrays too), a map-style torch Dataset, "
    "or an object with __len__(), batch(indices) and schema()"
)
