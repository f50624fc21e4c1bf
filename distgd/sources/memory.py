"""Samples in memory or in memory-mapped files: tensors and arrays with one row a sample."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distgd.errors import BadInput
from distgd.sources.batch import Batch, like
from distgd.sources.order import Indices

Mapped = np.memmap[Any, Any]


class TensorSource:
    """Samples by row: a tensor, or a tuple or dict of tensors with one first dimension.

    numpy arrays become tensors that share their memory where numpy allows writing to it, and are copied elsewhere. A
    memory-mapped array (`np.load(path, mmap_mode="r")`) stays on the disk: a batch reads its own rows.

    Raises:
        BadInput: no tensors, none of a tensor's type, no samples, or first dimensions that differ.

    >>> source = TensorSource({"x": torch.arange(6.0).view(3, 2), "y": torch.arange(3)})
    >>> source.batch(np.array([2, 0]))["y"]
    tensor([2, 0])
    """

    def __init__(self, data: object, key: str = "data") -> None:
        self._kind = dict if isinstance(data, Mapping) else type(data)
        self._columns = {name: _column(key, name, value) for name, value in _named(key, data).items()}
        lengths = {str(name): len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise BadInput.at(key, "tensors with one first dimension", lengths, "give every sample a row in each")
        self._length = next(iter(lengths.values()))
        if not self._length:
            raise BadInput.at(key, "at least one sample", lengths, "look at what it reads")

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Indices) -> Batch:
        """These rows of every tensor, as copies, in the structure that was given."""
        rows = torch.from_numpy(indices)
        columns = {name: _rows(column, rows) for name, column in self._columns.items()}
        if self._kind is dict:
            return columns
        if issubclass(self._kind, tuple):
            return like(self._kind, list(columns.values()))
        return columns["data"]

    def schema(self) -> dict[str, Any]:
        """By name (a tuple's are its places, a single tensor's is `data`): dtype, and shape without the samples."""
        return {
            str(name): {"dtype": str(column.dtype).removeprefix("torch."), "shape": list(column.shape[1:])}
            for name, column in self._columns.items()
        }


def is_rows(data: object) -> bool:
    """Whether `data` is of a kind that `TensorSource` takes, right or wrong inside."""
    return isinstance(data, (Tensor, np.ndarray, Mapping, tuple))


def _named(key: str, data: object) -> dict[Any, object]:
    if isinstance(data, (Tensor, np.ndarray)):
        return {"data": data}
    if isinstance(data, Mapping) and data:
        return dict(data)
    if isinstance(data, tuple) and data:
        return dict(enumerate(data))
    raise BadInput.at(key, "a tensor, or a tuple or dict of tensors (numpy arrays too)", data, "put a tensor in it")


def _column(key: str, name: object, value: object) -> Tensor | Mapped:
    if isinstance(value, np.memmap) and value.ndim and value.dtype.kind in "biufc":
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        # torch takes neither negative strides nor read-only memory nor another byte order
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        value = torch.from_numpy(np.require(native, requirements=["C", "W"]))
    if isinstance(value, Tensor) and value.ndim:
        return value.detach().cpu()
    expected = "a tensor or an array of numbers whose first dimension is the samples"
    found = " ".join(str(part) for part in (type(value).__name__, getattr(value, "dtype", "")) if part)
    shape = getattr(value, "shape", None)
    where = key if name == "data" else f"{key}[{name!r}]"
    do = "return numbers with one row a sample; a Dataset may give what else there is"
    raise BadInput.described(where, expected, found if shape is None else f"{found} of shape {tuple(shape)}", do)


def _rows(column: Tensor | Mapped, rows: Tensor) -> Tensor:
    if isinstance(column, Tensor):
        return column.index_select(0, rows)
    taken = np.asarray(column[rows.numpy()])  # a copy, in memory
    return torch.from_numpy(taken.astype(taken.dtype.newbyteorder("="), copy=False))


@dataclass(frozen=True)
class Place:
    """Where the file of a memory-mapped array lies, so that the array can travel without its contents."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def open(self) -> Mapped:
        """Map the file again, read-only."""
        if not Path(self.path).is_file():
            raise BadInput.at("data", f"the memory-mapped file {self.path}", "none there", "put it on every machine")
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def travelling(data: Any) -> Any:
    """The same data with every memory-mapped array replaced by its `Place`, where it is a contiguous part of a file."""
    if isinstance(data, Mapping):
        return {name: travelling(value) for name, value in data.items()}
    if isinstance(data, tuple):
        return like(type(data), [travelling(value) for value in data])
    return _place(data) or data


def arrived(data: Any) -> Any:
    """The data that `travelling` was given."""
    if isinstance(data, Mapping):
        return {name: arrived(value) for name, value in data.items()}
    if isinstance(data, tuple):
        return like(type(data), [arrived(value) for value in data])
    return data.open() if isinstance(data, Place) else data


def _place(value: object) -> Place | None:
    if not isinstance(value, np.memmap) or not value.flags.c_contiguous or value.filename is None:
        return None
    mapped: Any = getattr(value, "_mmap", None)
    if mapped is None:
        return None
    # A part of an array keeps the offset of the whole in numpy's record, so that its own is found by address. The map
    # itself begins at a multiple of the allocation granularity below that offset.
    begin = value.offset - value.offset % mmap.ALLOCATIONGRANULARITY
    inside = value.ctypes.data - np.frombuffer(mapped, dtype=np.uint8).ctypes.data
    return Place(str(value.filename), value.dtype, value.shape, begin + inside)
