"""The table and the page of a comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from distgd.compare.outcome import Outcome
from distgd.config import Target
from distgd.records import strict
from distgd.report.comparison import PANELS, comparison
from distgd.report.curves import Curve
from distgd.report.drawing import save
from distgd.report.page import Figure, Page, Table, write
from distgd.report.summary import number

MOST_METRICS = 4  # with a picture of their own


def table(outcomes: Sequence[Outcome], target: Target | None, clock: str) -> Table:
    """A row a variant: what it took, what came out, and how long the target took."""
    metrics = list(dict.fromkeys(name for each in outcomes for name in each.evaluated))
    columns = [
        "variant",
        "status",
        "steps",
        "samples",
        "wall s",
        "samples/s",
        "staleness p50",
        "staleness max",
        *metrics,
    ]
    if target is not None:
        columns += [f"{unit} to target" for unit in ("steps", "samples", clock)]
    rows = [[*_measured(each), *_evaluated(each, metrics), *_to_target(each, target)] for each in outcomes]
    note = f"The target is {said(target)}, at the first evaluation that has it." if target else ""
    return Table("Variants", rows, columns, frozenset(range(2, len(columns))), note)


def said(target: Target) -> str:
    """A target as it is written on the command line.

    >>> said(Target(metric="eval/loss", at_most=0.1))
    'eval/loss<=0.1'
    """
    if target.at_least is not None:
        return f"{target.metric}>={target.at_least:g}"
    return f"{target.metric}<={target.at_most:g}"


def _measured(each: Outcome) -> Iterator[str]:
    staleness = each.result.get("staleness") or {}
    yield from (each.variant.label, each.status)
    yield from (_cell(each.result.get(key), form) for key, form in _FORMS.items())
    yield from (_cell(staleness.get(name), "{:g}") for name in ("p50", "max"))


_FORMS = {"steps": "{:,}", "samples": "{:,}", "wall_s": "{:,.1f}", "samples_per_s": "{:,.0f}"}


def _evaluated(each: Outcome, metrics: Sequence[str]) -> list[str]:
    return [number(each.evaluated[name]) if name in each.evaluated else "–" for name in metrics]


def _to_target(each: Outcome, target: Target | None) -> list[str]:
    if target is None:
        return []
    if each.reached is None:
        return ["never", "–", "–"]
    return [f"{each.reached.step:,}", f"{each.reached.samples:,}", f"{each.reached.seconds:,.2f}"]


def _cell(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else "–"


def write_comparison(
    folder: Path, outcomes: Sequence[Outcome], target: Target | None, clock: str, waiting: Sequence[str]
) -> Path:
    """Write `index.html`, its pictures and `comparison.json` below the folder; returns the page.

    Args:
        waiting: variants that have not run.
    """
    out = folder / "report"
    out.mkdir(exist_ok=True)
    rows = [outcome.as_dict() for outcome in outcomes]
    said_all = {"comparison": folder.name, "target": said(target) if target else None, "rows": rows}
    (out / "comparison.json").write_text(json.dumps(strict(said_all), indent=1, allow_nan=False) + "\n", "utf-8")
    return write(_page(folder, outcomes, target, clock, waiting), out / "index.html")


def _page(folder: Path, outcomes: Sequence[Outcome], target: Target | None, clock: str, waiting: Sequence[str]) -> Page:
    bad = [each for each in outcomes if not each.good]
    status = f"{len(waiting)} to come" if waiting else f"{len(bad)} of {len(outcomes)} failed" if bad else "completed"
    wrong = Table("What went wrong", [(each.variant.label, str(each.error)) for each in bad], ("variant", "message"))
    places = [(each.variant.label, ", ".join(each.variant.overrides), each.variant.name) for each in outcomes]
    return Page(
        title=folder.name,
        lead="The same config, seed and data in every variant, but for what the variant's name says."
        + (f" Not run yet: {', '.join(waiting)}." if waiting else ""),
        status=status,
        mood="open" if waiting else "bad" if bad else "good",
        facts=[table(outcomes, target, clock)],
        figures=list(_figures(folder / "report", outcomes, target, clock)),
        tables=[*([wrong] if bad else []), Table("Overrides", places, ("variant", "overrides", "run folder"))],
        texts=[],
        footer="Written by distgd compare. Each variant's folder has a report of its own.",
        width=round(100 * PANELS),
    )


def _figures(out: Path, outcomes: Sequence[Outcome], target: Target | None, clock: str) -> Iterator[Figure]:
    for metric in _metrics(outcomes, target):
        curves = {each.variant.label: each.curves.get(metric, Curve()) for each in outcomes}
        level = None
        if target is not None and metric == target.metric:
            level = target.at_least if target.at_least is not None else target.at_most
        png = out / (re.sub(r"[^A-Za-z0-9._-]+", "-", metric) + ".png")
        save(lambda: comparison(curves, metric, clock, level), png)  # noqa: B023 - drawn at once
        yield Figure(metric, "", png)


def _metrics(outcomes: Sequence[Outcome], target: Target | None) -> list[str]:
    """Those of evaluations, the target's first; the training loss where there is none."""
    found = list(dict.fromkeys(name for each in outcomes for name in each.curves))
    held_out = [name for name in found if name.startswith("eval/")]
    first = [target.metric] if target is not None and target.metric in held_out else []
    return list(dict.fromkeys([*first, *held_out]))[:MOST_METRICS] or found
