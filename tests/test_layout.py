"""The flat vector: aligned, cut anywhere, and read back without a changed bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distgd.errors import BadInput
from distgd.layout import ALIGN, CUT, FINE, BufferLayout, Layout, block_squares, squared_norm, trainable

shapes = st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple), min_size=1, max_size=8)


def layout_of(sizes: list[tuple[int, ...]]) -> Layout:
    return Layout.of([(f"p{i}", shape) for i, shape in enumerate(sizes)], "float32")


@given(shapes, st.integers(1, 7))
def test_pieces_cover_every_element_of_every_tensor_once(sizes: list[tuple[int, ...]], shards: int) -> None:
    layout = layout_of(sizes)
    covered = np.zeros(layout.size, int)
    for part in layout.slices(shards):
        assert part.start % ALIGN == 0
        assert part.stop % ALIGN == 0
        for piece in part.pieces:
            covered[part.start + piece.start : part.start + piece.start + piece.size] += 1
    expected = np.zeros(layout.size, int)
    for entry in layout.entries:
        assert entry.start % ALIGN == 0
        expected[entry.start : entry.start + entry.size] = 1
    assert (covered == expected).all()


@given(shapes, st.integers(1, 7))
def test_shards_differ_by_one_block_at_most(sizes: list[tuple[int, ...]], shards: int) -> None:
    parts = layout_of(sizes).slices(shards)
    assert sum(part.size for part in parts) == layout_of(sizes).size
    most = max(part.size for part in parts)
    whole_pages = all(part.start % (CUT * ALIGN) == 0 for part in parts)
    assert most - min(part.size for part in parts) <= (2 * CUT * ALIGN if whole_pages else ALIGN)
    assert whole_pages or most <= FINE * CUT * ALIGN, "long slices can be shared by their pages"


@given(shapes)
def test_flatten_and_views_are_inverse(sizes: list[tuple[int, ...]]) -> None:
    layout = layout_of(sizes)
    tensors = {entry.name: torch.randn(entry.shape) for entry in layout.entries}
    back = layout.views(layout.flatten(tensors))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@given(st.integers(1, 50), st.integers(1, 6), st.integers(0, 2**31))
def test_the_norm_is_the_same_number_for_every_cut(blocks: int, shards: int, seed: int) -> None:
    layout = Layout.of([("p", (blocks * ALIGN,))], "float32")
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    parts = [block_squares(flat[part.start : part.stop]) for part in layout.slices(shards)]
    assert squared_norm(torch.cat(parts)) == squared_norm(block_squares(flat))
    assert squared_norm(block_squares(flat)) == pytest.approx(float(flat.double().square().sum()), rel=1e-12)


def test_an_adopted_model_reads_the_flat_vector() -> None:
    model = nn.Linear(3, 2)
    layout = Layout.of_model(model)
    flat = layout.flatten(dict(model.named_parameters()))
    layout.adopt(model, flat)
    flat.fill_(2.0)
    assert torch.equal(model.weight, torch.full((2, 3), 2.0))


def test_tied_parameters_have_one_place_and_frozen_ones_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    assert [entry.name for entry in Layout.of_model(model).entries] == ["0.weight", "0.bias"]
    assert list(trainable(model)) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.ReLU(), "at least one trainable parameter"),
        (nn.Linear(2, 2).half(), "float32 or float64, found torch.float16"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "expected one dtype"),
        (nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
    ],
)
def test_models_that_cannot_be_laid_out_are_refused_by_name(model: nn.Module, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Layout.of_model(model)


def test_parameters_that_overlap_without_being_tied_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(BadInput, match=r"expected parameters of separate memory, found 0\.weight and 1\.weight"):
        Layout.of_model(model)


def test_buffers_of_any_dtype_survive_the_trip() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(5))
    model.register_buffer("flags", torch.tensor([True, False, True]))
    layout = BufferLayout.of_model(model)
    model[0](torch.randn(7, 3))
    packed = layout.pack(model)
    other = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(5))
    other.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
    layout.unpack(packed, other)
    for (name, one), (_, two) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(one, two), name
