"""Where samples come from: (epoch, step, slot) -> batch.

    order     which samples a slot takes, and the seeds of its chance
    memory    tensors, arrays and memory-mapped files, a row a sample
    dataset   map-style datasets, sample by sample
    glimpse   whether another process has the same data
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
from distgd.sources.glimpse import Glimpse, difference, glimpse
from distgd.sources.memory import TensorSource, arrived, is_rows, travelling
from distgd.sources.order import Indices, Order, data_seed, seed_everything, slot_seed, undisturbed

__all__ = [
    "Batch",
    "Collate",
    "DatasetSource",
    "Glimpse",
    "Indices",
    "Order",
    "Source",
    "TensorSource",
    "arrived",
    "data_seed",
    "difference",
    "glimpse",
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


def open_source(data: object, collate: Collate | None = None, key: str = "data") -> Source:
    """Make a source of what a task's `train_data` or `eval_data` returned; a source passes as it is.

    Args:
        collate: makes a batch of a list of a dataset's samples; None is torch's default.
        key: what messages call the data.

    Raises:
        BadInput: nothing that holds samples by number, or no samples in it.
    """
    if isinstance(data, DataLoader):
        do = "return its dataset: batch.size and run.seed decide the batches and their order"
        raise BadInput.described(key, _ACCEPTED, "a DataLoader", do)
    if isinstance(data, list):
        do = "make it a tuple if it is one tensor a column, a Dataset if it is one item a sample"
        raise BadInput.described(key, _ACCEPTED, "a list", do)
    if isinstance(data, IterableDataset) or (isinstance(data, Iterable) and not is_data(data)):
        found = f"data that can only be iterated, {type(data).__name__}"
        raise BadInput.described(key, _ACCEPTED, found, "give the samples numbers: data[i] and len(data)")
    if isinstance(data, Source):
        if not len(data):
            raise BadInput.described(key, "at least one sample", "none", "look at what it reads")
        return data
    if not is_rows(data) and _by_number(data):
        return DatasetSource(data, collate, key)
    if not is_rows(data):
        do = "give it __len__ and __getitem__" if hasattr(data, "__getitem__") else "return one of these"
        raise BadInput.described(key, _ACCEPTED, type(data).__name__, do)
    return TensorSource(data, key)


def _by_number(value: object) -> bool:
    """Whether it is a map-style dataset: it has a length and gives samples by number."""
    if isinstance(value, (list, str, bytes, IterableDataset)):
        return False
    return hasattr(type(value), "__getitem__") and hasattr(type(value), "__len__")


_ACCEPTED = (
    "a tensor, a tuple or dict of tensors (numpy arrays too), a map-style torch Dataset, "
    "or an object with __len__(), batch(indices) and schema()"
)
