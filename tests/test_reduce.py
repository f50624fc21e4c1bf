"""The tree decides who adds what: any owners and any order of arrival give the same bits."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgd.reduce import Sum, Tree, maximal, nodes, split


def concatenate(left: Sum[str], right: Sum[str]) -> Sum[str]:
    return Sum(f"({left.value}+{right.value})", 0.0, True)


def reference(first: int, stop: int, empty: frozenset[int] = frozenset()) -> str | None:
    """The tree as the definition says it."""
    if stop - first == 1:
        return None if first in empty else f"g{first}"
    middle = split(first, stop)
    left, right = reference(first, middle, empty), reference(middle, stop, empty)
    return f"({left}+{right})" if left and right else left or right


def part(slot: int, empty: frozenset[int] = frozenset()) -> Sum[str]:
    return Sum(None if slot in empty else f"g{slot}", 0.0 if slot in empty else 1.0, True)


@given(st.integers(2, 200))
def test_split_is_the_largest_power_of_two_below(size: int) -> None:
    left = split(7, 7 + size) - 7
    assert left & (left - 1) == 0
    assert left < size <= 2 * left


@given(st.integers(1, 40))
def test_inner_nodes_are_one_fewer_than_leaves(slots: int) -> None:
    assert len(list(nodes(slots))) == slots - 1


@given(st.data())
def test_any_order_and_any_owners_give_one_tree(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 17))
    empty = data.draw(st.frozensets(st.integers(0, slots - 1)))
    workers = data.draw(st.integers(1, 5))
    owner = [data.draw(st.integers(0, workers - 1)) for _ in range(slots)]
    pushed = []
    for worker in range(workers):
        own = [k for k in range(slots) if owner[k] == worker]
        tree: Tree[str] = Tree(slots, concatenate)
        for slot in data.draw(st.permutations(own)):
            tree.put((slot, slot + 1), part(slot, empty))
        for node in maximal(own, slots):
            assert node in tree
            pushed.append((node, tree.pop(node)))
    shard: Tree[str] = Tree(slots, concatenate)
    for node, partial in data.draw(st.permutations(pushed)):
        shard.put(node, partial)
    total = shard.total(range(slots))
    assert total.value == reference(0, slots, empty)
    assert total.weight == slots - len(empty)


@given(st.integers(1, 17), st.data())
def test_maximal_subtrees_partition_what_is_owned(slots: int, data: st.DataObject) -> None:
    own = data.draw(st.frozensets(st.integers(0, slots - 1)))
    parts = maximal(own, slots)
    assert [k for node in parts for k in range(*node)] == sorted(own)
    triples = list(nodes(slots))
    for parent, left, right in triples:
        assert not (left in parts and right in parts), f"{parent} is owned whole"


@given(st.integers(1, 12), st.data())
def test_a_quorum_leaves_slots_out_of_the_same_tree(slots: int, data: st.DataObject) -> None:
    kept = data.draw(st.frozensets(st.integers(0, slots - 1), min_size=1))
    tree: Tree[str] = Tree(slots, concatenate, eager=False)
    for slot in data.draw(st.permutations(range(slots))):
        tree.put((slot, slot + 1), part(slot))
    assert tree.total(kept).value == reference(0, slots, frozenset(range(slots)) - kept)


def test_a_slot_that_is_not_there_is_an_error_not_a_zero() -> None:
    tree: Tree[str] = Tree(4, concatenate)
    tree.put((0, 1), part(0))
    with pytest.raises(KeyError, match="slot 1"):
        tree.total({0, 1})


def test_a_larger_range_takes_the_place_of_what_is_within_it() -> None:
    tree: Tree[str] = Tree(4, concatenate)
    tree.put((0, 1), part(0))
    tree.put((1, 2), part(1))
    tree.discard((0, 4))
    tree.put((0, 4), Sum("whole", 4.0, True))
    assert tree.total(range(4)) == Sum("whole", 4.0, True)


def test_the_order_matters_in_floating_point_and_the_tree_removes_it() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((16, 64)) * 10.0 ** rng.integers(-6, 6, (16, 1))).astype(np.float32)

    def add(left: Sum[np.ndarray], right: Sum[np.ndarray]) -> Sum[np.ndarray]:
        assert left.value is not None
        assert right.value is not None
        return Sum(left.value + right.value, 0.0, True)

    totals, naive = set(), set()
    for seed in range(20):
        order = random.Random(seed).sample(range(16), 16)
        tree: Tree[np.ndarray] = Tree(16, add)
        for slot in order:
            tree.put((slot, slot + 1), Sum(values[slot], 1.0, False))
        total = tree.total(range(16)).value
        assert total is not None
        totals.add(total.tobytes())
        running = np.zeros(64, np.float32)
        for slot in order:
            running = running + values[slot]
        naive.add(running.tobytes())
    assert len(totals) == 1
    assert len(naive) > 1
