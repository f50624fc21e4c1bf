"""How named parameters map to one flat vector, and that vector to shards.

Each tensor starts at a multiple of `ALIGN` elements, with zeros between, and shards are cut at multiples of `ALIGN`. So
an elementwise optimizer that gets one tensor per (tensor, shard) piece steps in the same vector lanes however many
shards there are, and its bits do not depend on the cut. Norms are sums of squares per block of `ALIGN` elements in
float64, added in block order: a number that no cut changes.

Nothing here knows who the servers are. Buffers (BatchNorm's) travel as one vector of bytes beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distgd.errors import BadInput

ALIGN = 64
"""Elements; 256 bytes of float32, a multiple of every vector width and cache line in use."""

CUT = 16
"""Blocks; 4096 bytes of float32, a whole page of memory."""
FINE = 8
"""Slices that hold fewer pages are cut at blocks; copying them is nothing."""

BUCKET = 1 << 20
"""Elements that travel between machines in one message: 4 MB of float32, enough for the wire, few enough to overlap."""

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True)
class Entry:
    """A tensor's place in the flat vector, in elements."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """The part of one tensor that lies in one shard: `start` counts from the shard's first element."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Slice:
    """A shard's part of the flat vector, [start, stop), and the pieces of tensors in it."""

    index: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Trainable parameters in one vector of `size` elements of one float dtype.

    >>> layout = Layout.of([("w", (3, 5)), ("b", (5,))], "float32")
    >>> layout.size, [(e.name, e.start) for e in layout.entries]
    (128, [('w', 0), ('b', 64)])
    """

    entries: tuple[Entry, ...]
    size: int
    dtype: str

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str) -> Layout:
        """Place tensors one after the other, each at the next multiple of `ALIGN`."""
        entries, at = [], 0
        for name, shape in shapes:
            entries.append(Entry(name, tuple(shape), at))
            at += -(-prod(shape) // ALIGN) * ALIGN
        return cls(tuple(entries), at, dtype)

    @classmethod
    def of_model(cls, model: nn.Module) -> Layout:
        """Place the trainable parameters of `model`; a tied parameter once, under its first name.

        Raises:
            BadInput: no trainable parameter, a dtype other than float32 or float64, several dtypes, or two parameters
                that share memory without being the same parameter.
        """
        check_memory(model)
        parameters = trainable(model)
        for name, parameter in parameters.items():
            if parameter.dtype not in _DTYPES:
                do = "keep real and imaginary part apart" if parameter.is_complex() else "call model.float()"
                raise BadInput.described(f"task.model: {name}", "float32 or float64", str(parameter.dtype), do)
        dtypes = {parameter.dtype: name for name, parameter in parameters.items()}
        if len(dtypes) > 1:
            found = ", ".join(f"{name} {_DTYPES[dtype]}" for dtype, name in dtypes.items())
            raise BadInput.described("task.model", "one dtype", found, "call model.float() or model.double()")
        return cls.of(((n, tuple(p.shape)) for n, p in parameters.items()), _DTYPES[next(iter(dtypes))])

    @property
    def count(self) -> int:
        """Parameters, without the zeros between them."""
        return sum(entry.size for entry in self.entries)

    @property
    def torch_dtype(self) -> torch.dtype:
        return next(dtype for dtype, name in _DTYPES.items() if name == self.dtype)

    @property
    def itemsize(self) -> int:
        return int(np.dtype(self.dtype).itemsize)

    def slices(self, shards: int) -> tuple[Slice, ...]:
        """Cut the vector for `shards` servers, at multiples of `ALIGN`, in parts that differ by one block at most.

        Large ones are cut at whole pages of memory, so that a slice can be shared; they differ by two pages at most.
        """
        blocks = self.size // ALIGN
        unit = CUT if blocks >= FINE * shards * CUT else 1
        cuts = [blocks // unit * i // shards * unit * ALIGN for i in range(shards)] + [self.size]
        return tuple(Slice(i, lo, hi, self._pieces(lo, hi)) for i, (lo, hi) in enumerate(pairwise(cuts)))

    def _pieces(self, lo: int, hi: int) -> tuple[Piece, ...]:
        parts = ((e.name, max(e.start, lo), min(e.start + e.size, hi)) for e in self.entries)
        return tuple(Piece(name, first - lo, stop - first) for name, first, stop in parts if first < stop)

    def zeros(self) -> Tensor:
        """A flat vector of zeros, [size]."""
        return torch.zeros(self.size, dtype=self.torch_dtype)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors inside `flat` ([size]), without copies."""
        return {e.name: flat[e.start : e.start + e.size].view(e.shape) for e in self.entries}

    def flatten(self, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """Copy named tensors into a flat vector, [size]: `out`, which holds zeros between them, or a new one."""
        flat = self.zeros() if out is None else out
        for name, view in self.views(flat).items():
            view.copy_(tensors[name].detach())
        return flat

    def adopt(self, model: nn.Module, flat: Tensor) -> None:
        """Make the model's trainable parameters views of `flat`; their former values are dropped."""
        views = self.views(flat)
        for name, parameter in trainable(model).items():
            parameter.data = views[name]


def plain(name: str) -> str:
    """A parameter's or buffer's name as it is without `torch.compile`.

    >>> plain("_orig_mod.layers.0._orig_mod.weight")
    'layers.0.weight'
    """
    return name.replace("_orig_mod.", "")


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its first plain name, in the model's order."""
    return {plain(name): parameter for name, parameter in model.named_parameters()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that take a gradient, by their first plain name, in the model's order."""
    return {name: p for name, p in parameters(model).items() if p.requires_grad}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The model's `state_dict` under plain names: it loads into the model that `torch.compile` was given, too."""
    return {plain(name): value for name, value in model.state_dict().items()}


def check_memory(model: nn.Module) -> None:
    """Refuse a model whose parameters cannot be trained apart; to be asked before it is copied, which unties them.

    Raises:
        BadInput: no trainable parameter, one without a shape or without values, or two that share memory.
    """
    for name, parameter in parameters(model).items():
        if isinstance(parameter, nn.UninitializedParameter):
            do = "call the model on an example before you return it"
            raise BadInput.described(f"task.model: {name}", "a parameter with a shape", "a lazy one", do)
        if parameter.is_meta:
            do = "make it on the CPU"
            raise BadInput.described(f"task.model: {name}", "a parameter with values", "one on the device meta", do)
    if not trainable(model):
        do = "add layers that have some, or set requires_grad=True"
        raise BadInput.described("task.model", "at least one trainable parameter", "none", do)
    _refuse_overlap(trainable(model))


def _refuse_overlap(parameters: Mapping[str, nn.Parameter]) -> None:
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), n) for n, p in parameters.items())
    for (_, stop, one), (start, _, other) in pairwise(spans):
        if start < stop:
            do = "tie weights by assigning the same Parameter object to both places"
            raise BadInput.described(
                "task.model", "parameters of separate memory", f"{one} and {other}, which overlap", do
            )


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor over an array's memory; whoever gets a read-only array does not write to the tensor either."""
    if not array.flags.writeable:
        array = array.view()
        array.flags.writeable = True  # torch knows no read-only memory and warns of it
    return torch.from_numpy(array)


def block_squares(flat: Tensor) -> Tensor:
    """Sums of squares of blocks of `ALIGN` elements, float64, [size / ALIGN]; `flat` is a multiple of `ALIGN` long."""
    norms: Tensor = torch.linalg.vector_norm(flat.view(-1, ALIGN), dim=1, dtype=torch.float64)
    return norms.square_()


def squared_norm(blocks: Tensor) -> float:
    """Add `block_squares` in block order: the same number for every way to cut the vector."""
    return float(np.add.accumulate(blocks.numpy())[-1]) if blocks.numel() else 0.0


def squared(block: Tensor) -> float:
    """The sum of squares of up to about a million elements; adds in the dtype of `block`, in an order of torch's.

    For a number that no cut of the vector may change, see `block_squares`.
    """
    square = float(torch.dot(block, block))
    if isfinite(square):
        return square
    return float(torch.linalg.vector_norm(block, dtype=torch.float64).square())  # it may have overflowed


@dataclass(frozen=True)
class BufferLayout:
    """A model's buffers as one vector of bytes; (name, dtype, shape, first byte) each, 8-byte aligned."""

    entries: tuple[tuple[str, str, tuple[int, ...], int], ...]
    size: int

    @classmethod
    def of_model(cls, model: nn.Module) -> BufferLayout:
        """Place every buffer of `model` in its own order."""
        entries, at = [], 0
        for name, buffer in model.named_buffers():
            entries.append((plain(name), str(buffer.dtype), tuple(buffer.shape), at))
            at += -(-buffer.numel() * buffer.element_size() // 8) * 8
        return cls(tuple(entries), at)

    def pack(self, model: nn.Module) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Copy the buffers of `model` to bytes, [size]."""
        out = torch.zeros(self.size, dtype=torch.uint8)
        for (_, _, _, at), buffer in zip(self.entries, model.buffers(), strict=True):
            raw = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            out[at : at + raw.numel()].copy_(raw)
        return out.numpy()

    def unpack(self, packed: np.ndarray[tuple[int], np.dtype[np.uint8]], model: nn.Module) -> None:
        """Write bytes from `pack` back into the buffers of `model`."""
        raw = torch.from_numpy(packed.copy())
        for (_, _, shape, at), buffer in zip(self.entries, model.buffers(), strict=True):
            size = buffer.numel() * buffer.element_size()
            buffer.data.copy_(raw[at : at + size].view(buffer.dtype).view(shape))
