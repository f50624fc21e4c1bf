"""Columns to numbers: what `data.features` says is fitted to the training data once, and then applied to any data.

Statistics are float64 and exact up to one rounding (`math.fsum`), so they depend neither on the order of the rows nor
on the machine. What was fitted is plain data (`describe`), from which the same numbers can be made elsewhere.

| kind | inputs | a missing value | a value that training has not seen |
|---|---|---|---|
| numeric | (x - mean) / std, clipped; 1 more with an indicator | the mean, or the number that is set | as any other |
| categorical | the index of its value, from 2 on | index 0 | index 1; so are those beyond `size` |
| hashed | 1 + hash(value) mod buckets | index 0 | as any other |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any, Protocol

import numpy as np

from distgd.config import Feature
from distgd.errors import BadInput

Array = np.ndarray[Any, Any]

MISSING, UNSEEN, FIRST_SEEN = 0, 1, 2
"""Indices of a categorical column."""
MOST_SEEN, BUCKETS = 10_000, 1_000
"""`size` and `buckets` where they are not set."""


class Column(Protocol):
    """Values with a name and a place; `distgd.table.Column` is one."""

    @property
    def name(self) -> str: ...
    @property
    def is_numeric(self) -> bool: ...
    def numbers(self) -> Array: ...
    def categories(self) -> tuple[Array, list[str]]: ...
    def place(self, row: int | None = None) -> str: ...


@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation (of the population) of numbers; a constant has the deviation 0."""

    mean: float
    std: float

    @classmethod
    def of(cls, numbers: Array) -> Standard:
        """Of at least one finite number, each below 1e150 in size."""
        if numbers.min() == numbers.max():  # a rounded mean would make a spread of nothing but rounding
            return cls(float(numbers[0]), 0.0)
        mean = fsum(numbers) / len(numbers)
        deviations = np.abs(numbers - mean)
        largest = float(deviations.max())  # divided by it no square vanishes
        return cls(mean, largest * sqrt(fsum((deviations / largest) ** 2) / len(numbers)))

    def apply(self, numbers: Array) -> Array:
        """(x - mean) / std; a constant tells nothing and becomes 0, also where it has another value later."""
        scaled: Array = (numbers - self.mean) / self.std if self.std else np.zeros_like(numbers)
        return scaled


@dataclass(frozen=True)
class Numeric:
    """A standardized column, cut off at `clip` standard deviations; `missing` is in the column's own unit."""

    standard: Standard
    clip: float | None
    missing: float
    indicator: bool

    @classmethod
    def fit(cls, column: Column, said: Feature) -> Numeric:
        """Statistics of the values that are not missing.

        Raises:
            BadInput: a value is no number, or all are missing.
        """
        numbers = column.numbers()
        present = numbers[~np.isnan(numbers)]
        if not len(present):
            raise _all_missing(column)
        standard = Standard.of(present)
        missing = standard.mean if said.missing is None else said.missing
        indicator = len(present) < len(numbers) if said.indicator is None else said.indicator
        return cls(standard, said.clip, missing, indicator)

    def encode(self, column: Column) -> Array:
        """float64 of shape (rows, 1), or (rows, 2) with an indicator."""
        numbers = column.numbers()
        absent = np.isnan(numbers)
        scaled = self.standard.apply(np.where(absent, self.missing, numbers))
        if self.clip is not None:
            scaled = scaled.clip(-self.clip, self.clip)
        return np.stack([scaled, absent.astype(np.float64)][: 1 + self.indicator], axis=1)

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": "numeric",
            "mean": self.standard.mean,
            "std": self.standard.std,
            "clip": self.clip,
            "missing": self.missing,
            "indicator": self.indicator,
        }


@dataclass(frozen=True)
class Categorical:
    """The values that are told apart, the most frequent first and by name where two are as frequent."""

    vocabulary: tuple[str, ...]

    @classmethod
    def fit(cls, column: Column, said: Feature) -> Categorical:
        """The `said.size` most frequent values.

        Raises:
            BadInput: all values are missing.
        """
        codes, names = column.categories()
        if not names:
            raise _all_missing(column)
        counts = np.bincount(codes[codes >= 0], minlength=len(names))
        ranked = sorted(zip((-counts).tolist(), names, strict=True))
        return cls(tuple(name for _, name in ranked[: said.size or MOST_SEEN]))

    @property
    def size(self) -> int:
        """Indices in all."""
        return FIRST_SEEN + len(self.vocabulary)

    def encode(self, column: Column) -> Array:
        """float64 of shape (rows, 1) that holds whole numbers: indices."""
        codes, names = column.categories()
        places = {name: FIRST_SEEN + place for place, name in enumerate(self.vocabulary)}
        return _looked_up(codes, [places.get(name, UNSEEN) for name in names])

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": "categorical", "vocabulary": list(self.vocabulary)}


@dataclass(frozen=True)
class Hashed:
    """Values in buckets, by SHA-256 of their text; nothing is fitted."""

    buckets: int

    @property
    def size(self) -> int:
        """Indices in all."""
        return 1 + self.buckets

    def encode(self, column: Column) -> Array:
        """float64 of shape (rows, 1) that holds whole numbers: indices."""
        codes, names = column.categories()
        return _looked_up(codes, [1 + _digest(name) % self.buckets for name in names])

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": "hashed", "buckets": self.buckets}


Fitted = Numeric | Categorical | Hashed


@dataclass(frozen=True)
class Features:
    """What was fitted, by column, in the order in which columns become inputs: numbers first, then indices."""

    fitted: Mapping[str, Fitted]

    @classmethod
    def fit(cls, columns: Sequence[tuple[Column, Feature]]) -> Features:
        """Fit each column as is said about it; none of them is `drop`.

        Raises:
            BadInput: a column cannot be used as is said.
        """
        fitted = {column.name: _fit(column, said) for column, said in columns}
        return cls(dict(sorted(fitted.items(), key=lambda item: not isinstance(item[1], Numeric))))

    @property
    def numbers(self) -> int:
        """Inputs that are numbers."""
        return sum(1 + each.indicator for each in self.fitted.values() if isinstance(each, Numeric))

    @property
    def sizes(self) -> list[int]:
        """For each input that is an index, how many indices there are."""
        return [each.size for each in self.fitted.values() if not isinstance(each, Numeric)]

    def encode(self, columns: Mapping[str, Column]) -> Array:
        """float64 of shape (rows, inputs)."""
        return np.concatenate([each.encode(columns[name]) for name, each in self.fitted.items()], axis=1)

    def describe(self) -> dict[str, Any]:
        """Plain data, by column."""
        return {name: each.describe() for name, each in self.fitted.items()}


def _fit(column: Column, said: Feature) -> Fitted:
    if said.kind == "hashed":
        return Hashed(said.buckets or BUCKETS)
    if said.kind == "numeric" or (said.kind == "auto" and column.is_numeric):
        return Numeric.fit(column, said)
    return Categorical.fit(column, said)


def _looked_up(codes: Array, indices: Sequence[int]) -> Array:
    table = np.array([*indices, MISSING], dtype=np.float64)  # the code of a missing value is -1
    looked_up: Array = table[codes][:, None]
    return looked_up


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _all_missing(column: Column) -> BadInput:
    do = f"set data.features.{column.name}=drop, or correct data.csv.missing"
    return BadInput.described(column.place(), "at least one value that is not missing", "none", do)
