"""A page of tables and pictures in one HTML file: nothing is fetched, no script runs, and all text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distgd.report.drawing import WIDTH

PIXELS = round(100 * WIDTH)
"""How wide a figure is shown on a page, in a browser's pixels."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first cell of a row names it. `numbers` are columns that stand to the right."""

    heading: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    numbers: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG with the words around it; the words alone where there is no picture."""

    heading: str
    caption: str
    png: Path | None

    @property
    def data(self) -> str:
        """The PNG as text."""
        return base64.b64encode(self.png.read_bytes()).decode() if self.png else ""


@dataclass(frozen=True)
class Page:
    """What a page shows, from top to bottom.

    Args:
        mood: good, bad or open: the color of the status.
        facts: tables side by side where the window is wide enough.
        texts: named texts, folded away.
        width: of a figure, in a browser's pixels.
    """

    title: str
    lead: str
    status: str
    mood: str
    facts: Sequence[Table]
    figures: Sequence[Figure]
    tables: Sequence[Table]
    texts: Sequence[tuple[str, str]]
    footer: str
    width: int = PIXELS

    @property
    def narrowest(self) -> int:
        """How far a figure may shrink with the window."""
        return self.width * 7 // 10


def write(page: Page, out: Path) -> Path:
    """Write the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    out.write_text(templates.get_template("page.html").render(page=page), encoding="utf-8")
    return out
