"""Which samples a slot takes, and how a batch is made of them."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from distgd.errors import BadInput
from distgd.sources import Order, Source, TensorSource, open_source, seed_everything, slot_seed, tensors, to_device

orders = st.builds(
    Order,
    samples=st.integers(1, 60),
    batch=st.integers(1, 70),
    slots=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
)


def batch_of(order: Order, step: int) -> np.ndarray[Any, Any]:
    return np.concatenate([order.indices(step, slot) for slot in range(order.slots)])


@given(orders, st.integers(0, 3))
def test_every_sample_comes_exactly_once_an_epoch(order: Order, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    assert {order.epoch_of(step) for step in steps} == {epoch}
    seen = np.concatenate([batch_of(order, step) for step in steps])
    assert sorted(seen) == list(range(order.samples))


@given(orders, st.integers(0, 200))
def test_a_batch_is_cut_as_array_split_cuts(order: Order, step: int) -> None:
    batch = batch_of(order, step)
    pieces = np.array_split(batch, order.slots)
    for slot, piece in enumerate(pieces):
        assert order.indices(step, slot).tolist() == piece.tolist()
    assert order.filled(step) == sum(len(piece) > 0 for piece in pieces)


@given(orders, st.integers(0, 200))
def test_places_of_slots_and_steps_follow_each_other(order: Order, step: int) -> None:
    places = [order.places(step, slot) for slot in range(order.slots)]
    within = step % order.steps_per_epoch
    assert places[0][0] == within * order.batch
    assert places[-1][1] == min(order.samples, (within + 1) * order.batch)
    assert all(stop == start for (_, stop), (start, _) in pairwise(places))


@given(orders, st.lists(st.tuples(st.integers(0, 90), st.integers(0, 8)), max_size=20))
def test_what_was_asked_before_changes_nothing(order: Order, asked: list[tuple[int, int]]) -> None:
    wanted = order.indices(0, 0).tolist()
    for step, slot in asked:
        order.indices(step, slot % order.slots)[:] = -1
    np.random.seed(len(asked))
    assert order.indices(0, 0).tolist() == wanted


@given(orders, st.integers(1, 9), st.integers(0, 30))
def test_the_number_of_slots_does_not_change_the_batch(order: Order, slots: int, step: int) -> None:
    other = Order(order.samples, order.batch, slots, order.seed)
    assert batch_of(order, step).tolist() == batch_of(other, step).tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    runs = [batch_of(Order(100, 100, 4, seed), step).tolist() for seed in (0, 1, 2**32) for step in (0, 1)]
    assert len({tuple(run) for run in runs}) == len(runs)


def test_recorded_order_and_seeds() -> None:
    """Rewritten only on purpose: a change here changes the bits of every run."""
    assert batch_of(Order(samples=10, batch=10, slots=3, seed=7), 2).tolist() == [0, 2, 9, 5, 3, 6, 4, 7, 8, 1]
    assert slot_seed(7, 0, 3, 1) == 744072223418727584


def test_slot_seeds_are_63_bits_and_differ() -> None:
    seeds = {slot_seed(s, e, t, k) for s in (0, 1, 2**62) for e in (0, 1) for t in range(20) for k in range(8)}
    assert len(seeds) == 3 * 2 * 20 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeding_decides_all_three_generators() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    high = 2**63 - 1
    assert draw(high) == draw(high)
    assert all(one != other for one, other in zip(draw(high), draw(1), strict=True))


x, y = torch.arange(12.0).view(6, 2), np.arange(6)


@pytest.mark.parametrize("data", [x, (x, y), {"pixels": x, "digit": y}], ids=["tensor", "tuple", "dict"])
def test_a_batch_has_the_structure_and_the_rows_that_were_asked_for(data: Any) -> None:
    source = open_source(data)
    batch = source.batch(np.array([4, 0, 4]))
    parts = {"tensor": lambda: [batch], "tuple": lambda: list(batch), "dict": lambda: [batch["pixels"], batch["digit"]]}
    kind = {torch.Tensor: "tensor", tuple: "tuple", dict: "dict"}[type(batch)]
    rows = [x[[4, 0, 4]], torch.tensor([4, 0, 4])]
    for part, expected in zip(parts[kind](), rows, strict=False):
        assert torch.equal(part, expected)
    assert type(batch) is type(data)
    assert (len(source), len(next(tensors(batch)))) == (6, 3)


def test_a_batch_is_a_copy() -> None:
    source = TensorSource(x)
    source.batch(np.array([1])).zero_()
    assert torch.equal(source.batch(np.array([1])), x[[1]])


def test_the_schema_is_plain_data_without_the_samples() -> None:
    assert TensorSource({"pixels": x, "digit": y}).schema() == {
        "pixels": {"dtype": "float32", "shape": [2]},
        "digit": {"dtype": "int64", "shape": []},
    }
    assert list(TensorSource((x, y)).schema()) == ["0", "1"]
    assert list(TensorSource(x).schema()) == ["data"]


def test_arrays_that_torch_cannot_share_are_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for array in (mapped, np.arange(6)[::-1][::-1], np.arange(6)[::-1], np.arange(6).astype(">i8")):
        assert TensorSource(array).batch(np.arange(6)).tolist() == array.tolist()


def test_a_source_of_ones_own_passes_as_it_is() -> None:
    class Squares:
        def __len__(self) -> int:
            return 5

        def batch(self, indices: Any) -> Any:
            return {"n": [torch.from_numpy(indices**2)], "kind": "square"}

        def schema(self) -> dict[str, Any]:
            return {}

    mine = Squares()
    assert isinstance(mine, Source)
    assert open_source(mine) is mine
    moved = to_device(mine.batch(np.array([3, 4])), "meta")
    assert moved["n"][0].is_meta
    assert moved["kind"] == "square"
    assert len(next(tensors(moved))) == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"pixels": x, "digit": y[:4]}, ["pixels", "6", "digit", "4"]),
        (torch.zeros(0, 3), ["at least one sample", "0"]),
        ((), ["tensor", "()"]),
        ({}, ["tensor", "{}"]),
        (iter([x]), ["tuple", "dict", "batch(indices)", "iterator"]),
        ([x, x], ["tuple", "list"]),
        ((x, "labels.csv"), ["data[1]", "str"]),
        (np.array(["a", "b"]), ["array of numbers", "<U1"]),
        ({"scalar": torch.tensor(1.0)}, ["scalar", "first dimension", "shape ()"]),
    ],
)
def test_wrong_data_is_refused_by_name_and_length(data: Any, words: list[str]) -> None:
    with pytest.raises(BadInput) as refused:
        open_source(data)
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_source_without_samples_is_refused() -> None:
    class Nothing(TensorSource):
        def __len__(self) -> int:
            return 0

    with pytest.raises(BadInput, match="at least one sample"):
        open_source(Nothing(x))


class Letters(Dataset[Any]):
    """Samples with chance in them, as augmentation has."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.rand(2) + index, "n": np.random.rand(), "r": random.random(), "name": f"letter {index}"}


def test_a_dataset_gives_batches_of_its_samples_with_the_chance_of_the_seed() -> None:
    source = open_source(Letters())
    assert len(source) == 10

    def batch(seed: int) -> Any:
        seed_everything(seed)
        return source.batch(np.array([7, 2]))

    assert batch(1)["name"] == ["letter 7", "letter 2"]
    assert batch(1)["x"].shape == (2, 2)
    for name in ("x", "n", "r"):
        assert torch.equal(batch(1)[name], batch(1)[name])
        assert not torch.equal(batch(1)[name], batch(2)[name])


def test_looking_at_a_dataset_leaves_chance_alone_and_is_the_same_everywhere() -> None:
    torch.manual_seed(4)
    expected = torch.rand(())
    torch.manual_seed(4)
    schemas = [open_source(Letters()).schema() for _ in range(2)]
    assert torch.rand(()) == expected
    assert (
        schemas[0]
        == schemas[1]
        == {
            "0": {"dtype": "float32", "shape": [2]},
            "1": {"dtype": "float64", "shape": []},
            "2": {"dtype": "float64", "shape": []},
        }
    )


class AtOnce(Letters):
    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{"x": torch.tensor(indices)} for _ in indices]


def test_a_dataset_that_reads_many_at_once_is_asked_once() -> None:
    assert open_source(AtOnce()).batch(np.array([3, 1]))["x"].tolist() == [[3, 1], [3, 1]]


def test_a_memory_mapped_file_is_read_by_rows(tmp_path: Path) -> None:
    array = np.arange(600, dtype=">i4").reshape(200, 3)
    np.save(tmp_path / "a.npy", array)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    source = open_source((mapped, torch.arange(200)))
    rows = np.array([199, 0, 5])
    x, y = source.batch(rows)
    assert torch.equal(x, torch.from_numpy(array[rows].astype("=i4")))
    assert y.tolist() == rows.tolist()
    x += 1  # a copy that may be written to
    assert source.schema()["0"] == {"dtype": ">i4", "shape": [3]}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "found data that can only be iterated, Endless; give the samples numbers"),
        (iter([1]), "found data that can only be iterated, list_iterator"),
        (DataLoader(Letters()), "found a DataLoader; return its dataset"),
        ([(1, 2)], "found a list; make it a tuple if it is one tensor a column"),
        (Subset(Letters(), []), "expected at least one sample, found an empty Subset"),
        (3, "found int"),
    ],
)
def test_what_holds_no_samples_by_number_is_refused_in_words(data: Any, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        open_source(data)
