"""What is staged has the bits of the tree's sum, whoever owns the parts and in however many buckets they come."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distgd.reduce import Node, Sum, Tree, nodes
from distgd.staging import Mean, Staging, cuts

SIZE, BUCKET = 256, 96


def plain(left: Sum[Tensor], right: Sum[Tensor]) -> Sum[Tensor]:
    assert left.value is not None and right.value is not None
    return Sum(left.value + right.value, 0.0, True)


def whole(mean: Mean) -> Tensor:
    """The mean, asked for in blocks that fit no bucket."""
    return torch.cat([mean.block(first, first + 64, torch.full((64,), 9.0)) for first in range(0, SIZE, 64)])


@given(
    st.lists(st.sampled_from(["owned", "foreign", "parts", "empty"]), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_the_mean_is_the_trees_and_foreign_memory_is_left_alone(kinds: list[str], chance: Any, eager: bool) -> None:
    generator = torch.Generator().manual_seed(len(kinds))
    values = [torch.randn(SIZE, generator=generator) * 10.0**k for k, _ in enumerate(kinds)]
    staging, reference = Staging(len(kinds), SIZE, BUCKET, eager=eager), Tree(len(kinds), plain)
    order = list(range(len(kinds)))
    chance.shuffle(order)
    given_out = {}
    for k in order:
        node, weight = (k, k + 1), 0.0 if kinds[k] == "empty" else k + 1.0
        given_out[k] = values[k].clone()
        if kinds[k] == "parts":
            for start, stop in chance.sample(cuts(SIZE, BUCKET), len(cuts(SIZE, BUCKET))):
                assert not staging.complete(node)
                staging.put_part(node, start, given_out[k][start:stop])
            assert staging.complete(node)
            staging.close(node, weight)
        else:
            staging.put(node, weight, given_out[k] if weight else None, owned=kinds[k] == "owned")
        reference.put(node, Sum(values[k].clone() if weight else None, weight, True))
    expected = reference.total(order)
    found = whole(staging.total(order))
    if expected.value is None:
        assert not found.any()
    else:
        assert torch.equal(found, expected.value / expected.weight)
    assert all(torch.equal(given_out[k], values[k]) for k in order if kinds[k] == "foreign")


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_half_a_push_of_a_lost_sender_and_another_cut_of_the_same_slots_are_one_sum(slots: int, seed: int) -> None:
    """Buckets of any nodes in any order, again and again, until everything is covered."""
    chance = random.Random(seed)
    values = [torch.randn(SIZE, generator=torch.Generator().manual_seed(k)) for k in range(slots)]

    def sum_of(node: Node) -> Tensor:
        tree = Tree(slots, plain)
        for k in range(*node):
            tree.put((k, k + 1), Sum(values[k].clone(), 1.0, True))
        value = tree.total(range(*node)).value
        assert value is not None
        return value

    staging = Staging(slots, SIZE, BUCKET, eager=True)
    every = [(k, k + 1) for k in range(slots)] + [parent for parent, _, _ in nodes(slots)]
    for node in chance.choices(every, k=6):
        for start, stop in chance.sample(cuts(SIZE, BUCKET), 2):
            staging.put_part(node, start, sum_of(node)[start:stop])
    for k in range(slots):
        staging.put((k, k + 1), 1.0, values[k].clone(), owned=chance.random() < 0.5)
    assert torch.equal(whole(staging.total(range(slots))), sum_of((0, slots)) / slots)


def test_a_part_that_is_no_bucket_is_refused() -> None:
    staging = Staging(1, SIZE, BUCKET, eager=True)
    for start, size in ((1, BUCKET), (0, BUCKET - 1), (BUCKET * 2, BUCKET), (BUCKET * 3, 1)):
        with pytest.raises(ValueError, match="is no bucket"):
            staging.put_part((0, 1), start, torch.zeros(size))
