"""A run through the public door, on the in-process cluster: what it leaves, what it returns, what it does not touch."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from simulate import OddTask

import distgd
from distgd.config import load
from distgd.errors import BadInput, Diverged, Interrupted, RunFailed
from distgd.trainer import launch
from distgd.weights import fingerprint


def sections(tmp_path: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "run": {"storage": str(tmp_path)},
        "tracking": {"uri": "none"},
        "stop": {"steps": 8},
        "batch": {"size": 32, "slots": 4},
        "cluster": {"backend": "inprocess"},
    }
    for name, section in more.items():
        given[name] = {**given.get(name, {}), **section} if isinstance(section, dict) else section
    return given


def test_a_run_leaves_what_it_says(tmp_path: Path) -> None:
    result = distgd.train(sections(tmp_path, task="digits", stop={"epochs": 2, "steps": 100}))
    folder = Path(result.run_dir)
    assert load(folder / "config.yaml").batch.slots == 4
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 91))
    assert [e["step"] for e in events if e["event"] == "eval"] == [45, 90]
    assert events[-1]["event"] == "end"
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for epoch in (0, 1):
        slots = [x for x in lines if x["state"] == "applied" and x["epoch"] == epoch]
        places = sorted(p for x in slots for p in range(x["first"], x["last"] + 1))
        assert places == list(range(1437)), "every place of the epoch's order once"
    assert [(x["state"], x.get("step")) for x in (lines[0], lines[-1])] == [("begin", None), ("end", 90)]
    assert fingerprint(load_file(folder / "model.safetensors")) == result.weights_sha256
    assert (folder / "report" / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(result.as_dict()))["status"] == "completed"


def test_the_state_loads_into_the_plain_model(tmp_path: Path) -> None:
    task = OddTask(112)
    result = distgd.train(sections(tmp_path), task=task)
    model = task.model()
    model.load_state_dict(result.state_dict)
    assert fingerprint(model.state_dict()) == result.weights_sha256 == fingerprint(result.state_dict)


def test_the_callers_world_is_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    handler = signal.getsignal(signal.SIGINT)
    environment = dict(os.environ)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = float(torch.rand(())), float(np.random.rand()), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    distgd.train(sections(tmp_path), task=OddTask(112))
    assert (float(torch.rand(())), float(np.random.rand()), random.random()) == expected
    assert torch.get_num_threads() == 2
    assert signal.getsignal(signal.SIGINT) == handler
    assert dict(os.environ) == environment


def test_a_folder_with_files_in_it_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("x")
    with pytest.raises(BadInput, match=r"choose another with run\.name="):
        distgd.train(sections(tmp_path, task="digits"), "run.name=taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["precious"]


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"batch\.size: expected at most the 112 samples"):
        distgd.train(sections(tmp_path, batch={"size": 113}), task=OddTask(112))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_divergence_keeps_what_was_reached(tmp_path: Path, mode: str) -> None:
    how = sections(tmp_path, task="digits", optimizer={"name": "sgd", "lr": 1e30}, consistency={"mode": mode})
    with pytest.raises(Diverged, match=r"step \d+, slot \d+.*: expected a finite loss and gradient") as caught:
        distgd.train(how)
    result = caught.value.result
    assert result.status == "diverged"
    assert result.weights_sha256 is None
    assert not (Path(result.run_dir) / "model.safetensors").exists()
    assert (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()[-1].startswith('{"event": "end"')


def at_step(step: int, do: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            do()

    return watch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_what_was_reached(tmp_path: Path, number: int) -> None:
    config = load(sections(tmp_path, task="digits", stop={"steps": 500}))
    with pytest.raises(Interrupted) as caught:
        launch(config, "run", at_step(7, lambda: os.kill(os.getpid(), number)))
    assert caught.value.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    assert 7 <= caught.value.result.steps <= 9, "those that were decided already"


def test_single_samples_train_at_the_defaults(tmp_path: Path) -> None:
    """`batch.size: 1` with 2 workers: one slot, one idle worker, and the loss falls."""
    given = sections(tmp_path, task="digits", stop={"steps": 1500}, optimizer={"lr": 0.02})
    given["batch"] = {"size": 1}
    result = distgd.train(given)
    events = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [e["metrics"]["train/loss"] for e in events if e["event"] == "step"]
    assert result.slots == 1
    assert np.mean(losses[-300:]) < 0.7 * np.mean(losses[:300])


# What on_event sees and does.


def test_on_event_sees_what_is_recorded_as_copies_of_its_own(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def on_event(event: dict[str, Any]) -> None:
        seen.append(json.loads(json.dumps(event)))
        event["metrics"].clear()
        event["step"] = -1

    result = distgd.train(sections(tmp_path, task="digits", eval={"every": {"steps": 3}}), on_event=on_event)
    lines = (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert seen == [json.loads(line) for line in lines]
    assert {event["event"] for event in seen} == {"step", "eval", "checkpoint", "end"}


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_a_stop_ends_the_run_cleanly_with_the_weights_of_its_last_step(tmp_path: Path, mode: str) -> None:
    given = sections(tmp_path, task="digits", stop={"epochs": 9}, consistency={"mode": mode})
    given["stop"].pop("steps")
    result = distgd.train(given, on_event=lambda e: distgd.Stop("seen enough") if e["step"] == 5 else None)
    assert (result.status, result.ended_by) == ("stopped", "stopped: seen enough")
    assert 5 <= result.steps <= 7
    assert fingerprint(load_file(Path(result.run_dir) / "model.safetensors")) == result.weights_sha256
    end = json.loads((Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["status"], end["ended_by"]) == ("end", "stopped", "stopped: seen enough")


def test_an_error_in_on_event_fails_the_run_with_its_own_frame(tmp_path: Path) -> None:
    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            raise KeyError("mine")

    with pytest.raises(RunFailed, match="KeyError: 'mine'") as caught:
        distgd.train(sections(tmp_path, task="digits"), on_event=on_event)
    assert "test_trainer.py" in str(caught.value)
    assert caught.value.result.status == "failed"


def test_an_error_in_on_event_at_the_end_does_not_lose_the_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "end":
            raise KeyError("late")

    result = distgd.train(sections(tmp_path, task="digits"), on_event=on_event)
    assert result.status == "completed"
    assert "on_event failed at the end of the run" in caplog.text


# How a run ends.


@pytest.mark.parametrize(
    ("stop", "ended_by"),
    [
        ({"steps": 8}, "stop.steps: 8"),
        ({"steps": 80, "epochs": 1}, "stop.epochs: 1"),
        ({"steps": 90, "target": {"metric": "eval/accuracy", "at_least": 0.2}}, "stop.target: eval/accuracy"),
        ({"steps": 90, "patience": {"metric": "eval/loss", "evals": 1, "min_delta": 9.0}}, "stop.patience: eval/loss"),
    ],
)
def test_the_result_says_what_ended_the_run(tmp_path: Path, stop: dict[str, Any], ended_by: str) -> None:
    given = sections(tmp_path, task="digits", eval={"every": {"steps": 5}, "best": {"metric": "eval/accuracy"}})
    result = distgd.train({**given, "stop": stop}, "optimizer.lr=0.1")
    assert str(result.ended_by).startswith(ended_by)
    assert result.status == "completed"
    assert result.best is not None
    best = load_file(Path(result.run_dir) / "best.safetensors")
    assert best.keys() == result.state_dict.keys()


def test_a_schedule_of_unknown_length_is_refused(tmp_path: Path) -> None:
    given = sections(tmp_path, task="digits", schedule={"name": "cosine"})
    given["stop"] = {"seconds": 5}
    with pytest.raises(BadInput, match=r"schedule\.steps: expected a number of steps with schedule\.name=cosine"):
        distgd.train(given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["stop.target={metric: eval/f1, at_least: 1}", "eval.best={metric: eval/f1}"])
def test_a_metric_that_the_task_does_not_have_is_refused_before_the_start(tmp_path: Path, key: str) -> None:
    with pytest.raises(BadInput, match=r"metric: expected one of eval/accuracy, eval/loss, found 'eval/f1'"):
        distgd.train(sections(tmp_path, task="digits"), key)
    with pytest.raises(BadInput, match=r"expected null, as the task has no eval_data"):
        distgd.train(sections(tmp_path, task="counting"), key)
    assert not list(tmp_path.iterdir())


# Good manners.


class Diary:
    """A tracker of somebody's own."""

    pages: ClassVar[list[Any]] = []

    def start(self, info: Any) -> None:
        self.pages.append(("start", info.name, info.params["batch.slots"]))

    def log(self, event: Any) -> None:
        self.pages.append((event["event"], event["step"]))

    def finish(self, end: Any) -> None:
        self.pages.append(("finish", end.status))


def test_trackers_of_ones_own_see_the_run_from_start_to_finish(tmp_path: Path) -> None:
    Diary.pages.clear()
    result = distgd.train(sections(tmp_path, task="counting", stop={"steps": 2}), f"tracking.also=[{__name__}:Diary]")
    events = [("step", 1), ("step", 2), ("checkpoint", 2), ("end", 2)]
    assert Diary.pages == [("start", result.run_id, 4), *events, ("finish", "completed")]


class Dumb:
    def start(self, info: Any) -> None: ...


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Dumb", r"expected a class with the methods .*add log, finish"),
        ("Dump", r"expected a name in .*found 'Dump'; did you mean Dumb\?"),
    ],
)
def test_a_tracker_that_cannot_be_one_is_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(BadInput, match=rf"tracking\.also: {message}"):
        distgd.train(sections(tmp_path, task="counting"), f"tracking.also=[{__name__}:{path}]")


def test_the_root_logger_is_left_alone(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.getLogger("distgd").handlers[:]
    distgd.train(sections(tmp_path, task="counting", tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"}))
    assert (root.level, list(root.handlers), logging.getLogger("distgd").handlers[:]) == before


def test_an_active_mlflow_run_becomes_the_parent(tmp_path: Path) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/theirs.db")
    try:
        with mlflow.start_run(experiment_id=mlflow.MlflowClient().create_experiment("theirs")) as parent:
            given = {
                name: section for name, section in sections(tmp_path, task="counting").items() if name != "tracking"
            }
            result = distgd.train(given)
            assert mlflow.active_run().info.run_id == parent.info.run_id
        child = mlflow.get_run(result.mlflow_run_id)
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.experiment_id == parent.info.experiment_id
        assert child.info.status == "FINISHED"
    finally:
        mlflow.set_tracking_uri(before)


def test_a_run_in_another_store_is_no_child(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/theirs.db")
    try:
        with mlflow.start_run(experiment_id="0"):
            ours = {"uri": f"sqlite:///{tmp_path}/ours.db"}
            result = distgd.train(sections(tmp_path, task="counting", tracking=ours))
        assert "it is no parent" in caplog.text
        child = mlflow.MlflowClient(ours["uri"]).get_run(result.mlflow_run_id)
        assert "mlflow.parentRunId" not in child.data.tags
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize(
    ("stop", "every", "bits"),
    [
        ({"steps": 8}, {"steps": 4}, "promised"),
        ({"steps": 90, "target": {"metric": "eval/accuracy", "at_least": 0.2}}, {"steps": 5}, "promised"),
        ({"steps": 9000, "target": {"metric": "eval/accuracy", "at_least": 0.2}}, {"seconds": 0.01}, "not promised"),
        ({"seconds": 0.02}, {"steps": 5}, "not promised"),
    ],
)
def test_bits_are_promised_where_no_clock_decides_the_end(tmp_path: Path, stop: Any, every: Any, bits: str) -> None:
    given = {**sections(tmp_path, task="digits", eval={"every": every}), "stop": stop}
    assert distgd.train(given, "optimizer.lr=0.1").bits == bits


class Vandal(Diary):
    """Empties what it gets, and leaves."""

    def log(self, event: Any) -> None:
        event["metrics"].clear()
        event.clear()
        sys.exit(3)


def test_a_tracker_can_neither_spoil_an_event_nor_end_a_run(tmp_path: Path) -> None:
    result = distgd.train(sections(tmp_path, task="counting", stop={"steps": 2}), f"tracking.also=[{__name__}:Vandal]")
    lines = (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["step", "step", "checkpoint", "end"]
    assert all(json.loads(line)["metrics"] for line in lines)
