"""A mean made block by block has the bits of the tree's sum, whoever owns the parts."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distgd.reduce import Sum, Tree
from distgd.staging import Mean, add

SIZE = 256


def plain(left: Sum[Tensor], right: Sum[Tensor]) -> Sum[Tensor]:
    assert left.value is not None and right.value is not None
    return Sum(left.value + right.value, 0.0, True)


@given(
    st.lists(st.sampled_from(["owned", "foreign", "empty"]), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_the_mean_is_the_trees_and_foreign_memory_is_left_alone(kinds: list[str], random: object, eager: bool) -> None:
    chance = torch.Generator().manual_seed(len(kinds))
    values = [torch.randn(SIZE, generator=chance) * 10.0**k for k, _ in enumerate(kinds)]
    ours, reference = Tree(len(kinds), add, eager=eager), Tree(len(kinds), plain)
    order = list(range(len(kinds)))
    random.shuffle(order)  # type: ignore[attr-defined]
    given_out = {}
    for k in order:
        weight = 0.0 if kinds[k] == "empty" else k + 1.0
        given_out[k] = values[k].clone()
        ours.put((k, k + 1), Sum(given_out[k] if weight else None, weight, kinds[k] == "owned"))
        reference.put((k, k + 1), Sum(values[k].clone() if weight else None, weight, True))
    expected = reference.total(order)
    mean = Mean(ours.total(order), 0.5)
    found = torch.cat([mean.block(first, first + 64, torch.full((64,), 9.0)) for first in range(0, SIZE, 64)])
    if expected.value is None:
        assert not found.any()
    else:
        assert torch.equal(found, expected.value / expected.weight * 0.5)
    assert all(torch.equal(given_out[k], values[k]) for k in order if kinds[k] == "foreign")


@given(
    hnp.arrays(np.float32, 64, elements=st.floats(width=32)),
    st.one_of(st.integers(0, 70).map(lambda k: 2.0**k), st.floats(0.001, 1e6)),
)
def test_a_mean_has_the_bits_of_a_division(values: np.ndarray[Any, Any], weight: float) -> None:
    """Also where it is computed another way: weights that are powers of two."""
    total = torch.from_numpy(values)
    mean = Mean(Sum(total, weight, owned=False)).block(0, 64, torch.empty(64))
    assert torch.equal((total / weight).view(torch.int32), mean.view(torch.int32))
