"""A report is written from any run folder, in any state, and shows what is in it."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distgd.cli import main
from distgd.errors import BadInput
from distgd.records import per_worker
from distgd.report import write_report
from distgd.report.curves import MOST, Curve, Place
from distgd.report.figures import PICTURES
from distgd.report.reading import MOST_NOTICES, read

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
CONFIG = """
run: {seed: 3}
task: {name: digits}
batch: {size: 32, slots: 4}
optimizer: {name: adam}
consistency: {mode: MODE}
cluster: {backend: ray, workers: 2, servers: 1}
"""


def step(at: int, workers: int = 2, **metrics: Any) -> dict[str, Any]:
    """A step of a run whose loss falls from 2.3 to 0.1 with noise."""
    loss = 2.2 * math.exp(-at / 60) + 0.1 * (1.2 + math.sin(7.0 * at))
    known = {"train/loss": loss, "lr": 0.01, "throughput/samples_per_s": 900.0, "time/step": 5.0, "time/apply": 1.0}
    stale = {"staleness/mean": 0.0, "staleness/max": 0.0}
    for phase, spent in {"compute": 2.0, "push": 0.25, "wait": 3.0, "pull": 0.25}.items():
        known |= {f"time/{phase}": spent} | per_worker(f"time/{phase}", {w: spent * (w + 1) for w in range(workers)})
    return event("step", at, {**known, **stale, **metrics})


def event(kind: str, at: int, metrics: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    place = {"step": at, "version": at, "samples": 32 * at, "seconds": at / 100}
    return {"event": kind, **place, "metrics": metrics or {}, **more}


def run(steps: int = 200, every: int = 20, **evals: float) -> list[dict[str, Any]]:
    events = []
    for at in range(1, steps + 1):
        events.append(step(at))
        if evals and at % every == 0:
            reached = 1 - math.exp(-at / 60)
            events.append(event("eval", at, {f"eval/{name}": value * reached for name, value in evals.items()}))
    return events


END = event(
    "end",
    200,
    {"train/loss": 0.25, "eval/loss": 0.5},
    status="completed",
    result={
        "wall_s": 34.5,
        "bits": "promised",
        "weights_sha256": "c0ffee",
        "skipped_evaluations": 3,
        "staleness": {"p50": 0.0, "max": 7.0},
    },
)


def folder(where: Path, events: list[dict[str, Any]], tail: str = "", config: str = CONFIG) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    (where / "config.yaml").write_text(config.replace("MODE", "sync"), encoding="utf-8")
    (where / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return where


def page(where: Path, events: list[dict[str, Any]], tail: str = "", config: str = CONFIG) -> str:
    """The report's HTML, which is checked to be whole and to stand alone."""
    out = write_report(folder(where, events, tail, config))
    assert out == where / "report" / "index.html"
    html = out.read_text(encoding="utf-8")
    Alone().feed(html)
    return html


class Alone(HTMLParser):
    """Refuses tags that fetch or run something, and tags that are not closed in order."""

    EMPTY = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in ("script", "link", "iframe", "object", "a"), tag
        assert not [name for name in values if name.startswith("on") or name == "href"]
        assert (values.get("src") or "data:").startswith("data:")
        self.open += [] if tag in self.EMPTY else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rows(html: str) -> dict[str, str]:
    """The tables' rows: first cell to the others."""
    found = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", html)
    return {name: " ".join(re.findall(r">([^<>]*)</td>", cells)) for name, cells in found}


def picture(where: Path, name: str) -> Image.Image:
    return Image.open(where / "report" / name).convert("RGB")


def pixels(image: Image.Image, color: str) -> int:
    """How many pixels of this very color there are."""
    wanted = tuple(bytes.fromhex(color[1:]))
    return sum(count for count, found in image.getcolors(1 << 24) or [] if found == wanted)


# What the page says.


def test_the_result_stands_at_the_top_with_the_config_below(tmp_path: Path) -> None:
    html = page(tmp_path / "mine", [*run(loss=0.4, accuracy=0.97), END])
    said = rows(html)
    assert (said["status"], said["steps"], said["samples"]) == ("completed", "200", "6,400")
    assert said["bits"] == "promised" and said["weights_sha256"] == "c0ffee" and said["wall time"].startswith("34.5 s")
    assert said["staleness"] == "p50 0, max 7 updates"
    assert said["train/loss"].split() == ["0.25"] and said["eval/loss"].split() == ["0.5"]
    assert "digits, sync, 2 workers, 1 server; batch 32 in 4 slots; adam, seed 3" in html
    assert html.index("weights_sha256") < html.index("Convergence") < html.index("optimizer: {name: adam}")


def test_pictures_are_files_and_the_same_inside_the_page(tmp_path: Path) -> None:
    html = page(tmp_path, [*run(loss=0.4), event("step", 201, {"staleness/max": 1.0, "staleness/mean": 0.5})])
    inside = {base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)}
    files = {path.read_bytes() for path in (tmp_path / "report").glob("*.png")}
    assert inside == files and len(files) == len(PICTURES)
    assert (tmp_path / "report" / "convergence.png").exists()


def test_what_happened_is_a_table(tmp_path: Path) -> None:
    lost = event("fault", 120, message="worker 1 is gone: killed")
    early = event("warning", 0, message="3 workers are idle")
    said = rows(page(tmp_path, [early, *run(150), lost, step(151, **{"train/loss": "NaN"}), END]))
    assert said["fault"] == "120 1.20 worker 1 is gone: killed"
    assert said["warning"] == "0 0.00 3 workers are idle"
    assert said["end"].endswith("completed")
    assert "error" not in said
    assert said["skipped"].strip().startswith("3 evaluations")
    assert said["not finite"].startswith("151") and "train/loss" in said["not finite"]


def test_more_events_than_anybody_reads_are_cut_in_the_middle(tmp_path: Path) -> None:
    faults = [event("fault", at, message=f"number {at}") for at in range(5000)]
    reading = read(folder(tmp_path, faults))
    assert len(reading.notices) + reading.left_out == 5000 and len(reading.notices) <= 2 * MOST_NOTICES
    assert (reading.notices[0].text, reading.notices[-1].text) == ("number 0", "number 4999")
    assert f"{reading.left_out:,} events" in page(tmp_path, faults)


def test_text_is_shown_and_never_read_as_html_or_mathematics(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    events = [*run(3), event("eval", 3, {f"eval/{evil}$x_$": 0.5, "eval/损失": 1.0}), event("fault", 3, message=evil)]
    html = page(tmp_path / "a$b$ & <i>", events, config=CONFIG.replace("digits", f"'{evil}'"))
    assert evil not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4, "task, metric, event, config"


# Runs in every state.


def test_a_run_that_goes_on_is_told_from_one_that_is_over(tmp_path: Path) -> None:
    html = page(tmp_path, run(50), tail='{"event": "step", "st')
    assert rows(html)["status"].startswith("no end on record")
    assert rows(html)["steps"] == "50"


def test_a_line_that_a_kill_has_torn_takes_nothing_else_with_it(tmp_path: Path) -> None:
    whole = read(folder(tmp_path / "whole", run(20)))
    torn = folder(tmp_path / "torn", run(20))
    lines = (torn / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    broken = [*lines[:10], b'{"event": "st\xc3\n', b"[]\n", b"\n", *lines[10:], b'{"event": "step", "message": "\xc3']
    (torn / "metrics.jsonl").write_bytes(b"".join(broken))
    assert read(torn).curves == whole.curves


@pytest.mark.parametrize(
    "events",
    [[], [step(1)], [step(1), event("eval", 1, {"eval/loss": 1.0})], [event("end", 0, status="failed", message="x")]],
    ids=["nothing", "step", "eval", "failed before the first step"],
)
def test_a_short_run_has_a_report(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    page(tmp_path, events)
    assert picture(tmp_path, "convergence.png").width >= 1000


def test_the_error_that_ended_a_run_stands_with_its_result(tmp_path: Path) -> None:
    end = event("end", 3, status="diverged", message="step 3, slot 1: no", result={"wall_s": 1.0})
    said = rows(page(tmp_path, [*run(3), end]))
    assert (said["status"], said["error"]) == ("diverged", "step 3, slot 1: no")
    assert said["end"].endswith("diverged; step 3, slot 1: no")


def test_virtual_time_is_called_virtual(tmp_path: Path) -> None:
    config = CONFIG.replace("backend: ray", "backend: inprocess")
    said = rows(
        page(tmp_path, [*run(3), event("end", 3, status="completed", result={"step_ms": {"p50": 2.5}})], config=config)
    )
    assert said["step time"] == "p50 2.5 virtual ms" and said["training time"] == "0.0 virtual s"
    assert said["time/step"].split() == ["5", "virtual", "ms"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_run_whose_every_loss_is_not_finite_has_a_report(tmp_path: Path, value: str) -> None:
    lost = [event("step", at, {"train/loss": value, "lr": value, "time/compute/worker_0": value}) for at in range(1, 9)]
    assert rows(page(tmp_path, lost))["not finite"].startswith("1 ")


def test_folders_with_less_than_a_run_have_a_report(tmp_path: Path) -> None:
    assert "No step was committed" in write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text("{[")
    assert "config.yaml cannot be read" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (folder(tmp_path, run(2)) / "report").write_text("a file")
    with pytest.raises(BadInput, match="RUN: expected a run folder that can be written"):
        write_report(tmp_path)


def test_a_report_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    page(tmp_path, [step(1, **{"staleness/max": 2.0})])
    assert (tmp_path / "report" / "staleness.png").exists()
    page(tmp_path, [step(1)])
    assert not (tmp_path / "report" / "staleness.png").exists(), "nothing is stale any more"


# What is drawn.


def test_each_curve_that_is_there_is_drawn(tmp_path: Path) -> None:
    page(tmp_path / "all", run(accuracy=0.97, loss=0.4))
    image = picture(tmp_path / "all", "convergence.png")
    assert min(pixels(image, color) for color in (BLUE, ORANGE, GREEN)) > 100
    page(tmp_path / "train", run())
    alone = picture(tmp_path / "train", "convergence.png")
    assert pixels(alone, BLUE) > 100 and pixels(alone, ORANGE) == pixels(alone, GREEN) == 0
    assert alone.height < image.height


def test_the_metrics_of_any_task_have_panels(tmp_path: Path) -> None:
    page(tmp_path / "one", run(loss=0.4, f1=0.8))
    page(tmp_path / "two", run(loss=0.4, f1=0.8, perplexity=90.0))
    one, two = (picture(tmp_path / name, "convergence.png").height for name in ("one", "two"))
    assert one < two


def test_up_to_16_workers_have_a_bar_each_and_more_have_a_range(tmp_path: Path) -> None:
    heights = []
    for workers in (1, 16, 17, 40):
        page(tmp_path / str(workers), [step(at, workers) for at in range(1, 4)])
        heights.append(picture(tmp_path / str(workers), "time.png").height)
    assert heights[0] < heights[2] == heights[3] < heights[1]


def test_the_split_of_a_step_counts_each_millisecond_once(tmp_path: Path) -> None:
    """2 + 0.25 + 3 + 0.25 ms, of which servers apply for 1 ms while the worker waits."""
    from distgd.report.figures import split

    reading = read(folder(tmp_path, [step(at) for at in range(1, 4)]))
    assert split(reading, "worker_0") == {"compute": 2.0, "push": 0.25, "wait": 2.0, "apply": 1.0, "pull": 0.25}


def test_a_worker_that_is_left_out_of_a_step_spends_nothing_on_it(tmp_path: Path) -> None:
    reading = read(folder(tmp_path, [step(1, 1), step(2, 2)]))
    assert (reading.spent("compute", "worker_0"), reading.spent("compute", "worker_1")) == (2.0, 2.0)


# Long runs.


@given(values=st.lists(st.floats(-1e6, 1e6), max_size=300), most=st.sampled_from([2, 4, 10]))
def test_a_curve_is_bounded_and_loses_no_value(values: list[float], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distgd.report.curves.MOST", most)
        curve = Curve()
        for at, value in enumerate(values):
            curve.add(Place(at, at, 0.0), value)
    assert len(curve) <= most and sum(curve.counts) == len(values)
    assert sum(curve.sums) == pytest.approx(sum(values), abs=1e-3)
    if values:
        assert (min(curve.lows), max(curve.highs)) == (min(values), max(values))
        assert curve.steps[-1] == len(values) - 1
        buckets = zip(curve.lows, curve.means, curve.highs, strict=True)
        assert all(low <= mean + 1e-6 and mean <= high + 1e-6 for low, mean, high in buckets)
    if len(values) <= most:
        assert curve.means == values


def test_the_size_of_a_report_does_not_grow_with_the_run(tmp_path: Path) -> None:
    short = page(tmp_path / "short", [event("step", at, {"train/loss": 1 / at}) for at in range(1, 2 * MOST)])
    long = page(tmp_path / "long", [event("step", at, {"train/loss": 1 / at}) for at in range(1, 20 * MOST)])
    assert len(long) < 1.5 * len(short)


# The door.


def test_importing_report_does_not_import_matplotlib() -> None:
    code = "import sys, distgd.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_style_of_the_process_is_neither_used_nor_changed(tmp_path: Path) -> None:
    import matplotlib

    page(tmp_path / "plain", run(5))
    with matplotlib.rc_context({"figure.facecolor": "black", "lines.linewidth": 9.0}):
        page(tmp_path / "dark", run(5))
        assert matplotlib.rcParams["lines.linewidth"] == 9.0
    assert picture(tmp_path / "dark", "convergence.png").getpixel((0, 0)) == (255, 255, 255)


def test_the_command_writes_the_page_again_and_prints_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "runs" / "mine", run(5))
    out = tmp_path / "runs" / "mine" / "report" / "index.html"
    assert main(["report", "mine"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    out.unlink()
    assert main(["report", "runs/mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out)}
    assert out.exists()
    assert main(["report", "nowhere"]) == 2
    assert "expected a run folder" in capsys.readouterr().err
