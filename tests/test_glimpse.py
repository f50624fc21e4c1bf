"""Data that is other data in another process is seen by a few numbers, and machines may round."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from distgd.sources import Source, TensorSource, difference, glimpse, open_source

ROWS = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))


def seen(source: Source, seed: int = 0) -> Any:
    return glimpse(source.batch, len(source), seed)


@pytest.mark.parametrize(
    "other",
    [ROWS, ROWS * (1 + 1e-6), (ROWS * 255).round() / 255],
    ids=["the same", "other last bits", "another decoder"],
)
def test_the_same_data_is_alike_where_machines_round(other: torch.Tensor) -> None:
    assert difference(seen(TensorSource(ROWS)), seen(TensorSource(other))) is None


@pytest.mark.parametrize(
    "other",
    [torch.randn(40, 5, generator=torch.Generator().manual_seed(3)), ROWS.flip(0), ROWS.roll(1, 0), -ROWS],
    ids=["random", "backwards", "shifted", "negative"],
)
def test_other_data_of_the_same_shape_is_told_with_its_numbers(other: torch.Tensor) -> None:
    differs = difference(seen(TensorSource(ROWS)), seen(TensorSource(other)))
    assert differs is not None
    assert f"begins with {ROWS[0, 0]:.4g}, " in differs and f"with {other[0, 0]:.4g}, " in differs


def test_whole_numbers_are_compared_exactly_and_pixels_are_not() -> None:
    numbers = torch.arange(1000, 1040)
    assert difference(seen(TensorSource(numbers)), seen(TensorSource(numbers + 1)))
    pixels = torch.arange(100, 140, dtype=torch.uint8)
    assert difference(seen(TensorSource(pixels)), seen(TensorSource(pixels + 1))) is None


def test_what_is_not_finite_is_compared_too() -> None:
    holes = ROWS.clone()
    holes[0, 0] = float("nan")
    assert difference(seen(TensorSource(holes)), seen(TensorSource(holes))) is None
    assert difference(seen(TensorSource(holes)), seen(TensorSource(holes.flip(0))))


class Augmented(Dataset[Any]):
    """Samples with noise, from torch's own generator or from one that goes on by itself."""

    def __init__(self, generator: np.random.Generator | None = None) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        own = torch.randn(5) if self.generator is None else torch.from_numpy(self.generator.standard_normal(5))
        return ROWS[index] + own


def test_chance_in_a_sample_is_the_seeds() -> None:
    assert difference(seen(open_source(Augmented())), seen(open_source(Augmented()))) is None
    own = np.random.default_rng()
    assert difference(seen(open_source(Augmented(own))), seen(open_source(Augmented(own))))


def test_to_look_disturbs_nobodys_chance() -> None:
    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    seen(TensorSource(ROWS))
    assert torch.rand(()) == expected
