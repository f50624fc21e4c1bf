"""Columns to numbers: what is learnt from the training rows, and what it does to any rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distgd.config import Csv, Feature
from distgd.errors import BadInput
from distgd.features import BUCKETS, MOST_SEEN, Categorical, Features, Hashed, Numeric, Standard
from distgd.table import Column, CsvFile, Table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


def table(folder: Path, **columns: list[Any]) -> Table:
    rows = zip(*columns.values(), strict=True)
    path = folder / "rows.csv"
    lines = [",".join(columns), *(",".join("?" if v is None else str(v) for v in row) for row in rows)]
    path.write_text("\n".join(lines))
    return CsvFile(path, Csv(), "data.path", 0).table()


def column(folder: Path, *values: Any) -> Column:
    return table(folder, x=list(values)).column("x")


numbers = st.floats(-1e150, 1e150).filter(lambda x: x == 0 or abs(x) > 1e-150)


@given(st.lists(numbers, min_size=1, max_size=30), st.randoms())
def test_statistics_do_not_depend_on_the_order(values: list[float], chance: Any) -> None:
    shuffled = list(values)
    chance.shuffle(shuffled)
    assert Standard.of(np.array(values)) == Standard.of(np.array(shuffled))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(-100, 100))
def test_statistics_are_those_of_numpy_at_any_scale(values: list[float], exponent: float) -> None:
    scaled = np.array(values) * 10**exponent
    assume(np.std(values) > 1e-6 * np.abs(values).max())
    found = Standard.of(scaled)
    assert found.mean == pytest.approx(np.mean(scaled), rel=1e-9, abs=1e-12 * np.abs(scaled).max())
    assert found.std == pytest.approx(np.std(values) * 10**exponent, rel=1e-9)


@given(numbers, st.integers(1, 20), numbers)
def test_a_constant_becomes_zero_whatever_comes_later(value: float, rows: int, later: float) -> None:
    constant = Standard.of(np.full(rows, value))
    assert constant == Standard(value, 0.0)
    assert constant.apply(np.array([value, later])).tolist() == [0, 0]


def test_numbers_are_standardized_clipped_and_filled(folder: Path) -> None:
    seen = column(folder, 1, 3, None, 5)
    fitted = Numeric.fit(seen, Feature(kind="numeric"))
    std = math.sqrt(8 / 3)
    expected = [[-2 / std, 0], [0, 0], [0, 1], [2 / std, 0]]
    assert np.allclose(fitted.encode(seen), expected, rtol=1e-15)
    later = column(folder, 3 + 100 * std, None, 3 - 0.5 * std)
    clipped = Numeric.fit(seen, Feature(kind="numeric", clip=2, indicator=False))
    assert np.allclose(clipped.encode(later)[:, 0], [2, 0, -0.5], rtol=1e-12)
    filled = Numeric.fit(seen, Feature(kind="numeric", missing=5, indicator=False))
    assert np.allclose(filled.encode(later)[1], (5 - 3) / std)


@pytest.mark.parametrize(("said", "inputs"), [(None, (1, 2)), (False, (1, 1)), (True, (2, 2))])
def test_an_indicator_is_there_where_it_is_asked_for_or_needed(
    folder: Path, said: bool | None, inputs: tuple[int, int]
) -> None:
    whole, gappy = [1, 2, 3], [1, None, 3]
    for values, width in zip((whole, gappy), inputs, strict=True):
        fitted = Numeric.fit(column(folder, *values), Feature(indicator=said))
        assert fitted.encode(column(folder, *gappy)).shape == (3, width)


def test_the_vocabulary_goes_by_frequency_then_by_name(folder: Path) -> None:
    seen = column(folder, *"cbacbd", None, *"dd")
    fitted = Categorical.fit(seen, Feature())
    assert fitted.vocabulary == ("d", "b", "c", "a")
    assert fitted.encode(column(folder, "a", None, "e", "d"))[:, 0].tolist() == [5, 0, 1, 2]
    short = Categorical.fit(seen, Feature(size=2))
    assert (short.vocabulary, short.size) == (("d", "b"), 4)
    assert short.encode(column(folder, *"cb"))[:, 0].tolist() == [1, 3]


def test_no_vocabulary_is_larger_than_the_default(folder: Path) -> None:
    fitted = Categorical.fit(column(folder, *(f"v{row}" for row in range(MOST_SEEN + 5))), Feature())
    assert len(fitted.vocabulary) == MOST_SEEN


@given(st.lists(st.text("abcé", min_size=1), min_size=1, max_size=20), st.integers(1, 50))
def test_buckets_are_indices_that_depend_on_the_value_alone(folder: Path, values: list[str], buckets: int) -> None:
    hashed = Hashed(buckets)
    indices = hashed.encode(column(folder, *values, None))[:, 0]
    assert indices[-1] == 0
    assert indices[:-1].min() >= 1 and indices.max() < hashed.size
    alone = [hashed.encode(column(folder, value))[0, 0] for value in values]
    assert indices[:-1].tolist() == alone


def test_buckets_never_change(folder: Path) -> None:
    """SHA-256 of the text: a model that was trained with these indices needs the same ones for ever."""
    assert Hashed(1000).encode(column(folder, "Private", "é"))[:, 0].tolist() == [418, 52]


def test_columns_are_numbers_first_then_indices(folder: Path) -> None:
    rows = table(folder, job=["a", "b", "a"], age=[1, 2, None], town=["x", "y", "z"], n=[4, 5, 6])
    said = {"job": "auto", "age": "auto", "town": "hashed", "n": "categorical"}
    features = Features.fit([(rows.column(name), Feature.model_validate({"kind": k})) for name, k in said.items()])
    assert list(features.fitted) == ["age", "job", "town", "n"]
    assert (features.numbers, features.sizes) == (2, [4, 1 + BUCKETS, 5])
    encoded = features.encode({name: rows.column(name) for name in said})
    assert encoded.shape == (3, 5)
    assert encoded[:, 2].tolist() == [2, 3, 2]


@given(st.permutations(range(12)))
def test_what_is_learnt_does_not_depend_on_the_order_of_the_rows(folder: Path, order: list[int]) -> None:
    chance = np.random.RandomState(0)
    rows = table(folder, x=(chance.standard_normal(12) * 1e3).tolist(), y=list("aabbbcddeeef"))
    part = rows.take(np.array(order))

    def learnt(of: Table) -> dict[str, Any]:
        return Features.fit([(of.column(name), Feature()) for name in "xy"]).describe()

    assert learnt(rows) == learnt(part)


def test_what_was_learnt_is_plain_data_that_makes_the_same_numbers(folder: Path) -> None:
    rows = table(folder, x=[1.5, None, 0.1], y=["a", "b", "b"])
    features = Features.fit([(rows.column("x"), Feature(clip=0.5)), (rows.column("y"), Feature())])
    said = json.loads(json.dumps(features.describe()))
    x, y = said["x"], said["y"]
    for value, word, row in ((1.5, "a", 0), (None, "b", 1), (0.1, "b", 2)):
        z = ((x["missing"] if value is None else value) - x["mean"]) / x["std"]
        inputs = [min(max(z, -x["clip"]), x["clip"]), float(value is None), 2 + y["vocabulary"].index(word)]
        assert features.encode({"x": rows.column("x"), "y": rows.column("y")})[row].tolist() == inputs


def test_columns_that_cannot_be_used_as_is_said_are_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"rows\.csv, line 3, column x: expected a number, found 'old'"):
        Features.fit([(column(folder, 1, "old"), Feature(kind="numeric"))])
    for kind in ("auto", "numeric", "categorical"):
        said = Feature.model_validate({"kind": kind})
        with pytest.raises(BadInput, match=r"column x: expected at least one value.*found none; set data.features.x"):
            Features.fit([(column(folder, None, None), said)])
