"""Pictures of a run, drawn from its run folder. matplotlib is imported when one is drawn.

Colors are Okabe and Ito's (Color Universal Design, 2008), which people with any color vision can tell apart; curves
differ in marker and place as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"

LOG_FROM = 20.0
"""A loss whose largest value is this many times its smallest is drawn on a log scale."""

Curve = tuple[list[int], list[float]]


def convergence_figure(metrics_jsonl: Path, out: Path, title: str) -> Path:
    """Draw train and eval loss, and the eval accuracy where there is one, against steps.

    The train loss is drawn as it is, thin, and as a running mean over a 50th of the run. Values that are not finite are
    left out. A last line that a killed run left unfinished is skipped.

    Args:
        metrics_jsonl: the run's `metrics.jsonl`; without any events the axes stay empty.
        out: the PNG to write; its folder is made.
    """
    from matplotlib.figure import Figure

    events = _events(metrics_jsonl)
    train, loss = _curve(events, "train/loss"), _curve(events, "eval/loss")
    accuracy = _curve(events, "eval/accuracy")
    panels = 2 if accuracy[0] else 1
    figure = Figure(figsize=(8, 3.2 + 2.2 * (panels - 1)), dpi=150, layout="constrained")
    axes = figure.subplots(panels, sharex=True, squeeze=False, height_ratios=[3, 2][:panels])[:, 0]
    _draw_loss(axes[0], train, loss)
    if accuracy[0]:
        _draw_accuracy(axes[1], accuracy)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes[-1].set_xlabel("step")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def _events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _curve(events: Sequence[dict[str, Any]], name: str) -> Curve:
    """Steps and values of one metric, in order, the finite ones."""
    points = [(event["step"], float(event["metrics"][name])) for event in events if name in event["metrics"]]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over `window` values around each, an even one counted as the next odd; fewer at the ends.

    >>> _running_mean([1.0, 2.0, 6.0], 3)
    [1.5, 3.0, 4.0]
    """
    count, half = len(values), window // 2
    sums = [0.0, *accumulate(values)]
    ranges = ((max(0, at - half), min(count, at + half + 1)) for at in range(count))
    return [(sums[end] - sums[start]) / (end - start) for start, end in ranges]


def _draw_loss(axes: Axes, train: Curve, held_out: Curve) -> None:
    steps, values = train
    smooth = _running_mean(values, len(values) // 50)
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smooth, color=BLUE, linewidth=1.8, label="train")
    if held_out[0]:
        axes.plot(*held_out, color=ORANGE, linewidth=1.4, marker="o", markersize=4, label="eval")
    every = [*values, *held_out[1]]
    if every and min(every) > 0 and max(every) > LOG_FROM * min(every):
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    if every:
        # Above the axes, where no curve runs.
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
    _quiet(axes)


def _draw_accuracy(axes: Axes, accuracy: Curve) -> None:
    steps, values = accuracy
    axes.plot(steps, values, color=GREEN, linewidth=1.4, marker="s", markersize=4)
    axes.set_title(f"last {values[-1]:.3f}", loc="right", fontsize="medium", color=GREEN)
    axes.set_ylabel("eval accuracy")
    axes.margins(y=0.15)
    _quiet(axes)


def _quiet(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
