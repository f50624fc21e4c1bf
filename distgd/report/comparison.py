"""The picture of a comparison: one metric of several runs, against steps, samples and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distgd.report.curves import Curve, running_mean
from distgd.report.drawing import LINES, WIDTH, beside, frame, look, plain, ranges_widely

if TYPE_CHECKING:
    from distgd.report.drawing import Axes, Figure

PANELS = 2 * WIDTH  # inches for the three of them
MARKERS = 12  # on a curve, about
A_ROW = 4  # names in a row of the legend


def comparison(curves: Mapping[str, Curve], metric: str, clock: str, level: float | None) -> Figure:
    """One curve a run in three panels.

    Args:
        curves: the metric by run; a run has the same look in every picture, also where another one's curve is empty.
        clock: the unit of time.
        level: a target, drawn as a line.
    """
    figure, panels = beside(3, PANELS, 4.2 + 0.25 * (len(curves) // A_ROW))
    values = [value for curve in curves.values() for value in curve.means]
    axes = {"step": "step", "samples": "samples", "seconds": f"training time ({clock})"}
    for panel, (axis, label) in zip(panels, axes.items(), strict=True):
        for at, (name, curve) in enumerate(curves.items()):
            if len(curve):
                _draw(panel, name, at, curve, axis)
        if level is not None:
            panel.axhline(level, color="0.35", linewidth=1, linestyle=(0, (1, 2)), label="target")
        frame(panel, "", values if ranges_widely(values) else [0.0, *values])
        panel.set_xlabel(label)
        panel.locator_params(axis="x", nbins=6)
        panel.set_xlim(left=0)
    panels[0].set_ylabel(plain(metric.replace("/", " ", 1)))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=A_ROW, frameon=False)
    return figure


def _draw(panel: Axes, name: str, at: int, curve: Curve, axis: str) -> None:
    style = look(at)
    panel.plot(
        [getattr(place, axis) for place in curve.places],
        running_mean(curve.means, len(curve) // 50),
        color=style.color,
        linestyle=LINES[at % len(LINES)],
        marker=style.marker,
        markevery=max(1, len(curve) // MARKERS),
        markersize=5,
        linewidth=1.5,
        label=plain(name),
    )
