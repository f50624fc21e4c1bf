"""Gradients of a step, gathered beside the weights, then added and divided block by block.

Where gradients lie in other processes' memory nothing is added when they arrive: the sum stays a formula, and each
block of it is computed when the optimizer needs it, so that every gradient is read once and no sum is ever written to
main memory. What a message has brought is added as soon as its neighbor in the tree is there. The order of additions
is the tree's in either case.

What comes from another machine comes in buckets, and each bucket has a tree of its own: one that is there is added
while the next is under way. Whether a bucket is covered is asked of that bucket alone, as every sum over the same slots
has the same bits, whoever made it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor

from distgd.layout import Slice
from distgd.reduce import Node, Sum, Tree

LARGEST_INVERTED = 2.0**60
"""Far below what has no inverse in float32."""

Part = Tensor | tuple["Part", "Part"]
"""A vector, or the sum of two that is still to be computed."""


def cuts(size: int, bucket: int) -> list[tuple[int, int]]:
    """The buckets of a shard of `size` elements, as (start, stop); an empty shard has an empty one.

    >>> cuts(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    return [(start, min(start + bucket, size)) for start in range(0, max(size, 1), bucket)]


class Staging:
    """What a shard holds of one step.

    Args:
        slots: K.
        size: elements of the shard.
        bucket: elements of a bucket; the last one may be shorter.
        eager: whether to add before the set of slots is known (no quorum).
    """

    def __init__(self, slots: int, size: int, bucket: int, *, eager: bool) -> None:
        self._cuts = cuts(size, bucket)
        self._bucket = bucket
        self._trees: list[Tree[Part]] = [Tree(slots, add, eager=eager) for _ in self._cuts]
        self._weights: Tree[Part] = Tree(slots, add, eager=eager)  # of pushes that are whole, without values

    def put(self, node: Node, weight: float, gradient: Tensor | None, *, owned: bool) -> None:
        """Hold a whole push, in the place of all that it covers; None where its slots are empty."""
        for place, (start, stop) in enumerate(self._cuts):
            self._put(place, node, None if gradient is None else gradient[start:stop], owned=owned)
        self.close(node, weight)

    def put_part(self, node: Node, start: int, gradient: Tensor) -> None:
        """Hold the bucket at `start` of a push that comes in parts; its memory may be written to.

        Raises:
            ValueError: no bucket begins there, or one of another length.
        """
        place = start // self._bucket
        if place >= len(self._cuts) or self._cuts[place] != (start, start + gradient.numel()):
            raise ValueError(f"a part of {gradient.numel()} elements at {start} is no bucket of {self._cuts}")
        self._put(place, node, gradient, owned=True)

    def _put(self, place: int, node: Node, gradient: Tensor | None, *, owned: bool) -> None:
        tree = self._trees[place]
        if not tree.covers(node):
            tree.discard(node)
            tree.put(node, Sum(gradient, 0.0, owned and gradient is not None))

    def complete(self, node: Node) -> bool:
        """Whether every bucket of `node` is here."""
        return all(tree.covers(node) for tree in self._trees)

    def close(self, node: Node, weight: float) -> None:
        """Count a push whose buckets are all here, in the place of all that it covers."""
        self._weights.discard(node)
        self._weights.put(node, Sum(None, weight, owned=False))

    def total(self, slots: Collection[int], scale: float = 1.0) -> Mean:
        """Take the mean over `slots`, each of which must be held, times `scale`; everything is forgotten."""
        weight = self._weights.total(slots).weight
        return Mean(tuple(tree.total(slots).value for tree in self._trees), self._bucket, weight, scale)

    def clear(self) -> None:
        """Forget everything."""
        self._weights.clear()
        for tree in self._trees:
            tree.clear()


@dataclass(frozen=True)
class Block:
    """Elements [first, stop) of the shard, and the pieces in them, counted from `first`."""

    first: int
    stop: int
    parts: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, part: Slice, cuts: list[tuple[int, int, int]]) -> Block:
        places = [(part.pieces[i].start + lo, part.pieces[i].start + hi) for i, lo, hi in cuts]
        first, stop = places[0][0], places[-1][1]
        return cls(first, stop, tuple((lo - first, hi - first) for lo, hi in places))


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
    """The sum over a step's slots, by buckets of so many elements each, divided by `weight`, times `scale`.

    A bucket is None where every slot was empty.
    """

    buckets: Sequence[Part | None]
    bucket: int
    weight: float
    scale: float = 1.0

    @classmethod
    def of(cls, total: Tensor, weight: float, scale: float = 1.0) -> Mean:
        """That of one vector."""
        return cls((total,), max(1, total.numel()), weight, scale)

    def block(self, first: int, stop: int, out: Tensor) -> Tensor:
        """Write elements [first, stop) of the mean to `out`, [stop - first]; zeros where every slot was empty."""
        at = first
        while at < stop:
            place, begin = at // self.bucket, at % self.bucket
            end = min(begin + stop - at, self.bucket)
            self._within(self.buckets[place], begin, end, out[at - first : at - first + end - begin])
            at += end - begin
        return out

    def _within(self, total: Part | None, first: int, stop: int, out: Tensor) -> None:
        if total is None:
            out.zero_()
            return
        if isinstance(total, Tensor):
            _divided(total[first:stop], self.weight, out)
        else:
            _divided(_block(total, first, stop, out, []), self.weight, out)
        if self.scale != 1.0:
            out.mul_(self.scale)


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
