"""The live line of a run, and its plain-text form where the stream is no terminal.

`Progress` sees the same events as a tracker, and `{"event": "start", "headline": str}` before them. On a terminal one
line is drawn again in place, at most ten times a second of events; elsewhere at most about `LINES` lines a run are
written: the first step, evaluations, and the end. It reads no clock (time is `event["seconds"]`) and never raises: a
stream that cannot be written, such as a closed pipe, is left alone from then on.

    step 120/500  loss 0.4321  eval loss 0.3920  accuracy 0.953  12,345 samples/s  staleness 0.4  left 0:12
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.live import Live

LINES = 20

REDRAW_SECONDS = 0.1

SHOWN = {
    "train/loss": "loss {:.4f}",
    "eval/loss": "eval loss {:.4f}",
    "eval/accuracy": "accuracy {:.3f}",
    "throughput/samples_per_s": "{:,.0f} samples/s",
    "staleness/mean": "staleness {:.1f}",
    "lr": "lr {:.3g}",
}
"""What the line shows of the newest metrics, in this order."""


class Progress:
    """Call it with every event of a run, then `close` it.

    Args:
        stream: where to write; a terminal gets the live line.
        steps: how many steps are planned; None shows no time left.

    >>> import sys
    >>> progress = Progress(sys.stdout, steps=2)
    >>> progress({"event": "step", "step": 1, "seconds": 0.5, "metrics": {"train/loss": 2.0}})
    step 1/2  loss 2.0000
    """

    def __init__(self, stream: TextIO, steps: int | None) -> None:
        self._stream = stream
        self._line = _Line(steps)
        self._pace = _Pace(steps)
        self._live: Live | None = None
        self._terminal = stream.isatty()
        self._drawn = -math.inf
        self._broken = False
        self._written = ""

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self._broken:
            return
        try:
            self._show(event)
        except (OSError, ValueError):  # a closed pipe, a closed file
            self._broken = True

    def close(self) -> None:
        """Leave the last line as it stands and give the terminal back. May be called twice."""
        live, self._live = self._live, None
        if live is None:
            return
        try:
            live.stop()
        except (OSError, ValueError):
            self._broken = True

    def _show(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "start":
            self._write(event["headline"])
            return
        if event["event"] in ("fault", "joined", "shares", "injected"):
            self._write(f"{event['event']} at step {event['step']}: {event['message']}")
            return
        self._line.take(event)
        if not event["step"]:
            return
        if self._terminal:
            self._draw(event)
        elif self._pace.due(event):
            self._write(str(self._line))

    def _write(self, line: str) -> None:
        if line == self._written:
            return
        self._written = line
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _draw(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["seconds"] < self._drawn + REDRAW_SECONDS:
            return
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        self._drawn = event["seconds"]
        self._live.update(Text(str(self._line), overflow="ellipsis", no_wrap=True), refresh=True)


class _Line:
    """The newest value of everything that is shown."""

    def __init__(self, steps: int | None) -> None:
        self._steps = steps
        self._step = 0
        self._seconds = 0.0
        self._first: tuple[int, float] | None = None
        self._metrics: dict[str, float] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        self._metrics.update(event["metrics"])
        if event["step"] > self._step:
            self._step, self._seconds = event["step"], event["seconds"]
            self._first = self._first or (self._step, self._seconds)

    def __str__(self) -> str:
        step = f"step {self._step}" + (f"/{self._steps}" if self._steps else "")
        shown = [form.format(self._metrics[name]) for name, form in SHOWN.items() if name in self._metrics]
        return "  ".join([step, *shown, *self._left()])

    def _left(self) -> list[str]:
        """The time left at the mean speed since the first step: what came before it was start-up."""
        if not self._steps or not self._first or not self._first[0] < self._step < self._steps:
            return []
        step, seconds = self._first
        left = (self._seconds - seconds) / (self._step - step) * (self._steps - self._step)
        return [f"left {_clock(left)}"]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Pace:
    """Which events get a line of plain text.

    The first step and the end always do, the last step never; an evaluation does if a `LINES`-th of the run has passed
    since the last line, a step if two have, so that a run without evaluations is not silent. Where the number of steps
    is not known, the run's length so far stands for it, and lines get rarer as it goes on.
    """

    def __init__(self, steps: int | None) -> None:
        self._steps = steps
        self._last = 0

    def due(self, event: Mapping[str, Any]) -> bool:
        if event["event"] == "step" and event["step"] == self._steps:
            return False  # the end follows, with the last evaluation
        share = (self._steps or 4 * event["step"]) / LINES
        gap = {"eval": share, "step": 2 * share}.get(event["event"], 0.0)
        if self._last and event["step"] - self._last < gap:
            return False
        self._last = event["step"]
        return True
