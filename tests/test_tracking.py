"""Tracking: the local file is complete, MLflow gets what it was promised, and neither stalls nor kills."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distgd.errors import BadInput
from distgd.records import Jsonl, Many, RunEnd, RunInfo, per_worker
from distgd.tracking import Mlflow, absolute, ui, writer

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, on import


def info(folder: Path, uri: str = "", **more: Any) -> RunInfo:
    return RunInfo("r1", "first", folder, uri=uri or f"sqlite:///{folder}/store/mlflow.db", **more)


def event(step: int, kind: str = "step", **metrics: Any) -> dict[str, Any]:
    values = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return {
        "event": kind,
        "step": step,
        "version": step,
        "samples": 8 * step,
        "seconds": step / 100,
        "metrics": values or {"train/loss": 1 / step},
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_event_is_a_line(tmp_path: Path) -> None:
    tracker = Jsonl()
    tracker.start(info(tmp_path))
    events = [event(step) for step in range(1, 100)] + [event(99, "eval"), event(99, "end")]
    for one in events:
        tracker.log(one)
    tracker.finish(RunEnd("completed"))
    assert lines(tmp_path) == events


def test_numbers_that_are_not_finite_are_strict_json_and_read_back(tmp_path: Path) -> None:
    tracker = Jsonl()
    tracker.start(info(tmp_path))
    tracker.log(event(1, train_loss=np.float32("nan"), train_norm=math.inf, lr=-math.inf, eval_loss=np.float32(0.5)))
    tracker.finish(RunEnd("diverged"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line, parse_constant=refuse)["metrics"]
    assert metrics == {"train/loss": "NaN", "train/norm": "Infinity", "lr": "-Infinity", "eval/loss": 0.5}
    assert math.isnan(float(metrics["train/loss"])) and float(metrics["lr"]) == -math.inf


def test_a_killed_run_has_lost_at_most_a_second_of_events(tmp_path: Path) -> None:
    tracker = Jsonl()
    tracker.start(info(tmp_path))
    for step in range(1, 1000):
        tracker.log(event(step))
        assert len(lines(tmp_path)) >= step - 100, "an event is 0.01 s here"
    tracker.log(event(1000, "eval"))
    assert len(lines(tmp_path)) == 1000, "an evaluation is there at once"
    tracker.finish(RunEnd("failed"))


class Recorder:
    """A tracker that remembers, and raises where it is told to."""

    def __init__(self, broken: bool = False) -> None:
        self.seen: list[str] = []
        self.broken = broken

    def _see(self, what: str) -> None:
        self.seen.append(what)
        if self.broken:
            raise OSError("no space left on device")

    def start(self, info: RunInfo) -> None:
        self._see("start")

    def log(self, event: Mapping[str, Any]) -> None:
        self._see(event["event"])

    def finish(self, end: RunEnd) -> None:
        self._see(end.status)


def test_one_failing_tracker_never_stops_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Recorder(broken=True), Recorder()
    many = Many(broken, sound)
    many.start(info(tmp_path))
    many.log(event(1))
    many.finish(RunEnd("completed"))
    assert sound.seen == broken.seen == ["start", "step", "completed"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "one warning, not one a call"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "distgd.tracking"]


def mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(32, 10)
    return torch.nn.Sequential(*layers)


def test_a_run_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Everything that a run promises is in the store, read back with MLflow's own client."""
    monkeypatch.chdir(tmp_path)
    report, weights, best = tmp_path / "report", tmp_path / "model.safetensors", tmp_path / "best.safetensors"
    report.mkdir()
    (report / "convergence.png").write_bytes(b"png")
    weights.write_bytes(b"weights")
    best.write_bytes(b"better weights")
    params = {f"optimizer.group[{number}]": "x" * 7000 for number in range(150)}
    data = {"name": "digits", "samples": 1797, "digest": "d" * 64, "schema": {"mlflow_tensorspec": {"features": "[]"}}}
    model = mlp()
    tracker = Mlflow(every_steps=10)
    tracker.start(info(tmp_path, "sqlite:///store/mlflow.db", params=params, tags={"bits": "promised"}, data=data))
    for step in range(1, 106):
        tracker.log(event(step))
        if step % 35 == 0:
            tracker.log(event(step, "eval", eval_accuracy=step / 105))
    tracker.log({**event(105, eval_accuracy=1.0), "event": "end"})
    found = {"wall_s": 1.5, "steps": 105, "status": "completed", "bits": "b", "eval/loss": 1.0, "ok": None}
    tracker.finish(RunEnd("completed", found, report, (weights, best), model, np.ones((1, 64), "f4")))
    assert not warnings(caplog)

    import mlflow
    from mlflow import MlflowClient

    assert tracker.run_id
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    client = MlflowClient(uri)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert len(run.data.params) == 150 and {len(value) for value in run.data.params.values()} == {6000}
    assert run.data.tags["bits"] == run.data.tags["result.bits"] == "b", "what was said at the start is said anew"
    assert (run.data.tags["result.status"], run.data.tags["result.steps"]) == ("completed", "105")
    assert {name: v for name, v in run.data.metrics.items() if name.startswith("result")} == {"result/wall_s": 1.5}
    steps = [metric.step for metric in client.get_metric_history(tracker.run_id, "train/loss")]
    assert steps == [1, *range(10, 101, 10), 105], "every tenth, the first and the last"
    assert [metric.step for metric in client.get_metric_history(tracker.run_id, "eval/accuracy")] == [35, 70, 105], (
        "the end repeats nothing"
    )
    assert run.inputs
    (dataset,) = run.inputs.dataset_inputs
    assert json.loads(dataset.dataset.profile or "") == {"num_rows": 1797} and dataset.dataset.name == "digits"
    assert {one.path for one in client.list_artifacts(tracker.run_id)} == {
        "best.safetensors",
        "model.safetensors",
        "report",
    }
    assert (tmp_path / "store/mlruns" / tracker.run_id / "artifacts/report/convergence.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors",
        "mlflow.json",
        "model.safetensors",
        "report",
        "store",
    ]

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pytorch.load_model(f"runs:/{tracker.run_id}/model")
    mlflow.set_tracking_uri(before)
    batch = torch.randn(7, 64)
    assert torch.equal(loaded(batch), model.eval()(batch)), "the batch is free, dropout is off"
    (program,) = (tmp_path / "store/mlruns").rglob("model.pt2")
    assert torch.equal(torch.export.load(program).module()(batch), model(batch)), "plain torch, without mlflow"


@pytest.mark.parametrize("status", ["stopped", "interrupted", "failed", "diverged"])
def test_how_a_run_ended(tmp_path: Path, status: str) -> None:
    from mlflow import MlflowClient

    tracker = Mlflow()
    tracker.start(info(tmp_path))
    tracker.log(event(1, train_loss=math.nan))
    tracker.finish(RunEnd(status))
    assert tracker.run_id
    run = MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db").get_run(tracker.run_id)
    assert run.info.status == {"stopped": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
    assert math.isnan(run.data.metrics["train/loss"])


def test_a_model_that_cannot_be_exported_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlflow import MlflowClient

    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    tracker = Mlflow()
    tracker.start(info(tmp_path))
    tracker.finish(RunEnd("completed", model=Branches(), example=torch.ones(4, 3)))
    (message,) = warnings(caplog)
    assert "the model (torch.export cannot" in message and "model.safetensors" in message
    assert tracker.run_id
    client = MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db")
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert not client.search_logged_models([run.info.experiment_id]), "no half-made model is left"


def test_mlflow_out_of_reach(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two warnings: that it cannot be reached, and what was not written. No waiting, and the file is complete."""
    run = info(tmp_path, "http://127.0.0.1:9")
    many = Many(Jsonl(), Mlflow(deadline=20.0))
    many.start(run)
    for step in range(1, 1001):
        many.log(event(step))
    many.finish(RunEnd("completed", {"wall_s": 1.0}))
    first, last = warnings(caplog)
    assert "training goes on" in first
    assert "not written to MLflow at http://127.0.0.1:9: the run" in last and "1000 events" in last
    assert len(lines(tmp_path)) == 1000


def test_mlflow_that_hangs_is_waited_for_until_the_deadline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tracker = Mlflow(deadline=0.1)
        tracker.start(info(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}"))
        connection, _ = listener.accept()
        tracker.log(event(1))
        tracker.finish(RunEnd("completed"))
        connection.close()
    assert "still being written" in warnings(caplog)[-1] and "1 events" in warnings(caplog)[-1]


def test_a_store_that_comes_back_gets_the_backlog(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file where the store's folder must be: MLflow fails until it is gone, then has every event."""
    from mlflow import MlflowClient

    blocked = tmp_path / "store"
    blocked.write_text("")
    tracker = Mlflow()
    tracker.start(info(tmp_path))
    for step in range(1, 21):
        tracker.log(event(step))
    while not warnings(caplog):
        time.sleep(0.01)
    blocked.unlink()
    while tracker.run_id is None:
        time.sleep(0.01)
    tracker.finish(RunEnd("completed"))
    assert tracker.run_id and len(warnings(caplog)) == 1
    history = MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db").get_metric_history(tracker.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 21))


def test_the_backlog_is_bounded_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BACKLOG", 50)
    tracker = Mlflow()
    tracker.start(info(tmp_path, "http://127.0.0.1:9"))
    for step in range(1, 201):
        tracker.log(event(step))
    tracker.finish(RunEnd("completed"))
    messages = warnings(caplog)
    assert sum("are left out" in message for message in messages) == 1
    assert "200 events" in messages[-1]


def test_a_thread_that_rests_keeps_order_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a rest that would outlast the test: whatever waits is written at once when the run ends."""
    monkeypatch.setattr(writer, "LONGEST_REST", math.inf)
    monkeypatch.setattr(writer, "REST", 1e6)
    tracker = Mlflow()
    tracker.start(info(tmp_path))
    tracker.log(event(1))
    while tracker._events:  # the first one is taken, and then the thread rests
        time.sleep(0.01)
    for step in range(2, 3 * writer.EVENTS_A_BATCH):
        tracker.log(event(step))
    tracker.finish(RunEnd("completed"))
    assert not warnings(caplog)
    from mlflow import MlflowClient

    assert tracker.run_id
    history = MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db").get_metric_history(tracker.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 3 * writer.EVENTS_A_BATCH))


def test_what_the_end_has_no_time_for_is_written_without_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "EVENTS_A_BATCH", 1)
    monkeypatch.setattr(writer, "LONGEST_REST", math.inf)
    monkeypatch.setattr(writer, "REST", 1e6)
    tracker = Mlflow(deadline=1e-6)
    for step in range(1, 5):
        tracker.log(event(step))
    tracker.start(info(tmp_path))
    while tracker._events:
        time.sleep(0.01)
    tracker.finish(RunEnd("completed"))


def train(folder: Path) -> None:
    tracker = Mlflow()
    tracker.start(info(folder))
    tracker.log(event(1))
    tracker.finish(RunEnd("completed"))


def test_two_runs_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    starts = multiprocessing.get_context("spawn")
    runs = [starts.Process(target=train, args=(tmp_path,)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(100)
    client = MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db")
    experiment = client.get_experiment_by_name("distgd")
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    assert [(one.info.status, one.data.metrics["train/loss"]) for one in found] == [("FINISHED", 1.0)] * 2


def test_a_series_a_worker_up_to_sixteen() -> None:
    assert per_worker("time/compute", {3: 2.0, 0: 1.0}) == {"time/compute/worker_0": 1.0, "time/compute/worker_3": 2.0}
    assert len(per_worker("time/compute", dict.fromkeys(range(16), 1.0))) == 16
    many = {worker: float(worker) for worker in range(17)}
    assert per_worker("t", many) == {"t/min": 0.0, "t/median": 8.0, "t/max": 16.0}
    assert per_worker("t", {}) == {}


def test_a_relative_store_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    for uri in ("sqlite:////data/mlflow.db", "http://127.0.0.1:5000", "postgresql://host/db"):
        assert absolute(uri) == uri


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "sqlite:///nowhere.db"])
def test_ui_refuses_what_it_cannot_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"tracking\.uri"):
        ui(uri, 5000)
    assert not list(tmp_path.iterdir())


def test_the_callers_settings_of_mlflow_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    tracker = Mlflow()
    tracker.start(info(tmp_path))
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    tracker.finish(RunEnd("completed"))
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
