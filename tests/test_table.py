"""CSV files: what is read, on which line it stands, and what is said about files that cannot be used."""

from __future__ import annotations

import csv
import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgd.config import Csv
from distgd.errors import BadInput
from distgd.table import CsvFile, Table


def read(path: Path, content: str | bytes, /, **form: Any) -> Table:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    made = Csv(**form)
    return CsvFile(path, made, "data.path", made.skip_rows).table()


def contents(table: Table) -> dict[str, list[str | None]]:
    return {name: table.column(name).texts(range(len(table))) for name in table.columns}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table") / "rows.csv"


values = st.text(alphabet='ab ,;"\n☃é.', max_size=6)


@given(rows=st.lists(st.tuples(values, values, values), min_size=1, max_size=8), delimiter=st.sampled_from(",;|"))
def test_what_is_written_is_read_on_the_line_where_it_begins(
    shared_path: Path, rows: list[tuple[str, ...]], delimiter: str
) -> None:
    lines, at = [], 1
    with shared_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow("xyz")
        for row in rows:
            at += 1
            lines.append(at)
            writer.writerow(row)
            at += sum(value.count("\n") for value in row)
    table = read(shared_path, shared_path.read_bytes(), delimiter=delimiter)
    columns = zip(*rows, strict=True)
    assert contents(table) == {
        name: [v.strip() or None for v in column] for name, column in zip("xyz", columns, strict=True)
    }
    assert [table.file.line_of(row) for row in range(len(rows))] == lines
    assert table.file.line_of(len(rows)) is None


@pytest.mark.parametrize(
    ("content", "form"),
    [
        ("x,y\n1,a\n2,b\n", {}),
        ("x , y\r\n1, a\r\n\r\n 2 ,b", {}),
        ("\ufeffx,y\n1,a\n2,b\n", {}),
        ("1,a\n2,b\n", {"columns": ["x", "y"]}),
        ("2,2,no,names\n1\ta\n2\tb\n", {"columns": ["x", "y"], "skip_rows": 1, "delimiter": "\t"}),
        ("made by hand\nx;y\n1;a\n2;b\n", {"skip_rows": 1, "delimiter": ";"}),
        (gzip.compress(b"x,y\n1,a\n2,b\n", mtime=0), {"gz": True}),
    ],
)
def test_the_forms_of_a_file(path: Path, content: str | bytes, form: dict[str, Any]) -> None:
    if form.pop("gz", False):
        path = path.with_suffix(".csv.gz")
    table = read(path, content, **form)
    assert contents(table) == {"x": ["1", "2"], "y": ["a", "b"]}
    lines = (path.read_text() if path.suffix != ".gz" else gzip.decompress(path.read_bytes()).decode()).splitlines()
    for row, value in enumerate("12"):
        assert lines[(table.file.line_of(row) or 0) - 1].strip().startswith(value)


def test_missing_values_are_those_that_are_named(path: Path) -> None:
    content = "x,y\n ?,NA\n,?\nNA, - \n"
    assert contents(read(path, content)) == {"x": [None, None, "NA"], "y": ["NA", None, "-"]}
    assert contents(read(path, content, missing=["NA", "-"])) == {"x": ["?", "", None], "y": [None, "?", None]}


def test_a_file_of_many_blocks_keeps_its_order(path: Path) -> None:
    rows = 120_000  # more than a megabyte, which is what is read at once
    table = read(path, "x,y\n" + "".join(f"{row},{row % 7} and so on\n" for row in range(rows)))
    assert np.array_equal(table.column("x").numbers(), np.arange(rows))
    assert len(table.column("y").categories()[1]) == 7


def test_rows_that_are_taken_know_their_lines(path: Path) -> None:
    table = read(path, "x\n" + "".join(f"{row}\n" for row in range(10)) + "bad\n")
    part = table.take(np.array([3, 10, 1]))
    assert part.column("x").texts([0, 1, 2]) == ["3", "bad", "1"]
    with pytest.raises(BadInput, match=r"rows\.csv, line 12, column x: expected a number, found 'bad'"):
        part.column("x").numbers()


@given(st.lists(st.none() | st.floats(-1e150, 1e150), min_size=1, max_size=20))
def test_numbers_are_read_to_the_last_bit(shared_path: Path, numbers: list[float | None]) -> None:
    text = "".join("?\n" if number is None else f"{number!r}\n" for number in numbers)
    column = read(shared_path, "x\n" + text).column("x")
    expected = [math.nan if number is None else number for number in numbers]
    assert np.array_equal(column.numbers(), expected, equal_nan=True)
    assert column.is_numeric == any(number is not None for number in numbers)


@given(st.integers(0, 40), st.sampled_from(["1x", "0x10", "1_000", "1,5", "nan", "inf", "-1e200"]))
def test_the_first_value_that_is_no_number_is_named_with_its_line(shared_path: Path, before: int, bad: str) -> None:
    good = "1.5\n" * before
    column = read(shared_path, f'x\n{good}"{bad}"\n2\n"{bad}"\n').column("x")
    with pytest.raises(BadInput) as refused:
        column.numbers()
    message = str(refused.value)
    assert f"rows.csv, line {before + 2}, column x: expected a " in message and f"found '{bad}'" in message


def test_categories_are_places_in_a_list_of_values(path: Path) -> None:
    codes, names = read(path, "x\nb\n a\n?\nb\n").column("x").categories()
    assert [names[code] if code >= 0 else None for code in codes] == ["b", "a", None, "b"]


BAD: list[tuple[str | bytes, dict[str, Any], list[str]]] = [
    ("", {}, ["rows.csv: expected data", "found too few lines"]),
    ("\n\n", {}, ["rows.csv: expected data"]),
    ("x,y\n1,2\n", {"skip_rows": 9}, ["rows.csv: expected data below 9 lines to leave out"]),
    ("x,y\n", {}, ["rows.csv: expected at least one row of data, found 0"]),
    ("x,y\n1,2\n\n1\n1,2\n", {}, ["rows.csv, line 4: expected 2 values, found 1", "double quotes"]),
    ('x,y\n"a\nb",2\n1,2,3\n', {}, ["rows.csv, line 4: expected 2 values, found 3"]),
    ("no\nx,y\n1,2\n1,2,3\n", {"skip_rows": 1}, ["rows.csv, line 4: expected 2 values, found 3"]),
    ("1,2,3\n1,2,3\n", {"columns": ["x", "y"]}, ["data.csv.columns: expected 3 names", "line 1", "found 2"]),
    ("1,2\n1\n", {"columns": ["x", "y"]}, ["rows.csv, line 2: expected 2 values, found 1"]),
    ("x,y, x\n1,2,3\n", {}, ["rows.csv, line of names: expected each name once, found ['x']", "skip_rows"]),
    (b"x,y\n1,a\n2,caf\xe9\n", {}, ["rows.csv, line 3: expected UTF-8 text", "iconv"]),
    (b"\x1f\x8b not", {"gz": True}, ["rows.csv.gz"]),
]


@pytest.mark.parametrize(("content", "form", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_file_is_refused_with_its_line(
    path: Path, content: str | bytes, form: dict[str, Any], words: list[str]
) -> None:
    if dict(form).pop("gz", False):
        path, form = path.with_suffix(".csv.gz"), {}
    with pytest.raises(BadInput) as refused:
        read(path, content, **form)
    message = str(refused.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for place, word in ((tmp_path / "none.csv", "No such file"), (tmp_path, "directory")):
        with pytest.raises(BadInput, match=rf"data\.held_out\.path: expected a CSV file.*{word}"):
            CsvFile(place, Csv(), "data.held_out.path", 0).table()


def test_a_column_that_is_not_there_is_refused_with_those_that_are(path: Path) -> None:
    with pytest.raises(BadInput, match=r"rows\.csv: expected a column z, found x, y"):
        read(path, "x,y\n1,2\n").column("z")
    wide = read(path, ",".join(f"c{place}" for place in range(100)) + "\n" + "1," * 99 + "1\n")
    with pytest.raises(BadInput, match=r"c18, c19, ... 100 in all;"):
        wide.column("z")
