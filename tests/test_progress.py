"""The line says what there is to say, at most so often, and never raises."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest

from distgd.progress import LINES, Progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def event(step: int, kind: str = "step", **more: float) -> dict[str, Any]:
    metrics = {"train/loss": 2.0 / step, "throughput/samples_per_s": 12345.0, "staleness/mean": 0.5, "lr": 1e-3}
    return {"event": kind, "step": step, "seconds": 5.0 + step / 10, "metrics": more or metrics}


def run(stream: io.StringIO, steps: int, evals: int, planned: bool = True) -> list[str]:
    progress = Progress(stream, steps if planned else None)
    progress({"event": "start", "headline": "digits, sync, 2 workers"})
    for step in range(1, steps + 1):
        progress(event(step))
        if evals and step % (steps // evals) == 0:
            progress(event(step, "eval", **{"eval/loss": 0.25, "eval/accuracy": 0.953}))
    progress(event(steps, "end"))
    progress.close()
    return stream.getvalue().splitlines()


def test_a_line_in_plain_text() -> None:
    headline, first, *_, last = run(io.StringIO(), steps=100, evals=5)
    assert headline == "digits, sync, 2 workers"
    assert first == "step 1/100  loss 2.0000  12,345 samples/s  staleness 0.5  lr 0.001"
    assert last == (
        "step 100/100  loss 0.0200  eval loss 0.2500  accuracy 0.953  12,345 samples/s  staleness 0.5  lr 0.001"
    )


@pytest.mark.parametrize("evals", [0, 1, 7, 20, 1000])
@pytest.mark.parametrize("steps", [1, 20, 1000, 33333])
@pytest.mark.parametrize("planned", [True, False])
def test_a_run_is_about_twenty_lines_and_never_silent(steps: int, evals: int, planned: bool) -> None:
    _, *lines = run(io.StringIO(), steps, min(steps, evals), planned)
    at = [int(line.split()[1].split("/")[0]) for line in lines]
    assert at[0] == 1 and at[-1] == steps
    assert len(at) <= (LINES + 2 if planned else 3 * LINES)
    assert all(after - before <= max(1, steps / 2) for before, after in pairwise(at))


def test_each_of_a_few_evaluations_has_its_line() -> None:
    _, *lines = run(io.StringIO(), steps=1000, evals=10)
    assert {f"step {step}/1000" for step in range(100, 1001, 100)} <= {line.split("  ")[0] for line in lines}


def test_the_time_left_leaves_out_the_start() -> None:
    stream = Terminal()
    progress = Progress(stream, steps=3600)
    progress({"event": "step", "step": 1, "seconds": 1000.0, "metrics": {}})
    progress({"event": "step", "step": 11, "seconds": 1010.0, "metrics": {}})
    progress.close()
    assert "left 59:49" in stream.getvalue()


def test_a_terminal_has_one_line_drawn_in_place() -> None:
    stream = Terminal()
    progress = Progress(stream, steps=1000)
    for step in range(1, 1001):
        progress({"event": "step", "step": step, "seconds": step / 1000, "metrics": {"train/loss": 1.0}})
    progress({"event": "end", "step": 1000, "seconds": 1.0, "metrics": {"train/loss": 0.5}})
    progress.close()
    progress.close()
    drawn = stream.getvalue()
    assert drawn.count("\n") == 1 and "step 1000/1000  loss 0.5000" in drawn
    assert drawn.count("step ") <= 15, "ten a second, the end, and the last one again when it closes"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_closed_stream_never_raises(kind: type[io.StringIO]) -> None:
    stream = kind()
    progress = Progress(stream, steps=3)
    progress(event(1))
    stream.close()
    progress(event(2, "eval"))
    progress(event(3, "end"))
    progress.close()


def test_a_loss_that_is_not_finite_is_shown() -> None:
    stream = io.StringIO()
    Progress(stream, steps=None)({**event(1), "metrics": {"train/loss": float("nan")}})
    assert stream.getvalue() == "step 1  loss nan\n"


def test_the_last_step_is_not_told_with_an_evaluation_of_another() -> None:
    stream = io.StringIO()
    progress = Progress(stream, steps=4)
    for step in range(1, 5):
        progress({"event": "step", "step": step, "seconds": step, "metrics": {"train/loss": 1.0}})
        progress({"event": "eval", "step": step, "seconds": step, "metrics": {"eval/loss": float(step)}})
    progress({"event": "end", "step": 4, "seconds": 5, "metrics": {}})
    (last,) = [line for line in stream.getvalue().splitlines() if line.startswith("step 4/4")]
    assert "eval loss 4.0000" in last
