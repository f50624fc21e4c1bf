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


PICTURES = (
    ("speed-step.png", STEP, "Milliseconds a step over the number of parameters, 2 and 4 workers: distgd and DDP"),
    ("speed-alone.png", ALONE, "The same without the model, with Ray's documentation and the raw floor"),
)


def draw(outcomes: Sequence[Outcome], folder: Path) -> list[str]:
    """Pictures of the first two rows, as far as they have settings; links to them in markdown."""
    links = []
    for number, (file, names, told) in enumerate(PICTURES, start=1):
        for outcome in (each for each in outcomes if each.number == number and each.settings):
            over_sizes(outcome.settings, names, folder / file)
            links.append(f"![{told}](img/{file})")
    return links


def over_sizes(settings: Settings, names: Mapping[str, str], out: Path) -> None:
    """Milliseconds over parameters, a panel for each number of workers."""

    def figure() -> Figure:
        workers = sorted({setting["W"] for setting in settings})
        made, panels = drawing.beside(len(workers), 1.3 * drawing.WIDTH, 3.4)
        for panel, count in zip(panels, workers, strict=True):
            _panel(panel, [setting for setting in settings if setting["W"] == count], names)
            panel.set_title(f"{count} workers", loc="left", fontsize=9)
        panels[0].set_ylabel("ms a step")
        panels[0].legend(frameon=False, fontsize="small", loc="upper left")
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
