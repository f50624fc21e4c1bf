"""What a run's page says in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distgd.report.page import Figure, Page, Table
from distgd.report.reading import Notice, Reading

MOODS = {"completed": "good", "stopped": "good", None: "open"}
"""Colors of a status; every other one is bad."""

NO_END = "no end on record"


def run_page(run: Reading, figures: Sequence[Figure]) -> Page:
    """The page of one run."""
    return Page(
        title=run.name,
        lead=_lead(run),
        status=run.status or NO_END,
        mood=MOODS.get(run.status, "bad"),
        facts=[_result(run), _metrics(run)],
        figures=figures,
        tables=[_events(run)],
        texts=[("config.yaml", run.config_text)] if run.config_text else [],
        footer="Written by distgd report from config.yaml and metrics.jsonl in the run folder.",
    )


def _lead(run: Reading) -> str:
    """What was run, in one line."""
    batch, slots = run.key("batch.size"), run.key("batch.slots")
    parts = [run.title.removeprefix(f"{run.name}: ")] if run.config else []
    parts += [f"batch {batch}" + (f" in {slots} slots" if slots else "")] if batch else []
    parts += [f"{run.key('optimizer.name')}, seed {run.key('run.seed', 0)}"] if run.config else []
    return "; ".join(parts) or "config.yaml cannot be read"


def _result(run: Reading) -> Table:
    """How it ended and what it came to."""
    rows = [("status", run.status or f"{NO_END}: it is still running, or it was killed")]
    rows += [("error", run.message)] if run.message else []
    rows += _counts(run)
    for key, label, form in _RESULT:
        text = _text(run.result.get(key), form, run)
        rows += [(label, text)] if text else []
    rows += _best(run.result.get("best"))
    return Table("Result", rows)


def _counts(run: Reading) -> Iterator[tuple[str, str]]:
    planned = run.key("stop.steps")
    yield "steps", f"{run.last.step:,}" + (f" of at most {planned:,}" if isinstance(planned, int) else "")
    yield "samples", f"{run.last.samples:,}"
    yield "training time", f"{run.last.seconds:,.1f} {run.clock}"


def _best(best: object) -> Iterator[tuple[str, str]]:
    if isinstance(best, Mapping) and isinstance(best.get("metrics"), Mapping):
        values = ", ".join(f"{name} {number(value)}" for name, value in best["metrics"].items())
        yield "best evaluation", f"step {best.get('step')}: {values}"


_RESULT = (  # key of the result, what it is called, how it is written
    ("ended_by", "ended by", "{}"),
    ("wall_s", "wall time", "{:,.1f} s, start-up and end included"),
    ("start_s", "start to first commit", "{:,.1f} s"),
    ("samples_per_s", "throughput", "{:,.0f} samples / {clock}"),
    ("step_ms", "step time", "{} {milliseconds}"),
    ("staleness", "staleness", "{} updates"),
    ("versions", "updates", "{:,}"),
    ("dropped_samples", "dropped samples", "{:,}"),
    ("late_slots", "late slots", "{:,}"),
    ("skipped_evaluations", "skipped evaluations", "{:,}"),
    ("bits", "bits", "{}"),
    ("faults", "faults", "{} on purpose"),
    ("weights_sha256", "weights_sha256", "{}"),
    ("mlflow_run_id", "MLflow run", "{}"),
)


def _text(value: object, form: str, run: Reading) -> str | None:
    """A value of the result in words; None where it is not known, or nothing to tell."""
    if isinstance(value, Mapping):  # quantiles
        known = (f"{name} {each:,.4g}" for name, each in value.items() if isinstance(each, int | float))
        value = ", ".join(known)
    if value is None or value in (0, ""):
        return None
    try:
        return form.format(value, clock=run.clock, milliseconds=run.milliseconds)
    except (TypeError, ValueError):
        return str(value)


def _metrics(run: Reading) -> Table:
    """The last value of each metric; those of single workers are in a picture."""
    shown = {name: value for name, value in run.metrics.items() if name in run.curves or not name.startswith("time/")}
    order = sorted(shown, key=lambda name: (not name.startswith(("eval/", "train/")), name))
    rows = [(name, number(shown[name]), _unit(name, run)) for name in order]
    note = "" if rows else "No step was committed."
    return Table("Last metrics", rows, numbers=frozenset({1}), note=note)


def _unit(metric: str, run: Reading) -> str:
    units = {"time": run.milliseconds, "throughput": f"samples / {run.clock}"}
    return {**units, "staleness": "updates", "quorum": "slots"}.get(metric.partition("/")[0], "")


def _events(run: Reading) -> Table:
    """What happened beside steps and evaluations."""
    rows = [_event(notice, run.clock) for notice in run.notices]
    rows += [_not_finite(name, run) for name, curve in run.curves.items() if curve.lost]
    if skipped := run.result.get("skipped_evaluations"):
        rows.append(("skipped", "", "", f"{skipped} evaluations came due while the one before was running"))
    note = f"{run.left_out:,} events between are in metrics.jsonl." if run.left_out else ""
    note = note or ("" if rows else "Nothing but steps and evaluations.")
    return Table("Events", rows, ("event", "step", f"time ({run.clock})", "what"), frozenset({1, 2}), note)


def _event(notice: Notice, clock: str) -> Sequence[str]:
    return notice.kind, f"{notice.place.step:,}", f"{notice.place.seconds:,.2f}", notice.text


def _not_finite(name: str, run: Reading) -> Sequence[str]:
    first = run.curves[name].lost[0]
    return "not finite", f"{first.step:,}", f"{first.seconds:,.2f}", f"{name}, for the first time"


def number(value: Any) -> str:
    """A metric for people: six digits that count.

    >>> number(0.0330000001), number(12345.678), number(float("nan")), number(180)
    ('0.033', '12,345.7', 'nan', '180')
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    return f"{value:,.6g}" if abs(value) < 1e6 or abs(value) >= 1e12 else f"{value:,.0f}"
