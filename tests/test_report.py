"""The convergence figure is drawn from any run's file, in any state, and shows what is in it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distgd.report import convergence_figure


def run(steps: int = 300, every: int = 30, **evals: float) -> list[dict[str, Any]]:
    """The events of a run whose loss falls from 2.3 to 0.1 with noise."""
    events = []
    for step in range(1, steps + 1):
        loss = 2.2 * math.exp(-step / 60) + 0.1 * (1.2 + math.sin(7.0 * step))
        events.append({"event": "step", "step": step, "metrics": {"train/loss": loss}})
        if evals and step % every == 0:
            metrics = {f"eval/{name}": value * (1 - math.exp(-step / 60)) for name, value in evals.items()}
            events.append({"event": "eval", "step": step, "metrics": metrics})
    return events


def draw(folder: Path, events: list[dict[str, Any]], tail: str = "") -> Image.Image:
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    out = convergence_figure(file, folder / "report" / "convergence.png", "digits, sync, 2 workers, 4 slots")
    assert out == folder / "report" / "convergence.png"
    return Image.open(out).convert("RGB")


def pixels(image: Image.Image, color: str) -> int:
    """How many pixels of this very color there are."""
    wanted = tuple(bytes.fromhex(color[1:]))
    return sum(count for count, found in image.getcolors(1 << 24) or [] if found == wanted)


BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def test_each_curve_that_is_there_is_drawn(tmp_path: Path) -> None:
    image = draw(tmp_path, run(accuracy=0.97, loss=0.4))
    assert min(pixels(image, color) for color in (BLUE, ORANGE, GREEN)) > 100
    assert image.width >= 1000


def test_a_run_without_evaluations_has_one_panel(tmp_path: Path) -> None:
    image = draw(tmp_path, run())
    assert pixels(image, BLUE) > 100 and pixels(image, ORANGE) == pixels(image, GREEN) == 0
    assert image.height < draw(tmp_path, run(accuracy=0.9)).height


@pytest.mark.parametrize("events", [[], run(1), run(1, 1, loss=1.0, accuracy=1.0)], ids=["none", "step", "eval"])
def test_a_short_run_is_drawn(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    assert draw(tmp_path, events).width >= 1000


def test_a_diverged_and_killed_run_is_drawn_up_to_there(tmp_path: Path) -> None:
    lost = {"event": "step", "step": 301, "metrics": {"train/loss": "NaN"}}
    broken = draw(tmp_path, [*run(), lost], tail='{"event": "step", "st')
    assert broken.tobytes() == draw(tmp_path, run()).tobytes()


def test_importing_report_does_not_import_matplotlib() -> None:
    code = "import sys, distgd.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
