"""The column that `tabular` predicts: labels or numbers, with their loss and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distgd.config import TargetColumn
from distgd.errors import BadInput
from distgd.features import Array, Standard
from distgd.table import Column


@dataclass(frozen=True)
class Labels:
    """Classes, in the order of their numbers where all of them are numbers, else by name."""

    column: str
    trim: str
    names: tuple[str, ...]
    dtype: ClassVar[torch.dtype | None] = torch.int64

    @classmethod
    def fit(cls, column: Column, trim: str) -> Labels:
        """The labels of the training rows.

        Raises:
            BadInput: a label is missing, or there are fewer than two.
        """
        codes, texts = column.categories()
        _refuse_missing(column, codes < 0)
        names = sorted({text.rstrip(trim) for text in texts}, key=lambda name: (len(name), name))
        if not column.is_numeric:
            names.sort()
        if len(names) < 2:
            raise BadInput.at(column.place(), "two labels or more", names, "correct data.target or the file")
        return cls(column.name, trim, tuple(names))

    @property
    def outputs(self) -> int:
        """Of the model: one a label."""
        return len(self.names)

    def encode(self, column: Column) -> Tensor:
        """The place of each row's label, int64.

        Raises:
            BadInput: a label is missing, or training has not seen it; with its line.
        """
        codes, texts = column.categories()
        _refuse_missing(column, codes < 0)
        places = {name: place for place, name in enumerate(self.names)}
        found = np.array([places.get(text.rstrip(self.trim), -1) for text in texts], dtype=np.int64)[codes]
        if (found < 0).any():
            row = int((found < 0).argmax())
            do = "correct the file, or set data.target.trim to what its labels end in"
            _refuse(column, row, f"a label of the training rows ({', '.join(self.names)})", do)
        return torch.from_numpy(found)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, nats a row."""
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`accuracy`: 1 or 0 a row."""
        return {"accuracy": (outputs.argmax(1) == targets).float()}

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {"column": self.column, "kind": "label", "labels": list(self.names), "trim": self.trim}


@dataclass(frozen=True)
class Amounts:
    """Numbers, standardized for the model; metrics are in their own unit."""

    column: str
    standard: Standard
    dtype: ClassVar[torch.dtype | None] = None
    outputs: ClassVar[int] = 1

    @classmethod
    def fit(cls, column: Column) -> Amounts:
        """Mean and standard deviation of the training rows.

        Raises:
            BadInput: a value is missing or no number, or all are the same.
        """
        standard = Standard.of(_numbers(column))
        if not standard.std:
            do = "correct data.target or the file"
            raise BadInput.at(column.place(), "numbers that differ", standard.mean, do)
        return cls(column.name, standard)

    def encode(self, column: Column) -> Tensor:
        """Standardized, float64.

        Raises:
            BadInput: a value is missing or no number; with its line.
        """
        return torch.from_numpy(self.standard.apply(_numbers(column)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error in standard deviations."""
        return (outputs.squeeze(1) - targets).square().mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`mae` and `mse` in the column's unit and its square, a number a row, so that their means are exact."""
        errors = (outputs.squeeze(1) - targets).double() * self.standard.std
        return {"mae": errors.abs(), "mse": errors.square()}

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {"column": self.column, "kind": "number", "mean": self.standard.mean, "std": self.standard.std}


Target = Labels | Amounts


def fit_target(column: Column, said: TargetColumn) -> Target:
    """Labels or numbers, as is said or else as the column shows.

    Raises:
        BadInput: the column cannot be used so; or nothing is said about whole numbers, which may be either.
    """
    kind = said.kind or _kind(column)
    return Labels.fit(column, said.trim) if kind == "label" else Amounts.fit(column)


def _kind(column: Column) -> str:
    if not column.is_numeric:
        return "label"
    numbers = column.numbers()
    if (numbers % 1 == 0)[~np.isnan(numbers)].all():
        do = "set data.target.kind=label to classify, data.target.kind=number for regression"
        expected = f"label or number, as {column.name} holds whole numbers"
        raise BadInput.described("data.target.kind", expected, "null", do)
    return "number"


def _numbers(column: Column) -> Array:
    numbers = column.numbers()
    _refuse_missing(column, np.isnan(numbers))
    return numbers


def _refuse_missing(column: Column, missing: Array) -> None:
    if missing.any():
        row = int(missing.argmax())
        _refuse(column, row, "a value to predict", "remove the row or correct data.csv.missing")


def _refuse(column: Column, row: int, expected: str, do: str) -> NoReturn:
    raise BadInput.at(column.place(row), expected, column.texts([row])[0], do)
