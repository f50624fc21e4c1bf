"""The fixed reduction tree over the slots of a step.

Floating-point addition is not associative, so the tree, not the order of arrival, says who is added to whom. A range of
m slots splits at the largest power of two below m. A worker adds the slots that it owns as subtrees, a shard adds what
arrives, and whoever adds, the bits are the same. A slot without samples is passed through, never added as zero.

Nothing here knows who sends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Node = tuple[int, int]
"""Slots [first, stop) of one tree."""


def split(first: int, stop: int) -> int:
    """Where the range [first, stop) of at least two slots splits.

    >>> split(0, 5), split(4, 8)
    (4, 6)
    """
    return first + (1 << ((stop - first - 1).bit_length() - 1))


def nodes(slots: int) -> Iterator[tuple[Node, Node, Node]]:
    """Every inner node of the tree over `slots` as (parent, left, right), parents first."""
    pending = [(0, slots)]
    while pending:
        first, stop = pending.pop()
        if stop - first > 1:
            middle = split(first, stop)
            yield (first, stop), (first, middle), (middle, stop)
            pending += [(middle, stop), (first, middle)]


def maximal(own: Collection[int], slots: int) -> list[Node]:
    """The largest nodes of the tree over `slots` that lie wholly within `own`, in order.

    >>> maximal({0, 1, 2, 5}, 8)
    [(0, 2), (2, 3), (5, 6)]
    """

    def within(first: int, stop: int) -> list[Node]:
        if all(k in own for k in range(first, stop)):
            return [(first, stop)]
        if stop - first == 1:
            return []
        middle = split(first, stop)
        return within(first, middle) + within(middle, stop)

    return within(0, slots)


@dataclass(frozen=True)
class Sum(Generic[T]):
    """A partial sum: `value` is None where every slot in it was empty; `owned` says it may be written to."""

    value: T | None
    weight: float
    owned: bool


class Tree(Generic[T]):
    """Partial sums of one step, added as soon as both halves of a node are there.

    `add(left, right)` returns the sum of two values that both hold something and may use the memory of an owned one.
    With `eager` off nothing is added before `total`, which then can leave slots out (quorum).

    >>> tree = Tree(4, lambda left, right: Sum(left.value + right.value, 0.0, True))
    >>> for slot in (2, 0, 3, 1):
    ...     tree.put((slot, slot + 1), Sum(f"g{slot}", 1.0, True))
    >>> tree.total(range(4))
    Sum(value='g0g1g2g3', weight=4.0, owned=True)
    """

    def __init__(self, slots: int, add: Callable[[Sum[T], Sum[T]], Sum[T]], *, eager: bool = True) -> None:
        self.slots = slots
        self._add = add
        self._eager = eager
        self._parent = {child: triple for triple in nodes(slots) for child in triple[1:]}
        self._held: dict[Node, Sum[T]] = {}

    def __contains__(self, node: Node) -> bool:
        return node in self._held

    def covers(self, node: Node) -> bool:
        """Whether a sum that is held holds `node`."""
        return any(first <= node[0] and node[1] <= stop for first, stop in self._held)

    def put(self, node: Node, part: Sum[T]) -> None:
        """Hold a partial sum and add it to its neighbor as far as that is there."""
        self._held[node] = part
        while self._eager and node in self._parent:
            parent, left, right = self._parent[node]
            if left not in self._held or right not in self._held:
                return
            self._held[parent] = self._join(self._held.pop(left), self._held.pop(right))
            node = parent

    def pop(self, node: Node) -> Sum[T]:
        """Take a partial sum out."""
        return self._held.pop(node)

    def discard(self, node: Node) -> None:
        """Forget everything within `node`."""
        first, stop = node
        self._held = {n: s for n, s in self._held.items() if not (first <= n[0] and n[1] <= stop)}

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()

    def total(self, slots: Collection[int]) -> Sum[T]:
        """Take the sum over `slots`, each of which must be held; everything is forgotten."""
        wanted = set(slots)
        total = self._total((0, self.slots), wanted)
        self._held.clear()
        return total if total is not None else Sum(None, 0.0, False)

    def _total(self, node: Node, wanted: set[int]) -> Sum[T] | None:
        if node in self._held and wanted.issuperset(range(*node)):
            return self._held.pop(node)
        first, stop = node
        if stop - first == 1:
            if first in wanted:
                raise KeyError(f"slot {first} is not held")
            return None
        middle = split(first, stop)
        left, right = self._total((first, middle), wanted), self._total((middle, stop), wanted)
        return self._join(left, right) if left and right else left or right

    def _join(self, left: Sum[T], right: Sum[T]) -> Sum[T]:
        weight = left.weight + right.weight
        if left.value is None or right.value is None:
            some = right if left.value is None else left
            return Sum(some.value, weight, some.owned)
        added = self._add(left, right)
        return Sum(added.value, weight, added.owned)
