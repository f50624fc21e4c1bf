"""A run that was cut off goes on: the same bits in sync mode, every sample once in every mode, nothing logged twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from distgd.audit import audit, read
from distgd.checkpoint import Writing
from distgd.config import load
from distgd.errors import BadInput, Interrupted
from distgd.export import export
from distgd.result import Result
from distgd.stopping import Stop
from distgd.trainer import launch
from distgd.weights import fingerprint

STEPS = 24
Watch = Callable[[dict[str, Any]], object]


class Ragged:
    """Dropout, BatchNorm, a metric, and samples that no batch size divides."""

    def model(self) -> torch.nn.Module:
        layers = [torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 9)]
        return torch.nn.Sequential(*layers, torch.nn.Linear(9, 1))

    def loss(self, model: torch.nn.Module, batch: Any) -> Any:
        return (model(batch[0]) - batch[1]).square().mean()

    def train_data(self) -> Any:
        x = torch.randn(85, 6, generator=torch.Generator().manual_seed(5))
        return x, x.sum(1, keepdim=True)

    eval_data = train_data


def config(path: Path, mode: str = "sync", **more: Any) -> Any:
    given: dict[str, Any] = {
        "task": {"path": "given:object"},
        "batch": {"size": 30, "slots": 5},
        "stop": {"steps": STEPS},
        "optimizer": {"name": "adam", "lr": 0.01},
        "schedule": {"name": "cosine", "warmup": 3},
        "consistency": {"mode": mode},
        "cluster": {"backend": "inprocess", "workers": 3, "servers": 2},
        "eval": {"every": {"steps": 5}, "best": {"metric": "eval/loss"}},
        "checkpoint": {"every": {"steps": 4}},
        "tracking": {"uri": "none"},
        "run": {"storage": str(path / "runs"), "name": "a"},
    }
    for section, keys in more.items():
        given[section] = {**given.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return load(given)


def run(
    path: Path, resume: str = "never", watch: Watch = lambda event: None, mode: str = "sync", **more: Any
) -> Result:
    task = None if "task" in more else Ragged()
    return launch(config(path, mode, **more), "x", watch, task=task, resume=resume)


FRESH = multiprocessing.get_context("forkserver")  # whose processes are forked from one in which torch has no threads
FRESH.set_forkserver_preload(["distgd.trainer"])


def live(path: Path, step: int, mode: str, resume: str, more: dict[str, Any]) -> None:
    def die(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] >= step:
            while "tracking" in more and not (path / "runs/a/mlflow.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    run(path, resume, die, mode, **more)


def killed(path: Path, step: int, mode: str = "sync", resume: str = "never", **more: Any) -> None:
    """A run in a process that is gone, without a word, as soon as the driver has heard of a step."""
    process = FRESH.Process(target=live, args=(path, step, mode, resume, more))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def interrupted(path: Path, step: int, **more: Any) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(path, "auto", stop, **more)


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "runs/a/metrics.jsonl").read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [event["step"] for event in events(path) if event["event"] == "step"]


def clean(path: Path, upto: int | None = None) -> bool:
    found = audit(read(path / "runs/a/ledger.jsonl"))
    return found.clean and found.finished and found.steps == (STEPS if upto is None else upto)


@pytest.fixture(scope="module", autouse=True)
def without_pictures() -> Iterator[None]:
    """The report takes longer than such a run, and has tests of its own."""
    with mock.patch("distgd.run.write_report", lambda run_dir: run_dir / "report" / "index.html"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", [1, 4, 5, 6, 11, STEPS - 1])
def test_stopped_at_any_step_it_goes_on_with_the_same_bits_on_other_workers_and_servers(
    tmp_path: Path, whole: Result, step: int
) -> None:
    interrupted(tmp_path, step)
    assert max(steps(tmp_path)) < STEPS
    cluster = {"workers": 1 + step % 4, "servers": 1 + step % 3}
    result = run(tmp_path, "auto", cluster=cluster)
    assert result.weights_sha256 == whole.weights_sha256
    assert (result.samples, result.steps) == (whole.samples, STEPS)
    assert result.best == whole.best
    assert steps(tmp_path) == list(range(1, STEPS + 1)), "each step is logged once"
    assert clean(tmp_path)


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
@pytest.mark.parametrize("step", [1, 5, 13])
def test_killed_at_any_step_every_sample_counts_once(tmp_path: Path, whole: Result, mode: str, step: int) -> None:
    killed(tmp_path, step, mode)
    killed(tmp_path, min(step + 3, STEPS), mode, "auto")
    done = run(tmp_path, "auto", mode=mode)
    assert (done.samples, done.steps) == (whole.samples, STEPS)
    assert clean(tmp_path)
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    if mode == "sync":
        assert done.weights_sha256 == whole.weights_sha256
        assert done.best == whole.best


def test_killed_before_there_is_a_checkpoint_it_begins(tmp_path: Path, whole: Result) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text('{"run": "1", "timeline": 1}')
    (tmp_path / "runs" / "a" / "ledger.jsonl").write_text('{"state": "beg')
    result = run(tmp_path, "auto")
    assert result.weights_sha256 == whole.weights_sha256
    assert clean(tmp_path)


def test_auto_begins_a_run_that_is_not_there_and_says_what_a_finished_one_came_to(tmp_path: Path) -> None:
    first = run(tmp_path, "auto")
    seen: list[Any] = []
    again = run(tmp_path, "auto", seen.append)
    assert seen == []
    assert (again.weights_sha256, again.steps, again.status) == (first.weights_sha256, first.steps, "completed")
    assert fingerprint(again.state_dict) == first.weights_sha256


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    other = tmp_path / "other"
    kept = {"schedule": {"name": "constant"}}
    expected = run(other, stop={"steps": STEPS + 6}, **kept)
    run(tmp_path, **kept)
    result = run(tmp_path, "auto", stop={"steps": STEPS + 6}, **kept)
    assert result.weights_sha256 == expected.weights_sha256
    assert steps(tmp_path) == list(range(1, STEPS + 7))


def test_the_schedule_stays_as_long_as_it_was(tmp_path: Path) -> None:
    """A longer run does not stretch the cosine under the steps that are done."""
    expected = run(tmp_path / "other", stop={"steps": STEPS + 6}, schedule={"steps": STEPS})
    interrupted(tmp_path, 9)
    result = run(tmp_path, "auto", stop={"steps": STEPS + 6})
    assert result.weights_sha256 == expected.weights_sha256


def test_a_path_goes_back_and_what_came_after_is_void(tmp_path: Path, whole: Result) -> None:
    killed(tmp_path, 15, checkpoint={"keep": 9})
    old = tmp_path / "runs/a/checkpoints/v4-t1"
    killed(tmp_path, 6, resume=str(old), checkpoint={"keep": 9})
    found = sorted(path.name for path in old.parent.iterdir())
    assert "v4-t2" in found
    result = run(tmp_path, "auto")
    assert result.weights_sha256 == whole.weights_sha256
    assert clean(tmp_path)
    assert json.loads((tmp_path / "runs/a/run.json").read_text())["timeline"] == 3


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, whole: Result) -> None:
    killed(tmp_path, 18)
    newest = tmp_path / "runs/a/checkpoints/v12-t1/shard-1-i2.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert run(tmp_path, "auto").weights_sha256 == whole.weights_sha256
    (said,) = [event["message"] for event in events(tmp_path) if event["event"] == "warning"]
    assert str(newest) in said


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer": {"lr": 0.02}}, "optimizer.lr"),
        ({"batch": {"size": 32}}, "batch.size"),
        ({"batch": {"slots": 6}}, "batch.slots"),
        ({"consistency": {"mode": "async"}}, "consistency.mode"),
        ({"run": {"seed": 3}}, "run.seed"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_key(tmp_path: Path, change: Any, key: str) -> None:
    interrupted(tmp_path, 3)
    with pytest.raises(BadInput, match=rf"^{key}: expected .* as the run that goes on has it"):
        run(tmp_path, "auto", **change)
    assert run(tmp_path, "auto").steps == STEPS, "and nothing is lost"


def test_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, 3)

    class Wider(Ragged):
        def train_data(self) -> Any:
            return torch.zeros(90, 6), torch.zeros(90, 1)

    class Deeper(Ragged):
        def model(self) -> torch.nn.Module:
            return torch.nn.Linear(6, 1)

    for task, key in [(Wider(), "data"), (Deeper(), "task.model")]:
        with pytest.raises(BadInput, match=f"^{key}: expected"):
            launch(config(tmp_path), "x", lambda event: None, task=task, resume="auto")


def test_auto_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^run.name: expected a name with --resume auto"):
        run(tmp_path, "auto", run={"name": None})


@pytest.mark.parametrize("path", ["nowhere", "runs/a", "runs/a/checkpoints/v99-t1"])
def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path, path: str) -> None:
    run(tmp_path)
    with pytest.raises(BadInput, match=r"^--resume: expected"):
        run(tmp_path, str(tmp_path / path))


def test_two_drivers_on_one_folder_the_second_is_told(tmp_path: Path) -> None:
    told: list[str] = []

    def second(event: dict[str, Any]) -> None:
        if event["event"] == "step" and not told:
            with pytest.raises(BadInput) as error:
                run(tmp_path, "auto")
            told.append(str(error.value))

    run(tmp_path, watch=second)
    assert "expected a run folder that no other driver works on" in told[0]


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
@pytest.mark.parametrize("every", [3, 1000])
def test_a_run_that_ends_early_has_its_last_version(tmp_path: Path, mode: str, every: int) -> None:
    """A checkpoint that was asked for ahead, beyond the end, is of the last version instead."""
    end: Watch = lambda event: Stop("enough") if event["event"] == "step" and event["step"] == 7 else None  # noqa: E731
    given: dict[str, Any] = {"checkpoint": {"every": {"steps": every}}, "schedule": {"steps": STEPS}}
    ended = run(tmp_path, "auto", end, mode, **given)
    assert ended.status == "stopped"
    newest = max((tmp_path / "runs/a/checkpoints").iterdir(), key=lambda path: int(path.name[1:-3]))
    assert (newest / "manifest.json").exists()
    assert run(tmp_path, "auto", mode=mode, **given).steps == ended.steps, "it has ended"
    on = run(tmp_path, "auto", mode=mode, stop={"steps": STEPS - 1}, **given)
    assert on.steps == STEPS - 1
    assert audit(read(tmp_path / "runs/a/ledger.jsonl")).clean


def test_storage_that_the_driver_does_not_share_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard writes to a disk of its own: the driver sees nothing there."""
    finish = Writing.finish

    def elsewhere(self: Writing) -> Any:
        written = finish(self)
        self._path.unlink()
        return written

    monkeypatch.setattr(Writing, "finish", elsewhere)
    seen: list[str] = []
    with pytest.raises(
        BadInput, match=r"^run.storage: expected a place for checkpoints.*though shard \d has written it"
    ):
        run(tmp_path, watch=lambda event: seen.append(event["event"]))
    assert "step" not in seen
    assert not (tmp_path / "runs").exists(), "the same command, corrected, starts anew"


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_without_checkpoints_a_signal_ends_the_run_at_once(tmp_path: Path, mode: str) -> None:
    interrupted(tmp_path, 3, mode=mode, checkpoint={"every": None})
    assert not (tmp_path / "runs/a/checkpoints").exists()


def test_no_more_than_keep_are_kept(tmp_path: Path) -> None:
    run(tmp_path, checkpoint={"every": {"steps": 3}, "keep": 3})
    left = [int(path.name[1:-3]) for path in (tmp_path / "runs/a/checkpoints").iterdir()]
    assert len(left) == 3
    assert max(left) == STEPS
    assert min(left) > 9


@pytest.mark.parametrize("step", [2, 13])
def test_in_mlflow_it_is_one_run_with_each_step_once(tmp_path: Path, step: int) -> None:
    """A kill comes before the last steps are written there; they follow when the run goes on."""
    from mlflow import MlflowClient

    tracking = {"uri": f"sqlite:///{tmp_path}/m.db"}
    killed(tmp_path, step, tracking=tracking)
    done = run(tmp_path, "auto", tracking=tracking)
    client = MlflowClient(tracking["uri"])
    (only,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert only.info.run_id == done.mlflow_run_id
    assert only.info.status == "FINISHED"
    for metric, expected in [("train/loss", list(range(1, STEPS + 1))), ("eval/loss", [5, 10, 15, 20, STEPS])]:
        assert [each.step for each in client.get_metric_history(only.info.run_id, metric)] == expected


def test_a_kill_while_mlflow_makes_its_store_leaves_none_that_is_broken(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracking = {"uri": f"sqlite:///{tmp_path}/m.db"}
    (tmp_path / "m.db.part").write_bytes(b"half of one")
    done = run(tmp_path, tracking=tracking)
    assert MlflowClient(tracking["uri"]).get_run(str(done.mlflow_run_id)).info.status == "FINISHED"
    assert not (tmp_path / "m.db.part").exists()


class TestExport:
    @pytest.fixture
    def cut_off(self, tmp_path: Path) -> Path:
        """A run of a built-in task that was killed at step 10, with the newest checkpoint at step 8 or before."""
        killed(tmp_path, 10, task="digits", batch={"size": 64, "slots": 4})
        return tmp_path / "runs/a"

    def test_a_run_that_was_cut_off_has_weights_for_plain_torch(self, cut_off: Path, tmp_path: Path) -> None:
        which = export(cut_off, tmp_path / "out.safetensors")
        step = int(re.findall(r"of step (\d+)", which)[0])
        assert step in (4, 8)
        (tmp_path / "other").mkdir()
        given = config(tmp_path / "other", task="digits", batch={"size": 64, "slots": 4}, schedule={"steps": STEPS})
        stop = given.stop.model_copy(update={"steps": step})
        expected = launch(given.model_copy(update={"stop": stop}), "x", lambda event: None)
        assert fingerprint(load_file(tmp_path / "out.safetensors")) == expected.weights_sha256

    def test_of_a_finished_run_they_are_the_last_ones_or_the_best(self, tmp_path: Path) -> None:
        done = run(tmp_path)
        assert export(tmp_path / "runs/a", tmp_path / "last") == "the last ones"
        assert fingerprint(load_file(tmp_path / "last")) == done.weights_sha256
        assert export(tmp_path / "runs/a", tmp_path / "best", best=True) == "the best evaluation's"

    def test_what_is_there_is_not_written_over(self, tmp_path: Path) -> None:
        run(tmp_path)
        (tmp_path / "out").write_text("mine")
        with pytest.raises(BadInput, match=r"^OUT: expected a file that is not there yet"):
            export(tmp_path / "runs/a", tmp_path / "out")

    def test_without_a_best_one_it_says_so(self, tmp_path: Path) -> None:
        run(tmp_path, eval={"best": None})
        with pytest.raises(BadInput, match=r"^--best: expected best.safetensors"):
            export(tmp_path / "runs/a", tmp_path / "out", best=True)
