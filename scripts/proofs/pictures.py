"""The pictures of docs/speed.md, drawn from what the rows measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distgd.report import drawing
from proofs.rows import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Settings = Sequence[Mapping[str, Any]]
STEP = {"ours ms": "distgd", "DDP ms": "DDP"}
ALONE = {"ours ms": "distgd", "DDP ms": "gloo and Adam", "Ray ms": "Ray's documentation", "floor ms": "raw floor"}


def draw(outcomes: Sequence[Outcome], folder: Path) -> None:
    """speed-step.png and speed-alone.png, where the first two rows have settings."""
    for outcome, file, names in zip(outcomes, ("speed-step.png", "speed-alone.png"), (STEP, ALONE), strict=False):
        if outcome.settings:
            over_sizes(outcome.settings, names, folder / file)


def over_sizes(settings: Settings, names: Mapping[str, str], out: Path) -> None:
    """Milliseconds over parameters, a panel for each number of workers."""

    def figure() -> Figure:
        workers = sorted({setting["W"] for setting in settings})
        made, panels = drawing.beside(len(workers), 2 * drawing.WIDTH / 1.5, 3.2)
        for panel, count in zip(panels, workers, strict=True):
            _panel(panel, [setting for setting in settings if setting["W"] == count], names)
            panel.set_title(f"{count} workers", loc="left", fontsize=9)
        panels[0].set_ylabel("ms a step")
        drawing.legend(panels[-1])
        return made

    drawing.save(figure, out)


def _panel(panel: Axes, settings: Settings, names: Mapping[str, str]) -> None:
    sizes = [setting["P"] for setting in settings]
    for at, (key, name) in enumerate(names.items()):
        color, marker, line = drawing.look(at)
        panel.plot(
            sizes, [setting[key] for setting in settings], color=color, marker=marker, linestyle=line, label=name
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("parameters")
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
