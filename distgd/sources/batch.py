"""What a batch is, and moving one to a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Any
"""A tensor, or a tuple, list or dict of batches. What else is in it, text say, passes as it is."""


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on `device`; other objects that have `.to(device)` move themselves."""
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return like(type(batch), [to_device(value, device) for value in batch])
    return batch.to(device) if callable(getattr(batch, "to", None)) else batch


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Every tensor in the batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors(value)


def like(kind: type, values: list[Any]) -> Any:
    """A tuple, named tuple or list of these values."""
    return kind(*values) if hasattr(kind, "_fields") else kind(values)
