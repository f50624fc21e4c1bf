"""What pictures are made of: looks, panels, curves, and the PNG.

Colors are Okabe and Ito's (Color Universal Design, 2008), which people with any color vision can tell apart; curves
differ in marker or line as well. The only file that imports matplotlib, when something is drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from distgd.report.curves import Curve, Place, running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW, BLACK = "#56B4E9", "#E69F00", "#000000"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")

LOG_FROM = 20.0
"""Positive values of which the largest is this many times the smallest are drawn on a log scale."""

WIDTH, DPI = 6.4, 180  # inches, and pixels an inch: sharp at twice a page's 640 pixels
MOST_MARKERS = 40  # on one curve
LONGEST_TITLE = 80  # letters
FEW = 30  # points, each of which gets a marker


class Look(NamedTuple):
    """How a curve is told from others."""

    color: str
    marker: str
    line: str


def look(at: int) -> Look:
    """The look of curve number `at`: neighbours differ in color, marker and line, the first 28 in color or line."""
    return Look(COLORS[at % len(COLORS)], MARKERS[at % len(MARKERS)], LINES[(at + at // 28) % len(LINES)])


def save(draw: Callable[[], Figure | None], out: Path) -> bool:
    """Draw into a PNG, whatever style the process has set for its own figures; False where there is nothing to draw."""
    import matplotlib.style

    with matplotlib.style.context("default", after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script that the font lacks
        figure = draw()
        if figure is not None:
            figure.savefig(out, dpi=DPI)
    return figure is not None


def stack(title: str, heights: Sequence[float], last: int) -> tuple[Figure, Sequence[Axes]]:
    """Panels over one another that share the axis of steps, from 0 to the last one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 0.75 + 1.75 * sum(heights)), layout="constrained")
    panels = list(figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    entitle(figure, title)
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(0, 1.03 * max(last, 1))
    panels[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure, panels


def beside(count: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side that share the axis of values; the size is that of the figure, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def rows(title: str, count: int, label: str) -> tuple[Figure, Axes]:
    """A panel for rows of one quantity, which begins at 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.5 + 0.3 * count), layout="constrained")
    panel = figure.subplots()
    entitle(figure, title)
    panel.set_xlabel(label)
    panel.grid(axis="x", alpha=0.25, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def draw_each(panel: Axes, curve: Curve, color: str, label: str | None = None) -> None:
    """A metric of every step: pale as it is, dark its running mean."""
    if not len(curve):
        return
    if curve.width == 1:
        panel.plot(curve.steps, curve.means, color=color, alpha=0.3, linewidth=0.8)
    else:
        panel.fill_between(curve.steps, curve.lows, curve.highs, color=color, alpha=0.3, linewidth=0)
    panel.plot(curve.steps, running_mean(curve.means, len(curve) // 50), color=color, linewidth=1.7, label=label)
    if len(curve) <= FEW:  # a line alone would hardly be seen
        panel.plot(curve.steps, curve.means, ".", color=color)


def draw_marked(panel: Axes, curve: Curve, style: Look, label: str | None = None) -> None:
    """A metric of some steps, such as an evaluation's."""
    every = max(1, len(curve) // MOST_MARKERS)
    color, marker, line = style
    shape = {"color": color, "marker": marker, "linestyle": line, "markersize": 4.0, "linewidth": 1.4}
    if len(curve):
        panel.plot(curve.steps, curve.means, markevery=every, label=label, **shape)  # type: ignore[arg-type]


def draw_lost(panel: Axes, places: Iterable[Place]) -> None:
    """Crosses on the lower edge where values were not finite."""
    if steps := [place.step for place in places]:
        edge = panel.get_xaxis_transform()
        panel.plot(steps, [0.04] * len(steps), "x", color=BLACK, markersize=6, transform=edge, label="not finite")


def frame(panel: Axes, label: str, values: Sequence[float] = ()) -> None:
    """Name and scale a panel. Without `values` the scale is linear from 0, else what suits these."""
    if not values:
        panel.set_ylim(bottom=0)
    elif ranges_widely(values):
        panel.set_yscale("log")
    panel.set_ylabel(label)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def ranges_widely(values: Sequence[float]) -> bool:
    """Whether values are for a log scale."""
    return len(values) > 0 and min(values) > 0 and max(values) > LOG_FROM * min(values)


def legend(panel: Axes) -> None:
    """Above the axes, where no curve runs; nothing without named curves."""
    if panel.get_legend_handles_labels()[0]:
        panel.legend(
            frameon=False, ncols=4, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1
        )


def entitle(figure: Figure, title: str) -> None:
    """A line over the figure, shortened where it is long."""
    shown = title if len(title) < LONGEST_TITLE else title[: LONGEST_TITLE - 1] + "…"
    figure.suptitle(plain(shown), x=0.01, ha="left", fontsize=9, color="0.3")


def plain(text: str) -> str:
    """Text as it is: a dollar sign would begin mathematics."""
    return text.replace("$", r"\$")
