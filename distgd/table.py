"""A CSV file as columns of text in memory, and the line of the file that a value stands on.

Everything is read as text, by one thread: a column's type is the caller's matter, and nothing depends on the order in
which threads finish. Spaces around a value do not count. The file is read again to find the line of an error, never
else. Compressed files (`.gz`, `.bz2`, `.zst`) are read as they are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from distgd.config import Csv
from distgd.errors import BadInput

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]

LARGEST = 1e150
"""Numbers up to this have a finite square; a mean and a standard deviation need that."""

MOST_NAMED = 20


@dataclass(frozen=True)
class CsvFile:
    """A file and the way in which it is read.

    Args:
        key: the config's key that holds the path, for messages.
        skip_rows: lines before the names, or before the data where `form.columns` are given.
    """

    path: Path
    form: Csv
    key: str
    skip_rows: int

    def table(self) -> Table:
        """Read it.

        Raises:
            BadInput: no file, no text, no rows, a row with more or fewer values than there are names, or names that do
                not fit; with the file and the line.
        """
        import pyarrow as pa

        try:
            with self.path.open("rb"):
                columns = self._columns()
        except OSError as error:
            do = f"{error.strerror}; correct {self.key}" if error.strerror else f"correct {self.key}"
            raise BadInput.at(self.key, "a CSV file that can be read", str(self.path), do) from error
        except pa.ArrowInvalid as error:
            raise self._reason(error) from error
        rows = len(next(iter(columns.values())))
        if not rows:
            raise BadInput.at(str(self.path), "at least one row of data", 0, f"fill the file or correct {self.key}")
        return Table(self, columns, np.arange(rows))

    def line_of(self, row: int) -> int | None:
        """The line, from 1, on which a row of data, from 0, begins; None where the file has no such row any more."""
        first = 0 if self.form.columns else 1
        for place, (line, _) in enumerate(self._records()):
            if place == row + first:
                return line
        return None

    def _columns(self) -> dict[str, Any]:
        from pyarrow import csv as arrow_csv
        from pyarrow import large_string

        read = arrow_csv.ReadOptions(
            use_threads=False, skip_rows=self.skip_rows, column_names=list(self.form.columns or ())
        )
        parse = arrow_csv.ParseOptions(delimiter=self.form.delimiter, newlines_in_values=True)
        with arrow_csv.open_csv(self.path, read_options=read, parse_options=parse) as beginning:
            given = beginning.schema.names
        names = self._distinct([name.strip() for name in given])
        text = arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(given, large_string()), strings_can_be_null=False, null_values=[]
        )
        table = arrow_csv.read_csv(self.path, read_options=read, parse_options=parse, convert_options=text)
        return {name: self._trimmed(column) for name, column in zip(names, table.columns, strict=True)}

    def _trimmed(self, column: Any) -> Any:
        import pyarrow as pa
        from pyarrow import compute

        values = compute.utf8_trim_whitespace(column.combine_chunks())
        markers = pa.array(self.form.missing, pa.large_string())
        return compute.if_else(compute.is_in(values, markers), pa.scalar(None, values.type), values)

    def _distinct(self, names: list[str]) -> list[str]:
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            do = "name the columns in data.csv.columns, and leave the line out with data.csv.skip_rows"
            raise BadInput.at(f"{self.path}, line of names", "each name once", twice, do)
        return names

    def _reason(self, error: Exception) -> BadInput:
        """Why pyarrow could not read it, with the line."""
        said = str(error)
        if "Empty CSV" in said or "skip initial" in said:
            do = f"fill the file or correct {self.key}"
            expected = f"data below {self.skip_rows} lines to leave out"
            return BadInput.described(str(self.path), expected, "too few lines", do)
        if "UTF8" in said:
            do = "convert it, for example with iconv -f latin1 -t utf-8"
            return BadInput.described(f"{self.path}, line {self._undecodable()}", "UTF-8 text", "other bytes", do)
        return self._ragged() or BadInput.described(
            str(self.path), "a CSV file", f"the error: {said}", "look at the file"
        )

    def _ragged(self) -> BadInput | None:
        """The first row whose values are not as many as the names."""
        width = len(self.form.columns or ())
        for place, (line, values) in enumerate(self._records()):
            width = width or len(values)
            if len(values) == width:
                continue
            if self.form.columns and not place:
                expected = f"{len(values)} names, as {self.path}, line {line} has so many values"
                do = "name each column, in order, or leave lines out that are no data with skip_rows"
                return BadInput.at("data.csv.columns", expected, width, do)
            do = "put values that hold the delimiter in double quotes, or correct data.csv.delimiter"
            return BadInput.at(f"{self.path}, line {line}", f"{width} values", len(values), do)
        return None

    def _undecodable(self) -> int | None:
        with self._stream() as stream:
            for line, text in enumerate(stream, 1):
                try:
                    text.encode("utf-8", errors="strict")
                except UnicodeEncodeError:
                    return line
        return None

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Line and values of each record, that of the names too; empty lines are none."""
        with self._stream() as stream:
            for _ in range(self.skip_rows):
                stream.readline()
            reader = csv.reader(stream, delimiter=self.form.delimiter)
            before = 0
            for values in reader:
                if values:
                    yield self.skip_rows + before + 1, values
                before = reader.line_num

    def _stream(self) -> io.TextIOWrapper:
        import pyarrow as pa

        # A byte that is no UTF-8 becomes a surrogate, which is not encoded again.
        source = pa.input_stream(str(self.path), compression="detect")
        return io.TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape", newline="")


@dataclass(frozen=True)
class Table:
    """Columns of a file, all of them or some rows.

    Args:
        columns: by name, pyarrow arrays of text, null where a value is missing.
        rows: for each row of the table its row in the file.
    """

    file: CsvFile
    columns: dict[str, Any]
    rows: Indices

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> str:
        """Its columns, for a message; the first ones of many."""
        names = list(self.columns)
        return ", ".join(names if len(names) <= MOST_NAMED else [*names[:MOST_NAMED], f"... {len(names)} in all"])

    def column(self, name: str) -> Column:
        """One of the columns.

        Raises:
            BadInput: there is none of that name.
        """
        if name not in self.columns:
            do = "correct the name, or the names in the file or in data.csv.columns"
            raise BadInput.described(str(self.file.path), f"a column {name}", self.names, do)
        return Column(name, self.columns[name], self)

    def take(self, rows: Indices) -> Table:
        """The table of these rows, in this order."""
        columns = {name: column.take(rows) for name, column in self.columns.items()}
        return replace(self, columns=columns, rows=self.rows[rows])


@dataclass(frozen=True)
class Column:
    """A named column of a table; `values` is a pyarrow array of text, null where a value is missing."""

    name: str
    values: Any
    table: Table

    def __len__(self) -> int:
        return len(self.values)

    def place(self, row: int | None = None) -> str:
        """Where the column is, or one of its values: file, line, column."""
        line = None if row is None else self.table.file.line_of(int(self.table.rows[row]))
        return f"{self.table.file.path}, " + (f"line {line}, " if line else "") + f"column {self.name}"

    def texts(self, rows: Sequence[int]) -> list[str | None]:
        """The values of these rows."""
        found: list[str | None] = self.values.take(np.asarray(rows, dtype=np.int64)).to_pylist()
        return found

    @cached_property
    def is_numeric(self) -> bool:
        """Whether every value that is not missing reads as a number, and there is one."""
        return self.values.null_count < len(self.values) and _cast(self.values) is not None

    def numbers(self) -> Numbers:
        """Its numbers in float64, NaN where a value is missing.

        Raises:
            BadInput: a value that is no number, or one that is not finite or above 1e150; with its line.
        """
        numbers: Numbers = _cast(self.values)
        if numbers is None:
            self._refuse(_first_unreadable(self.values), "a number")
        unusable = ~(np.abs(numbers) <= LARGEST) & self.values.is_valid().to_numpy(zero_copy_only=False)
        if unusable.any():
            self._refuse(int(unusable.argmax()), f"a finite number up to {LARGEST:g}")
        return numbers

    def categories(self) -> tuple[Indices, list[str]]:
        """For each row the place of its value in the list of the different ones; -1 where it is missing."""
        encoded = self.values.dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return codes, encoded.dictionary.to_pylist()

    def _refuse(self, row: int, expected: str) -> NoReturn:
        do = "correct it, add it to data.csv.missing, or do not read the column as numbers"
        raise BadInput.at(self.place(row), expected, self.texts([row])[0], do)


def _cast(values: Any) -> Any:
    """Text as float64, NaN for null; None where a text is no number."""
    import pyarrow as pa

    try:
        return values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        return None


def _first_unreadable(values: Any) -> int:
    """The first row whose text is no number, found by halves; there is one."""
    start, stop = 0, len(values)
    while stop - start > 1:
        middle = (start + stop) // 2
        if _cast(values[start:middle]) is None:
            stop = middle
        else:
            start = middle
    return start
