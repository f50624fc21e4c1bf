"""One run in one MLflow store, in MLflow's words and within its limits."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distgd.records import Event, RunEnd, RunInfo
from distgd.records import events as recorded
from distgd.tracking.export import ExportError, export

log = logging.getLogger("distgd.tracking")

METRICS_A_CALL, PARAMS_A_CALL, PARAM_LENGTH, KEY_LENGTH, DIGEST_LENGTH = (1000, 100, 6000, 250, 36)
"""MLflow's own limits. At these lengths neither call comes near its limit of 1 MB."""

STATUS = {
    "completed": "FINISHED",
    "stopped": "FINISHED",
    "interrupted": "KILLED",
    "preempted": "KILLED",
    "failed": "FAILED",
    "diverged": "FAILED",
}

CLIENT_SETTINGS = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the writer tries again itself, and knows when to give up
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to `--json`
}
"""What MLflow's client is told through the environment. A variable that is set already is left as it is."""

COMPARED = ("wall_s", "start_s", "samples_per_s")
"""Numbers of a result by which runs are compared, as metrics; all others are tags."""

TOLD = ("run_id",)
"""Tags of the run from its start. What is said of the bits may change with the end."""

REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_DOES_NOT_EXIST"}


def refused(error: Exception) -> bool:
    """Whether trying again cannot help."""
    return isinstance(error, ExportError) or getattr(error, "error_code", None) in REFUSED


class Store:
    """One run in one MLflow store, through MLflow's client. Each method may raise and may be called again."""

    def __init__(self, info: RunInfo) -> None:
        self.uri = absolute(info.uri)
        self.run_id: str | None = None
        self.goes_on = False  # whether it was there before
        self._info = info
        self._started_ms = int(time.time() * 1000)
        self._last_step = 0
        self._client: Any = None
        self._experiment_id = ""

    def open(self) -> None:
        """Find a run that goes on; else make it, and the store and the experiment where they are missing."""
        from mlflow import MlflowClient

        file = sqlite_file(self.uri)
        with _alone(file):
            if file is not None and not file.exists():
                _make(file)
            self._client = MlflowClient(self.uri)
            self._experiment_id = self._experiment()
        if self._found():
            return
        tags = {"mlflow.parentRunId": self._info.parent} if self._info.parent else {}
        run = self._client.create_run(
            self._experiment_id, start_time=self._started_ms, tags=tags, run_name=self._info.name
        )
        part = self._note.with_suffix(".part")  # a kill leaves the whole note or none
        part.write_text(json.dumps({"uri": self.uri, "run_id": run.info.run_id}), encoding="utf-8")
        part.replace(self._note)
        self.run_id = run.info.run_id

    @property
    def _note(self) -> Path:
        """Where the run folder says which run of MLflow it is."""
        return self._info.run_dir / "mlflow.json"

    def _found(self) -> bool:
        """Whether a run that goes on is here already; its clock goes on, too."""
        from mlflow import MlflowException

        if self._info.logged is None:
            return False
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            if note["uri"] != self.uri:
                return False
            run = self._client.get_run(note["run_id"])
            self._client.update_run(run.info.run_id, status="RUNNING")
        except (OSError, ValueError, KeyError, TypeError):
            return False
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self._started_ms, self._experiment_id = run.info.start_time, run.info.experiment_id
        self.run_id, self.goes_on = run.info.run_id, True
        return True

    def behind(self, every: int) -> list[Event]:
        """What a run that goes on has in its folder and not here: a kill came before it was written."""
        if not self.goes_on or self._info.logged is None:
            return []
        have = max((m.step for m in self._client.get_metric_history(self.run_id, "train/loss")), default=0)
        scored = max((m.step for m in self._client.get_metric_history(self.run_id, "eval/loss")), default=0)
        upto = self._info.logged
        return [
            event
            for event in recorded(self._info.run_dir / "metrics.jsonl")
            if (event["event"] == "step" and have < event["step"] <= upto.get("step", 0) and not event["step"] % every)
            or (event["event"] == "eval" and scored < event["step"] <= upto.get("eval", 0))
        ]

    def _experiment(self) -> str:
        from mlflow import MlflowException

        name = self._info.experiment
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_location=self._artifacts()))
        except MlflowException:
            # Another run may have made it since; if not, the experiment cannot be made and the error stands.
            if found := self._client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def _artifacts(self) -> str | None:
        """Beside a SQLite file, whatever the current folder is; else where the server puts them."""
        file = sqlite_file(self.uri)
        return (file.parent / "mlruns").as_uri() if file else None

    def describe(self) -> None:
        """Params, tags and the data."""
        from mlflow.entities import Param, RunTag

        if self.goes_on:  # what may have changed since, such as when to stop, MLflow would not take
            return
        params = [Param(_key(name), str(value)[:PARAM_LENGTH]) for name, value in self._info.params.items()]
        tags = [RunTag(_key(name), value) for name, value in {"run_id": self._info.run_id, **self._info.tags}.items()]
        self._client.log_batch(self.run_id, tags=tags, synchronous=True)
        for chunk in _chunks(params, PARAMS_A_CALL):
            self._client.log_batch(self.run_id, params=chunk, synchronous=True)
        if self._info.data:
            self._client.log_inputs(self.run_id, [_dataset(self._info.data)])

    def write(self, events: Iterable[Event]) -> None:
        """The events' metrics, each at its own step and at the time `start + seconds`; an end only repeats the last."""
        metrics = []
        for event in events:
            self._last_step = max(self._last_step, event["step"])
            if event["event"] == "end":
                continue
            metrics += self._metrics(event["metrics"], event["step"], event["seconds"])
        for chunk in _chunks(metrics, METRICS_A_CALL):
            self._client.log_batch(self.run_id, metrics=chunk, synchronous=True)

    def _metrics(self, values: Mapping[str, Any], step: int, seconds: float) -> list[Any]:
        from mlflow.entities import Metric

        at = self._started_ms + int(seconds * 1000)
        return [Metric(_key(name), float(value), at, step) for name, value in values.items()]

    def closing(self, end: RunEnd) -> list[tuple[str, Callable[[], None]]]:
        """What is left to do when the run has ended, the quick and important first: a kill in between loses least."""
        calls: list[tuple[str, Callable[[], None]]] = [
            ("the result", partial(self._result, end.result)),
            ("the status", lambda: self._client.set_terminated(self.run_id, STATUS.get(end.status, "FAILED"))),
        ]
        if end.report:
            calls.append(("the report", partial(self._client.log_artifacts, self.run_id, str(end.report), "report")))
        for file in end.weights:
            calls.append((file.name, partial(self._client.log_artifact, self.run_id, str(file))))
        if end.model is not None:
            calls.append(("the model", partial(self._model, end.model, end.example)))
        return calls

    def _result(self, result: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        # A name with a slash is a curve that is there already; a metric is drawn as one, so that most are tags.
        plain = {k: value for k, value in result.items() if "/" not in k and isinstance(value, (int, float, str))}
        numbers = {f"result/{name}": plain.pop(name) for name in COMPARED if name in plain}
        tags = [RunTag(_key(f"result.{name}"), str(value)) for name, value in plain.items() if name not in TOLD]
        if result.get("faults"):  # a run that goes on may have begun without
            tags.append(RunTag("faults", "injected"))
        if "bits" in result:  # what was said at the start may not hold any more
            tags.append(RunTag("bits", str(result["bits"])))
        metrics = self._metrics(numbers, self._last_step, time.time() - self._started_ms / 1000)
        self._client.log_batch(self.run_id, metrics=metrics, tags=tags, synchronous=True)

    def _model(self, model: Any, example: Any) -> None:
        """Log the model: `mlflow.pytorch.load_model("runs:/RUN/model")` needs torch and mlflow, no distgd."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        with tempfile.TemporaryDirectory() as folder:
            path, meta = Path(folder, "model"), Model(run_id=self.run_id)
            export(model, example, path, meta)
            logged = self._client.create_logged_model(self._experiment_id, "model", source_run_id=self.run_id)
            meta.model_id, meta.artifact_path = (logged.model_id, logged.artifact_location)
            meta.save(str(path / "MLmodel"))
            self._client.log_model_artifacts(logged.model_id, str(path))
            self._client.finalize_logged_model(logged.model_id, "READY")
            self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, self._last_step)])


def _dataset(data: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    schema = data.get("schema")
    dataset = Dataset(
        name=str(data["name"]),
        digest=str(data["digest"])[:DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"name": data["name"]}),
        schema=schema if isinstance(schema, str | None) else json.dumps(schema),
        profile=json.dumps({"num_rows": data["samples"]}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _key(name: str) -> str:
    """A name as MLflow allows it."""
    return re.sub(r"[^\w\-./ :]", "_", name)[:KEY_LENGTH]


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for another store, and for one in memory."""
    parts = urlsplit(uri)
    return Path(parts.path[1:]) if parts.scheme == "sqlite" and len(parts.path) > 1 else None


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """One process at a time in the folder of a SQLite store, made if missing.

    MLflow locks the making of its tables only: a second run that comes during the migrations breaks both.
    """
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _make(file: Path) -> None:
    """Make the tables of a SQLite store beside its place: a kill in between would leave half of them there for good."""
    from mlflow import MlflowClient

    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{part}").search_experiments(max_results=1)
    part.replace(file)


def absolute(uri: str) -> str:
    """The store's URI with a relative SQLite path made absolute against the current folder; others are unchanged.

    >>> absolute("http://mlflow:5000")
    'http://mlflow:5000'
    """
    file = sqlite_file(uri)
    return f"sqlite:///{file.absolute()}" if file else uri
