"""What a proof is: rows, each a claim, what is demanded of it, and a function that measures it.

Every number comes from the run. An error in a row is a miss that says so, and the other rows go on. A full run is
written between two marks of docs/NAME.md, whose other text is written by hand, and as docs/NAME.json.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

BEGIN, END = "<!-- prove:begin -->", "<!-- prove:end -->"


@dataclass(frozen=True)
class Bench:
    """What a row works with: whether its short form is asked for, and an empty folder of its own, removed later."""

    quick: bool
    folder: Path


@dataclass(frozen=True)
class Measured:
    """What a row found, and whether that is what was demanded.

    `demanded` takes the place of the row's where the short form asks for something else.
    """

    found: str
    holds: bool
    conditions: str = ""
    demanded: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A row that was run; one row of the table."""

    number: int
    claim: str
    demanded: str
    measured: str
    verdict: Literal["pass", "MISS"]
    seconds: float
    conditions: str

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.number:>3}  {self.verdict}  {self.seconds:7.1f} s  {self.claim}",
            f"     demanded    {self.demanded}",
            f"     measured    {self.measured}",
        ]
        return "\n".join([*lines, *([f"     conditions  {self.conditions}"] if self.conditions else [])])

    def cells(self) -> str:
        """A line of a markdown table."""
        values = [self.number, self.claim, self.demanded, self.measured, self.verdict, f"{self.seconds:.1f}"]
        return "| " + " | ".join(str(v).replace("|", "\\|") for v in [*values, self.conditions]) + " |"


@dataclass(frozen=True)
class Row:
    """A claim and the function that measures it."""

    number: int
    claim: str
    demanded: str
    measure: Callable[[Bench], Measured]

    def run(self, *, quick: bool) -> Outcome:
        """Measure in a folder of its own; whatever the row raises is a miss."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="prove-") as folder:
            try:
                measured = self.measure(Bench(quick, Path(folder)))
            except Exception as error:  # noqa: BLE001 - the other rows go on
                traceback.print_exc()
                measured = Measured(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", holds=False)
        return Outcome(
            self.number,
            self.claim,
            measured.demanded or self.demanded,
            measured.found,
            "pass" if measured.holds else "MISS",
            round(time.perf_counter() - began, 1),
            "; ".join(filter(None, [measured.conditions, "quick" if quick else ""])),
        )


class Proof:
    """Rows in the order in which they are written.

    >>> proof = Proof()
    >>> @proof.row("2")
    ... def sums(bench: Bench) -> Measured:
    ...     '''One and one is two.'''
    ...     return Measured(str(1 + 1), 1 + 1 == 2)
    >>> proof.rows[0].run(quick=True).verdict
    'pass'
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []

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

    def write(self, name: str, outcomes: Sequence[Outcome]) -> None:
        """Put the table between the marks, and the same rows into the JSON file beside the page."""
        facts = machine()
        told = ", ".join(f"{key} {value}" for key, value in facts.items())
        header = ["#", "claim", "demanded", "measured", "verdict", "seconds", "conditions"]
        lines = [
            f"Written by `scripts/prove {name}`; {told}.",
            "",
            f"| {' | '.join(header)} |",
            f"|{'---|' * len(header)}",
            *(outcome.cells() for outcome in outcomes),
        ]
        table = "\n".join(lines)
        self.path.write_text(f"{self._before}\n{table}\n{self._after}", encoding="utf-8")
        record = {"proof": name, "machine": facts, "rows": [asdict(outcome) for outcome in outcomes]}
        self.path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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
