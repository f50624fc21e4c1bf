"""The scales of `scripts/prove speed`: both sides do the work that they are said to do, and rows say what was seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from proofs import contest, models, rows, watching  # noqa: E402

from distgd.config import load  # noqa: E402
from distgd.tasks import load as load_task  # noqa: E402
from distgd.transport.segments import Segment  # noqa: E402

STEPS, PARAMETERS = 5, 3000


def printed(code: str, folder: Path) -> str:
    """What a process of its own prints: some of this code forks, which pytest's process is too busy for."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=contest.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def adam(steps: int, gradient: float) -> float:
    """An element of the weights after so many steps by the same gradient."""
    weights = torch.zeros(64)
    weights.grad = torch.full_like(weights, gradient)
    optimizer = torch.optim.Adam([weights], lr=1e-3, fused=True)
    for _ in range(steps):
        optimizer.step()
    return float(weights[0])


FLOOR = "from proofs import floor; seconds, weights = floor.run({workers}, {parameters}, {steps}, {servers}); "
ALONE = (
    "from proofs import alone; import torch; found = alone.synchronize({workers}, {parameters}, {steps}, {servers}); "
    "weights = torch.cat(list(found.state_dict.values())); seconds = range(found.versions); "
)
SHOWN = "import json; print(json.dumps([len(seconds), len(weights), weights.unique().tolist()]))"


@pytest.mark.parametrize("code", [FLOOR, ALONE], ids=["floor", "alone"])
@pytest.mark.parametrize(("workers", "servers"), [(2, 1), (3, 2)])
def test_both_ends_of_the_scale_make_every_update_of_every_element(
    code: str, workers: int, servers: int, tmp_path: Path
) -> None:
    asked = code.format(workers=workers, parameters=PARAMETERS, steps=STEPS, servers=servers)
    steps, elements, values = json.loads(printed(asked + SHOWN, tmp_path))
    assert (steps, elements) == (STEPS, PARAMETERS)
    assert values == pytest.approx([adam(STEPS, 1e-3)], rel=1e-5)


def test_ddp_reports_each_bucket_size_without_its_first_steps(tmp_path: Path) -> None:
    found = contest.ddp(f"synthetic:{PARAMETERS}", 2, STEPS, [1, 25], tmp_path)
    assert [each.bucket_mb for each in found] == [1, 25]
    assert all(each.step > 0 and each.backward > 0 for each in found)
    slow_first = {"bucket_mb": 1, "step": [9.0] * contest.WARM + [0.002] * 3, "backward": []}
    assert contest.read_ddp(f"noise\n{json.dumps(slow_first)}\n") == [contest.DDPTimes(1, 2.0, 0.0, 2.0)]


@pytest.mark.parametrize("name", ["synthetic:1000", "char-lm", "mlp", "sleepy:1"])
def test_a_name_means_the_same_model_loss_and_batch_on_both_sides(name: str, tmp_path: Path) -> None:
    config = load(contest.config(name, 2, 10, tmp_path), [], {})
    ours, (theirs, batch) = load_task(config.task, config.data), models.contest(name)
    shapes = [[tuple(p.shape) for p in task.model().parameters()] for task in (ours, theirs)]
    assert shapes[0] == shapes[1]
    first = batch[0] if isinstance(batch, tuple) else batch
    assert config.batch.size == 2 * len(first)
    torch.manual_seed(0)
    model = theirs.model()
    assert torch.equal(torch.as_tensor(ours.loss(model, batch)), torch.as_tensor(theirs.loss(model, batch)))


def test_of_all_workers_one_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not models.Sleepy(1.0, str(tmp_path)).claims()  # this process is the driver
    monkeypatch.setattr(models.Path, "read_bytes", lambda path: b"ray::Worker.run")
    assert [models.Sleepy(1.0, str(tmp_path)).claims() for _ in range(4)] == [True, False, False, False]


def test_what_a_process_holds_is_seen() -> None:
    before = watching.see([str(os.getpid())])
    segments = [Segment.allocate(32 << 20) for _ in range(2)]
    for segment in segments:
        segment.memory[:] = 1
    after = watching.see([str(os.getpid())])
    assert (after.processes, after.segments) == (1, before.segments + 2)
    assert after.files > before.files
    assert after.resident - before.resident >= 60 << 20
    assert after.proportional - before.proportional >= 60 << 20


# Rows.


def a_row(measure: Callable[[rows.Bench], rows.Measured]) -> rows.Outcome:
    proof = rows.Proof()
    proof.row("something")(measure)
    return proof.rows[0].run(quick=False)


def test_a_row_that_cannot_be_measured_here_is_no_miss() -> None:
    def measure(bench: rows.Bench) -> rows.Measured:
        """A claim."""
        raise rows.Skipped("not root")

    outcome = a_row(measure)
    assert outcome.verdict == "skip"
    assert "not root" in outcome.measured


def test_settings_are_lines_of_a_table_below(tmp_path: Path) -> None:
    def measure(bench: rows.Bench) -> rows.Measured:
        """A claim."""
        return rows.Measured("2", holds=True, settings=[{"W": 2, "ms": 0.51234}, {"W": 4, "ms": 1234.5}])

    page = tmp_path / "speed.md"
    page.write_text(f"before\n{rows.BEGIN}\nold\n{rows.END}\nafter\n")
    rows.Page(page).write("speed", [a_row(measure)])
    text = page.read_text()
    assert "| W | ms |\n|---|---|\n| 2 | 0.512 |\n| 4 | 1,234 |\n<!--" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert json.loads((tmp_path / "speed.json").read_text())["rows"][0]["settings"][0] == {"W": 2, "ms": 0.51234}


def test_rows_that_are_measured_one_by_one_take_their_places_on_the_page(tmp_path: Path) -> None:
    proof = rows.Proof()
    for claim in ("First.", "Second.", "Third."):

        def measure(bench: rows.Bench) -> rows.Measured:
            return rows.Measured("old", holds=True)

        measure.__doc__ = claim
        proof.row("something")(measure)
    outcomes = [row.run(quick=False) for row in proof.rows]
    page = tmp_path / "speed.md"
    page.write_text(f"{rows.BEGIN}\n{rows.END}\n")
    rows.Page(page).write("speed", outcomes[:2])
    elsewhere = {"machine": {"CPU": "another"}}
    changed = replace(outcomes[1], claim="Another.", **elsewhere)  # type: ignore[arg-type]
    proof.rows[1] = replace(proof.rows[1], claim="Another")
    new = [replace(outcomes[2], measured="new", **elsewhere)]  # type: ignore[arg-type]
    found = rows.Page(page).merged(proof.rows, new)
    assert [(each.number, each.measured) for each in found] == [(1, "old"), (3, "new")], (
        "the second claims something else"
    )
    rows.Page(page).write("speed", [*found, changed])
    assert "Rows 1: date" in page.read_text() and "Rows 3, 2: CPU another" in page.read_text()


def test_the_page_shows_the_other_side_as_it_is_run() -> None:
    script = (ROOT / "scripts/proofs/ddp.py").read_text(encoding="utf-8")
    assert len(script.splitlines()) < 80
    assert script in (ROOT / "docs/speed.md").read_text(encoding="utf-8")
