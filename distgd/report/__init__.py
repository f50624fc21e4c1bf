"""A run as one page: what came out, its curves, where its time went, and what happened.

    reading    what the run folder says, in any state of the run
    curves     a metric over any number of steps, in bounded memory
    drawing    panels, curves and looks: what pictures are made of
    figures    the pictures of a run
    page       tables and pictures in one HTML file
    summary    what a run's page says

`write_report` makes `report/index.html` in the run folder, and its pictures as PNGs beside it, from the run folder
alone. The page is whole in itself: pictures are inside, nothing is fetched and no script runs.
"""

from __future__ import annotations

from pathlib import Path

from distgd.errors import BadInput
from distgd.report.drawing import save
from distgd.report.figures import PICTURES
from distgd.report.page import Figure, write
from distgd.report.reading import Reading, read
from distgd.report.summary import run_page

__all__ = ["write_report"]

PLACE = "report"


def write_report(run_dir: Path) -> Path:
    """Write the report of a run that is over, failed, or still going on; returns the page.

    A report that is there already is replaced. Time and size are bounded by the steps that were logged: pictures hold a
    few thousand points, and a run of 100,000 steps takes some seconds.

    Raises:
        BadInput: the report cannot be written there.
    """
    run = read(run_dir)
    out = run_dir / PLACE
    try:
        out.mkdir(parents=True, exist_ok=True)
        return write(run_page(run, _figures(run, out)), out / "index.html")
    except OSError as error:
        raise BadInput.at("RUN", "a run folder that can be written", str(run_dir), str(error.strerror)) from error


def _figures(run: Reading, out: Path) -> list[Figure]:
    drawn = []
    for picture in PICTURES:
        png = out / picture.file
        there = save(lambda draw=picture.draw: draw(run), png)  # type: ignore[misc]
        if not there:
            png.unlink(missing_ok=True)  # of an earlier report
        drawn.append(Figure(picture.heading, picture.caption if there else picture.absent, png if there else None))
    return drawn
