"""What a proof is: rows, each a claim, what is demanded of it, and a function that measures it.

Every number comes from the run. An error in a row is a miss that says so, and the other rows go on. A full run is
written between two marks of docs/NAME.md, whose other text is written by hand, and as docs/NAME.json. A row that was
measured in several settings may have a line for each; these become a table of their own below.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

BEGIN, END = "<!-- prove:begin -->", "<!-- prove:end -->"


class Skipped(Exception):
    """A row cannot be measured on this machine; the message says why, and it is no miss."""


@dataclass(frozen=True)
class Bench:
    """What a row works with: whether its short form is asked for, and an empty folder of its own, removed later."""

    quick: bool
    folder: Path


@dataclass(frozen=True)
class Measured:
    """What a row found, and whether that is what was demanded.

    `demanded` takes the place of the row's where the short form asks for something else. `settings` has a line for each
    setting that was measured: words and numbers by name, the same names in each.
    """

    found: str
    holds: bool
    conditions: str = ""
    demanded: str | None = None
    settings: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Outcome:
    """A row that was run; one row of the table."""

    number: int
    claim: str
    demanded: str
    measured: str
    verdict: Literal["pass", "MISS", "skip"]
    seconds: float
    conditions: str
    settings: Sequence[Mapping[str, Any]] = ()
    machine: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.number:>3}  {self.verdict}  {self.seconds:7.1f} s  {self.claim}",
            f"     demanded    {self.demanded}",
            f"     measured    {self.measured}",
        ]
        lines += [f"     conditions  {self.conditions}"] if self.conditions else []
        each = (", ".join(f"{name} {shown(value)}" for name, value in setting.items()) for setting in self.settings)
        return "\n".join([*lines, *(f"       {setting}" for setting in each)])

    def cells(self) -> str:
        """A line of a markdown table."""
        values = [self.number, self.claim, self.demanded, self.measured, self.verdict, f"{self.seconds:.1f}"]
        return _line([*values, self.conditions])

    def table(self) -> list[str]:
        """The settings as a markdown table with a line above it; nothing where there are none."""
        if not self.settings:
            return []
        names = list(self.settings[0])
        body = [_line([shown(setting[name]) for name in names]) for setting in self.settings]
        return ["", f"Row {self.number} in each setting:", "", *_header(names), *body]


def shown(value: object) -> str:
    """A number with three digits that count, anything else as it is.

    >>> shown(0.012345), shown(1234.5), shown(7), shown("text")
    ('0.0123', '1,234', '7', 'text')
    """
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _header(names: Sequence[str]) -> list[str]:
    return [_line(names), f"|{'---|' * len(names)}"]


def _line(values: Sequence[object]) -> str:
    return "| " + " | ".join(str(value).replace("|", "\\|") for value in values) + " |"


@dataclass(frozen=True)
class Row:
    """A claim and the function that measures it."""

    number: int
    claim: str
    demanded: str
    measure: Callable[[Bench], Measured]

    def run(self, *, quick: bool) -> Outcome:
        """Measure in a folder of its own; whatever the row raises is a miss, unless it was skipped."""
        began = time.perf_counter()
        verdict: Literal["pass", "MISS", "skip"] | None = None
        with tempfile.TemporaryDirectory(prefix="prove-") as folder:
            try:
                measured = self.measure(Bench(quick, Path(folder)))
            except Skipped as why:
                measured, verdict = Measured(f"not measured: {why}", holds=False), "skip"
            except Exception as error:  # noqa: BLE001 - the other rows go on
                traceback.print_exc()
                measured = Measured(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", holds=False)
        return Outcome(
            self.number,
            self.claim,
            measured.demanded or self.demanded,
            measured.found,
            verdict or ("pass" if measured.holds else "MISS"),
            round(time.perf_counter() - began, 1),
            "; ".join(filter(None, [measured.conditions, "quick" if quick else ""])),
            measured.settings,
            machine(),
        )


class Proof:
    """Rows in the order in which they are written, and what draws their pictures into a folder and gives links to them.

    >>> proof = Proof()
    >>> @proof.row("2")
    ... def sums(bench: Bench) -> Measured:
    ...     '''One and one is two.'''
    ...     return Measured(str(1 + 1), 1 + 1 == 2)
    >>> proof.rows[0].run(quick=True).verdict
    'pass'
    """

    def __init__(self, draw: Callable[[Sequence[Outcome], Path], list[str]] | None = None) -> None:
        self.rows: list[Row] = []
        self.draw = draw or (lambda outcomes, folder: [])

    def row(self, demanded: str) -> Callable[[Callable[[Bench], Measured]], Callable[[Bench], Measured]]:
        """Make a row of a function; its docstring is the claim."""

        def add(measure: Callable[[Bench], Measured]) -> Callable[[Bench], Measured]:
            claim = " ".join((inspect.getdoc(measure) or "").split()).removesuffix(".")
            self.rows.append(Row(len(self.rows) + 1, claim, demanded, measure))
            return measure

        return add

    def extend(self, other: Proof) -> None:
        """Put the rows of another proof behind these, numbered on."""
        self.rows += [replace(row, number=len(self.rows) + at) for at, row in enumerate(other.rows, start=1)]


class Page:
    """docs/NAME.md with its two marks, checked before hours are spent on a table that has no place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8")
        before, found, rest = text.partition(BEGIN)
        _, closed, after = rest.partition(END)
        if not (found and closed):
            raise ValueError(f"{path}: expected the marks {BEGIN} and {END}, found {found or 'none'} {closed}")
        self._before, self._after = before + BEGIN, END + after

    def merged(self, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> list[Outcome]:
        """These outcomes, and what the page has of other rows that make the same claims still."""
        record = self.path.with_suffix(".json")
        there = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"rows": []}
        former = [Outcome(**{"machine": there.get("machine", {}), **row}) for row in there["rows"]]
        claims = {row.number: (row.claim, row.demanded) for row in rows}
        by_number = {each.number: each for each in former if claims.get(each.number) == (each.claim, each.demanded)}
        by_number |= {each.number: each for each in outcomes}
        return [by_number[number] for number in sorted(by_number)]

    def write(self, name: str, outcomes: Sequence[Outcome], pictures: Sequence[str] = ()) -> None:
        """Put the table and links to pictures between the marks, and the rows into the JSON file beside the page."""
        header = ["#", "claim", "demanded", "measured", "verdict", "seconds", "conditions"]
        lines = [
            f"Written by `scripts/prove {name}`.",
            *_measured_on(outcomes),
            "",
            *_header(header),
            *(outcome.cells() for outcome in outcomes),
            *(line for link in pictures for line in ("", link)),
            *(line for outcome in outcomes for line in outcome.table()),
        ]
        table = "\n".join(lines)
        self.path.write_text(f"{self._before}\n{table}\n{self._after}", encoding="utf-8")
        record = {"proof": name, "rows": [asdict(outcome) for outcome in outcomes]}
        self.path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _measured_on(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each machine and day."""
    rows: dict[str, list[int]] = {}
    for outcome in outcomes:
        told = ", ".join(f"{key} {value}" for key, value in outcome.machine.items())
        rows.setdefault(told, []).append(outcome.number)
    if len(rows) < 2:
        return [f"Measured on: {told}." for told in rows]
    return [f"Rows {', '.join(map(str, numbers))}: {told}." for told, numbers in rows.items()]


def machine() -> dict[str, str]:
    """Date, hardware and versions on which a table was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": str(len(os.sched_getaffinity(0))),
        "CPU": _cpu(),
        **{name: version(name) for name in ("distgd", "torch", "ray", "mlflow")},
        "Python": platform.python_version(),
        "system": f"{sys.platform} {platform.release()}",
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
