"""How numbers travel between machines: as they are, or in half the bytes. Whoever sends keeps what was lost.

`bfloat16` has float32's range and 8 bits of precision. Its rounding is not forgotten: with `ErrorFeedback` the error of
one step is added to what is sent in the next (Seide et al., "1-bit stochastic gradient descent", 2014, section 3.1), so
that errors do not add up. No codec keeps the bits of a run.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distgd.layout import tensor_of

Array = np.ndarray[Any, Any]


class Codec(Protocol):
    """Writes a vector for the wire, and reads it again."""

    def encode(self, values: Tensor) -> Array:
        """Numbers for the wire, as many as `values` (1-D, on the CPU); of its own memory only where they differ."""

    def decode(self, array: Array, dtype: torch.dtype) -> Tensor:
        """What `encode` was given, as far as it has been kept; in memory of its own unless nothing was changed."""


class Exact:
    """Numbers as they are."""

    def encode(self, values: Tensor) -> Array:
        """The same memory."""
        return values.numpy()

    def decode(self, array: Array, dtype: torch.dtype) -> Tensor:
        """The same memory."""
        return tensor_of(array)


class BFloat16:
    """Two bytes a number: sign, exponent and the first 8 bits of the mantissa, rounded to even."""

    def encode(self, values: Tensor) -> Array:
        """int16, which numpy knows."""
        return values.to(torch.bfloat16).view(torch.int16).numpy()

    def decode(self, array: Array, dtype: torch.dtype) -> Tensor:
        """Widened to `dtype`."""
        return tensor_of(array).view(torch.bfloat16).to(dtype)


class ErrorFeedback:
    """Adds to each vector what the codec lost of the one before; a key names the place that a vector belongs to."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._lost: dict[Hashable, Tensor] = {}

    def encode(self, key: Hashable, values: Tensor) -> Array:
        """Encode `values`, which stay as they are, with what was lost at `key` before."""
        lost = self._lost.get(key)
        wanted = values if lost is None else values + lost
        array = self._codec.encode(wanted)
        self._lost[key] = wanted - self._codec.decode(array, values.dtype)
        return array


CODECS: dict[str, type[Exact] | type[BFloat16]] = {"model": Exact, "bfloat16": BFloat16}
"""By `transport.dtype`."""
