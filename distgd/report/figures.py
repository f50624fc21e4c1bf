"""The pictures of a run. A function gives None where its run has nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from distgd.records import MOST_SERIES
from distgd.report.drawing import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    YELLOW,
    Look,
    draw_each,
    draw_lost,
    draw_marked,
    frame,
    legend,
    look,
    plain,
    ranges_widely,
    rows,
    stack,
)
from distgd.report.reading import Reading

if TYPE_CHECKING:
    from distgd.report.drawing import Figure

PHASES = {
    "compute": (BLUE, ""),
    "push": (ORANGE, "xx"),
    "wait": (SKY, ".."),
    "apply": (GREEN, "//"),
    "pull": (YELLOW, "\\\\"),
}
"""A worker's step, phase by phase, with color and hatching."""

MOST_PANELS = 4  # of evaluation metrics beside the loss
MOST_CURVES = 7  # of parameter groups


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its file, the words below it or in its place, and what draws it."""

    file: str
    heading: str
    caption: str
    absent: str
    draw: Callable[[Reading], Figure | None]


def convergence(run: Reading) -> Figure:
    """Loss in training and evaluation, and a panel for each other metric of an evaluation."""
    held_out = [name for name in run.curves if name.startswith("eval/") and name != "eval/loss"][:MOST_PANELS]
    figure, panels = stack(run.title, [1.5, *(1.0 for _ in held_out)], run.last.step)
    train, held = run.curve("train/loss"), run.curve("eval/loss")
    draw_each(panels[0], train, BLUE, "train")
    draw_marked(panels[0], held, Look(ORANGE, "o", "-"), "eval")
    draw_lost(panels[0], [*train.lost, *held.lost])
    frame(panels[0], "loss", [*train.lows, *train.highs, *held.means])
    legend(panels[0])
    for at, name in enumerate(held_out):
        curve, style = run.curves[name], look(at + 2)
        draw_marked(panels[at + 1], curve, style._replace(line="-"))
        draw_lost(panels[at + 1], curve.lost)
        panels[at + 1].margins(y=0.15)
        frame(panels[at + 1], plain(name.replace("/", " ", 1)), _scaled(curve.means))
        if len(curve):
            panels[at + 1].set_title(f"last {curve.means[-1]:.4g}", loc="right", fontsize="medium", color=style.color)
    return figure


def _scaled(values: Sequence[float]) -> Sequence[float]:
    """Values for `frame`; a share, such as an accuracy, is never for a log scale."""
    return values if not values or max(values) > 1 else [0.0, *values]


def learning_rate(run: Reading) -> Figure | None:
    """The learning rate of each parameter group."""
    names = [name for name in run.curves if name == "lr" or name.startswith("lr/")][:MOST_CURVES]
    if not names:
        return None
    figure, (panel,) = stack(run.title, [1.0], run.last.step)
    for at, name in enumerate(names):
        draw_marked(panel, run.curves[name], look(at)._replace(marker="." if run.last.step < 2 else ""), plain(name))
    falls_by_factors = run.key("schedule.name") in ("exponential", "step")
    rates = [value for name in names for value in run.curves[name].means]
    frame(panel, "learning rate", rates if falls_by_factors and ranges_widely(rates) else ())
    if len(names) > 1:
        legend(panel)
    return figure


def time_split(run: Reading) -> Figure | None:
    """Where a step's time goes: a bar a worker, or the range over workers where they are too many for bars."""
    parts = {part for parts in run.parts.values() for part in parts}
    workers = sorted((part for part in parts if part.startswith("worker_")), key=lambda part: int(part[7:]))
    if not parts:
        return None
    return _bars(run, workers) if 0 < len(workers) <= MOST_SERIES else _ranges(run, workers)


def _bars(run: Reading, workers: Sequence[str]) -> Figure:
    """A bar a worker, cut in phases."""
    spent = [split(run, worker) for worker in workers]
    figure, panel = rows(run.title, len(workers), f"time ({run.milliseconds} per step)")
    left = [0.0] * len(workers)
    for phase, (color, hatch) in PHASES.items():
        names, widths = [worker.replace("_", " ") for worker in workers], [each[phase] for each in spent]
        panel.barh(names, widths, 0.7, left, label=phase, color=color, hatch=hatch, edgecolor="white", linewidth=0.5)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    panel.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize="small")
    return figure


def split(run: Reading, part: str) -> dict[str, float]:
    """Milliseconds a step by phase. A worker waits while servers apply: that is counted once."""
    spent = {phase: run.spent(phase, part) for phase in PHASES}
    applied = spent["apply"] or run.spent("apply")
    return spent | {"apply": applied, "wait": max(0.0, spent["wait"] - applied)}


def _ranges(run: Reading, workers: Sequence[str]) -> Figure:
    """A line a phase, from the worker that spent least to the one that spent most, with the median.

    Without `workers` the run has logged these three itself, step by step.
    """
    spent = [split(run, part) for part in workers or ("min", "median", "max")]
    figure, panel = rows(run.title, len(PHASES), f"time ({run.milliseconds} per step)")
    for row, (phase, (color, _)) in enumerate(PHASES.items()):
        times = [each[phase] for each in spent]
        names = ("least and most of a worker", "median") if row == 0 else (None, None)
        ends = [min(times), max(times)]
        panel.plot(ends, [row, row], "|-", color=color, markersize=12, linewidth=2, label=names[0])
        panel.plot([median(times)], [row], "o", color=color, markersize=7, label=names[1])
    panel.set_yticks(range(len(PHASES)), list(PHASES))
    panel.set_ylim(len(PHASES) - 0.5, -0.5)
    panel.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def staleness(run: Reading) -> Figure | None:
    """Staleness of what was applied, and slots that a quorum left out; None where every gradient was fresh and used."""
    mean, largest, dropped = map(run.curve, ("staleness/mean", "staleness/max", "quorum/dropped_slots"))
    stale = any(largest.highs) or (len(mean) > 0 and run.key("consistency.mode") in ("bounded", "async"))
    if not stale and not len(dropped):
        return None
    figure, panels = stack(run.title, [1.0] * (stale + (len(dropped) > 0)), run.last.step)
    if stale:
        panels[0].plot(largest.steps, largest.highs, ":", color=ORANGE, linewidth=0.9, label="largest of a step")
        draw_each(panels[0], mean, BLUE, "mean of a step")
        frame(panels[0], "staleness (updates)")
        legend(panels[0])
    if len(dropped):
        draw_each(panels[-1], dropped, PURPLE)
        frame(panels[-1], "dropped (slots per step)")
    return figure


def throughput(run: Reading) -> Figure | None:
    """Samples a second, and the time between commits."""
    rate, between = run.curve("throughput/samples_per_s"), run.curve("time/step")
    if not len(rate) and not len(between):
        return None
    figure, panels = stack(run.title, [1.0, 1.0], run.last.step)
    draw_each(panels[0], rate, GREEN)
    frame(panels[0], f"samples / {run.clock}")
    draw_each(panels[1], between, BLUE)
    times = [*between.lows, *between.highs]
    frame(panels[1], f"time ({run.milliseconds} per step)", times if ranges_widely(times) else ())
    return figure


PICTURES = (
    Picture(
        "convergence.png",
        "Convergence",
        "Pale: each step, or the range of neighbouring steps in a long run. Dark: a running mean over a 50th of the "
        "run. Markers: evaluations on held-out data.",
        "",
        convergence,
    ),
    Picture(
        "throughput.png",
        "Throughput",
        "Samples applied a second over the last 20 steps, or half a second; and the time from one commit to the next.",
        "No step was committed.",
        throughput,
    ),
    Picture(
        "time.png",
        "Time of a step",
        "The mean over the run. A worker waits for others, for messages and for servers; the time in which servers "
        "apply is shown apart from that. A worker that takes no part in a step spends no time on it.",
        "No times on record.",
        time_split,
    ),
    Picture(
        "staleness.png",
        "Staleness",
        "How many updates the weights were ahead of those that a gradient was computed on, when it was applied.",
        "No gradient was stale: each was computed on the weights that it changed.",
        staleness,
    ),
    Picture(
        "learning-rate.png",
        "Learning rate",
        "The rate that the optimizer used at each step, by parameter group.",
        "No step was committed.",
        learning_rate,
    ),
)
