"""Gradients of a step, added and divided block by block.

Where gradients lie in other processes' memory nothing is added when they arrive: the sum stays a formula, and each
block of it is computed when the optimizer needs it, so that every gradient is read once and no sum is ever written to
main memory. The order of additions is the tree's in either case.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor

from distgd.reduce import Sum

LARGEST_INVERTED = 2.0**60
"""Far below what has no inverse in float32."""

Part = Tensor | tuple["Part", "Part"]
"""A vector, or the sum of two that is still to be computed."""


def add(left: Sum[Part], right: Sum[Part]) -> Sum[Part]:
    """Add into the memory of a side that is owned; put it off where neither is."""
    assert left.value is not None and right.value is not None
    into, other = (left, right) if left.owned else (right, left)
    if not into.owned:
        return Sum((left.value, right.value), 0.0, False)
    assert isinstance(into.value, Tensor) and other.value is not None
    if isinstance(other.value, Tensor):
        return Sum(into.value.add_(other.value), 0.0, True)
    return Sum(into.value.add_(_block(other.value, 0, into.value.numel(), torch.empty_like(into.value), [])), 0.0, True)


@dataclass(frozen=True)
class Mean:
    """The sum over a step's slots, divided by their weight, times `scale`."""

    total: Sum[Part]
    scale: float = 1.0

    def block(self, first: int, stop: int, out: Tensor) -> Tensor:
        """Write elements [first, stop) of the mean to `out`, [stop - first]; zeros where every slot was empty."""
        if self.total.value is None:
            return out.zero_()
        if isinstance(self.total.value, Tensor):
            _divided(self.total.value[first:stop], self.total.weight, out)
        else:
            _divided(_block(self.total.value, first, stop, out, []), self.total.weight, out)
        return out if self.scale == 1.0 else out.mul_(self.scale)


def _divided(vector: Tensor, weight: float, out: Tensor) -> Tensor:
    """Write `vector` / `weight` to `out`. The inverse of a power of two is exact: the same bits, in half the time."""
    if 1.0 <= weight <= LARGEST_INVERTED and frexp(weight)[0] == 0.5:
        return torch.mul(vector, 1.0 / weight, out=out)
    return torch.div(vector, weight, out=out)


def _block(part: Part, first: int, stop: int, out: Tensor, spare: list[Tensor]) -> Tensor:
    """One block of a sum, in `out`. Which side comes first makes no difference: a + b is b + a in every bit."""
    if isinstance(part, Tensor):
        return out.copy_(part[first:stop])
    left, right = part
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.add(left[first:stop], right[first:stop], out=out)
    if isinstance(left, Tensor):
        return _block(right, first, stop, out, spare).add_(left[first:stop])
    _block(left, first, stop, out, spare)
    if isinstance(right, Tensor):
        return out.add_(right[first:stop])
    other = spare.pop() if spare else torch.empty_like(out)
    out.add_(_block(right, first, stop, other, spare))
    spare.append(other)
    return out
