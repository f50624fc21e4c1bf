"""The section `data`: where the data lies, how its files are read, and what becomes of its columns."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, Strict, field_validator, model_validator

from distgd.config.strict import Fraction, Positive, Section, Text, refuse

MOST_CATEGORIES = 2**24 - 2
"""Indices up to 2**24 are whole numbers in float32 too; two of them are for missing and unseen."""

Categories = Annotated[int, Field(ge=1, le=MOST_CATEGORIES)]
Character = Annotated[str, Field(pattern=r'^[^"\r\n]$', json_schema_extra={"expected": "one character"})]


class HeldOut(Section):
    """Data that is evaluated and not trained on: a file of its own, or a share of the one file."""

    path: Text | None = None
    """A file with the columns of data.path; null holds out a share of that one."""
    fraction: Fraction | None = None
    """The share of the rows that is held out; null is 0.2; only without a path."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides which rows are held out; run.seed does not."""
    skip_rows: Annotated[int, Field(ge=0)] | None = None
    """Lines before the data in the held-out file; null is as many as in data.csv.skip_rows."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.path is not None and self.fraction is not None:
            do = "remove one of them"
            refuse("data.held_out.fraction", "null with data.held_out.path", self.fraction, do)
        if self.path is None and self.skip_rows is not None:
            do = "set data.csv.skip_rows"
            refuse("data.held_out.skip_rows", "null without data.held_out.path", self.skip_rows, do)
        return self


class Csv(Section):
    """How a CSV file is read: UTF-8 text, values in double quotes where they hold the delimiter."""

    delimiter: Character = ","
    """Between two values; spaces around a value do not count."""
    columns: Annotated[tuple[Text, ...], Strict(False)] | None = None
    """The columns' names, where the file has no line for them; null reads them from the first line."""
    skip_rows: Annotated[int, Field(ge=0)] = 0
    """Lines to leave out before the names, or before the data where columns are given."""
    missing: Annotated[tuple[str, ...], Strict(False)] = ("", "?")
    """What stands for a missing value."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.columns is not None and (not self.columns or len(set(self.columns)) < len(self.columns)):
            do = "name every column of the file, in its order"
            refuse("data.csv.columns", "one name or more, each once", list(self.columns), do)
        return self


class TargetColumn(Section):
    """The column to predict. `target: income` is short for `target: {column: income}`."""

    model_config = ConfigDict(json_schema_extra={"short": "column"})

    column: Text | None = None
    """Its name."""
    kind: Literal["label", "number"] | None = None
    """label: classification; number: regression; null is label for text and number for fractions."""
    trim: str = ""
    """Characters to cut off the end of a label, such as the dot in "<=50K."."""


_KEYS_OF_KIND = {
    "auto": {"clip", "missing", "indicator", "size"},
    "numeric": {"clip", "missing", "indicator"},
    "categorical": {"size"},
    "hashed": {"buckets"},
    "drop": set[str](),
}


class Feature(Section):
    """What becomes of a column. `age: numeric` is short for `age: {kind: numeric}`."""

    model_config = ConfigDict(json_schema_extra={"short": "kind"})

    kind: Literal["auto", "numeric", "categorical", "hashed", "drop"] = "auto"
    """auto is numeric if every value is a number, else categorical; drop leaves the column out."""
    clip: Positive | None = None
    """Standard deviations from the mean beyond which a number is cut off; with numeric."""
    missing: float | None = None
    """The number in place of a missing one, in the column's own unit; null is the mean; with numeric."""
    indicator: bool | None = None
    """One more input, 1 where the number is missing; null is if any is in the training data; with numeric."""
    size: Categories | None = None
    """The most frequent values that are told apart, others are unseen; null is 10,000; with categorical."""
    buckets: Categories | None = None
    """Buckets into which values are hashed; null is 1,000; with hashed."""

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        for key, value in self:
            if key != "kind" and value is not None and key not in _KEYS_OF_KIND[self.kind]:
                known = ", ".join(sorted(_KEYS_OF_KIND[self.kind])) or "no key"
                refuse("", f"{known} beside kind: {self.kind}", {key: value}, "remove it or change the kind")
        return self


class Data(Section):
    """Where the data lies, and what becomes of the columns of a table."""

    path: Text | None = None
    """A file or a folder for tasks that read one; null is the task's own data."""
    held_out: HeldOut = HeldOut()
    """Data that is not trained on."""
    csv: Csv = Csv()
    """How a CSV file is read."""
    target: TargetColumn = TargetColumn()
    """The column to predict."""
    features: Annotated[dict[str, Feature] | None, Field(json_schema_extra={"each": "COLUMN"})] = None
    """Columns, or patterns such as cap-*, and what becomes of them; others are left out; null is {"*": auto}."""

    @field_validator("target", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"column": given} if isinstance(given, str) else given

    @field_validator("features", mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: {"kind": value} if isinstance(value, str) else value for name, value in given.items()}

    def feature(self, column: str) -> Feature | None:
        """What is said about a column: under its own name, else under the first pattern that it matches."""
        if self.features is None:
            return Feature()
        if column in self.features:
            return self.features[column]
        return next((said for name, said in self.features.items() if fnmatchcase(column, name)), None)

    def absolute(self) -> Data:
        """The same with paths that do not depend on the current folder."""
        held_out = self.held_out.model_copy(update={"path": _absolute(self.held_out.path)})
        return self.model_copy(update={"path": _absolute(self.path), "held_out": held_out})


def _absolute(path: str | None) -> str | None:
    return path and str(Path(path).absolute())
