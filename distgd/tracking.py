"""A run in MLflow. The only module that imports it, and only on the thread that writes: that takes seconds.

MLflow can neither stall nor kill training: events wait in a bounded list, an unreachable store is one warning, and what
could not be written is named at the end. `Store` is one run in MLflow's words and limits; `Mlflow` is the tracker.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distgd.errors import BadInput
from distgd.records import Event, RunEnd, RunInfo

log = logging.getLogger("distgd.tracking")

METRICS_A_CALL, PARAMS_A_CALL, PARAM_LENGTH, KEY_LENGTH, DIGEST_LENGTH = (1000, 100, 6000, 250, 36)
"""MLflow's own limits. At these lengths neither call comes near its limit of 1 MB."""

STATUS = {
    "completed": "FINISHED",
    "stopped": "FINISHED",
    "interrupted": "KILLED",
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

REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_DOES_NOT_EXIST"}


@dataclass(frozen=True)
class ActiveRun:
    """A run that this process has open in MLflow (`mlflow.start_run`): its store, its experiment's name, its id."""

    uri: str
    experiment: str
    run_id: str


def active_run() -> ActiveRun | None:
    """The run that this thread has open in MLflow; None without one, and where MLflow is not even imported."""
    mlflow = sys.modules.get("mlflow")
    run = mlflow.active_run() if mlflow is not None else None
    if mlflow is None or run is None:
        return None
    try:
        experiment = mlflow.MlflowClient().get_experiment(run.info.experiment_id).name
    except Exception as error:  # noqa: BLE001 - an unreachable store must not keep a run from starting
        log.warning("MLflow: the active run %s could not be read: %s; it is no parent", run.info.run_id, error)
        return None
    return ActiveRun(absolute(mlflow.get_tracking_uri()), experiment, run.info.run_id)


class _ExportError(Exception):
    """The model has no form that loads in plain torch."""


def refused(error: Exception) -> bool:
    """Whether trying again cannot help."""
    return isinstance(error, _ExportError) or getattr(error, "error_code", None) in REFUSED


class Store:
    """One run in one MLflow store, through MLflow's client. Each method may raise and may be called again."""

    def __init__(self, info: RunInfo) -> None:
        self.uri = absolute(info.uri)
        self.run_id: str | None = None
        self._info = info
        self._started_ms = int(time.time() * 1000)
        self._last_step = 0
        self._client: Any = None
        self._experiment_id = ""

    def open(self) -> None:
        """Create the run, and before it the store and the experiment where they are missing."""
        from mlflow import MlflowClient

        with _alone(_sqlite_file(self.uri)):
            self._client = MlflowClient(self.uri)
            self._experiment_id = self._experiment()
        tags = {"mlflow.parentRunId": self._info.parent} if self._info.parent else {}
        run = self._client.create_run(
            self._experiment_id, start_time=self._started_ms, tags=tags, run_name=self._info.name
        )
        self.run_id = run.info.run_id

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
        file = _sqlite_file(self.uri)
        return (file.parent / "mlruns").as_uri() if file else None

    def describe(self) -> None:
        """Params, tags and the data."""
        from mlflow.entities import Param, RunTag

        params = [Param(_key(name), str(value)[:PARAM_LENGTH]) for name, value in self._info.params.items()]
        tags = [RunTag(_key(name), value) for name, value in {"run_id": self._info.run_id, **self._info.tags}.items()]
        self._client.log_batch(self.run_id, tags=tags, synchronous=True)
        for chunk in _chunks(params, PARAMS_A_CALL):
            self._client.log_batch(self.run_id, params=chunk, synchronous=True)
        if self._info.data:
            self._client.log_inputs(self.run_id, [_dataset(self._info.data)])

    def write(self, events: Iterable[Event]) -> None:
        """The events' metrics, each at its own step and at the time `start + seconds`."""
        metrics = []
        for event in events:
            self._last_step = max(self._last_step, event["step"])
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

        # A name with a slash is a curve that is there already.
        plain = {name: value for name, value in result.items() if "/" not in name and not isinstance(value, bool)}
        numbers = {f"result/{name}": value for name, value in plain.items() if isinstance(value, (int, float))}
        tags = [RunTag(_key(f"result.{name}"), value) for name, value in plain.items() if isinstance(value, str)]
        metrics = self._metrics(numbers, self._last_step, time.time() - self._started_ms / 1000)
        self._client.log_batch(self.run_id, metrics=metrics, tags=tags, synchronous=True)

    def _model(self, model: Any, example: Any) -> None:
        """Log the model: `mlflow.pytorch.load_model("runs:/RUN/model")` needs torch and mlflow, no distgd."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        with tempfile.TemporaryDirectory() as folder:
            path, meta = Path(folder, "model"), Model(run_id=self.run_id)
            _export(model, example, path, meta)
            logged = self._client.create_logged_model(self._experiment_id, "model", source_run_id=self.run_id)
            meta.model_id, meta.artifact_path = (logged.model_id, logged.artifact_location)
            meta.save(str(path / "MLmodel"))
            self._client.log_model_artifacts(logged.model_id, str(path))
            self._client.finalize_logged_model(logged.model_id, "READY")
            self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, self._last_step)])


def _export(model: Any, example: Any, path: Path, meta: Any) -> None:
    """Save the model as a `torch.export` program (`pt2`): a graph and its weights, no code of ours and no pickle.

    The batch dimension stays free (an example of one row is doubled, for torch.export would fix a 1), all others are
    as in the example. The program is the model in evaluation mode.
    """
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import infer_signature

    if example is None:
        raise _ExportError("no example of its input; its weights are in model.safetensors")
    try:
        batch = torch.as_tensor(example).detach().cpu().numpy()
        rows = np.resize(batch, (2, *batch.shape[1:]))
        model = model.cpu().eval()
        with torch.no_grad():
            out = model(torch.from_numpy(rows))
        mlflow.pytorch.save_model(
            model,
            str(path),
            mlflow_model=meta,
            signature=infer_signature(rows, out.numpy() if isinstance(out, torch.Tensor) else None),
            input_example=rows,
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
            serialization_format="pt2",
        )
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _ExportError(f"torch.export cannot: {reason}; its weights are in model.safetensors") from error


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


def _sqlite_file(uri: str) -> Path | None:
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


def absolute(uri: str) -> str:
    """The store's URI with a relative SQLite path made absolute against the current folder; others are unchanged.

    >>> absolute("http://mlflow:5000")
    'http://mlflow:5000'
    """
    file = _sqlite_file(uri)
    return f"sqlite:///{file.absolute()}" if file else uri


def ui(uri: str, port: int) -> int:
    """Serve MLflow's pages for a local store on 127.0.0.1 until Ctrl-C; the server's exit code, 0 after Ctrl-C.

    Raises BadInput for a store that is not there, which MLflow would create empty, and for one with a server already.
    """
    if urlsplit(uri).scheme in ("http", "https"):
        raise BadInput.at("tracking.uri", "a database", uri, "this store has a server: open that address in a browser")
    file = _sqlite_file(absolute(uri))
    if file and not file.exists():
        raise BadInput.at("tracking.uri", "an MLflow store", uri, "train first, or go to the folder of the run")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", absolute(uri)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**CLIENT_SETTINGS, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    with subprocess.Popen(command, env=environment) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.send_signal(signal.SIGINT)
            server.wait(10)
            return 0
        finally:
            server.terminate()


@dataclass
class ParentRun:
    """A run in MLflow that others belong to: its id, None where MLflow is off or away, and the end to be written."""

    run_id: str | None
    end: RunEnd


@contextmanager
def parent_run(info: RunInfo) -> Iterator[ParentRun]:
    """A run in MLflow that is this process's active one meanwhile: runs that start become its children.

    Nothing here ends what it tracks: a store that does not answer is a warning. The URI `none` is no run at all. Unlike
    a run's own tracker it is written on the caller's thread, at the beginning and at the end.
    """
    parent = ParentRun(None, RunEnd("failed"))
    with _client_settings():
        store = _opened(info) if info.uri != "none" else None
        if store is None:
            yield parent
            return
        parent.run_id = store.run_id
        try:
            with _active(store):
                yield parent
        finally:
            for what, call in store.closing(parent.end):
                _or_warn(what, call)


def _opened(info: RunInfo) -> Store | None:
    active = active_run()
    store = Store(replace(info, parent=active.run_id if active and active.uri == absolute(info.uri) else None))
    _or_warn("the parent run", store.open)
    if store.run_id is None:
        return None
    _or_warn("params and tags", store.describe)
    return store


@contextmanager
def _active(store: Store) -> Iterator[None]:
    """MLflow's active run, as `mlflow.start_run` makes it; its store is the process's own meanwhile."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # MLflow keeps it there as well
    mlflow.set_tracking_uri(store.uri)
    active = _or_warn("the active run", lambda: mlflow.start_run(run_id=store.run_id, nested=True))
    try:
        yield
    finally:
        if active:
            _or_warn("the active run's end", mlflow.end_run)
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None: as if it had never been set


def _or_warn(what: str, call: Callable[[], object]) -> bool:
    """Call; whether it succeeded."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not end what is tracked
        reason = (str(error) or type(error).__name__).splitlines()[0]
        log.warning("MLflow: %s could not be written: %s", what, reason)
        return False
    return True


@contextmanager
def _client_settings() -> Iterator[None]:
    """`CLIENT_SETTINGS` in the environment."""
    new = {name: value for name, value in CLIENT_SETTINGS.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


BACKLOG = 10_000
"""Events that wait for MLflow at most; more are dropped from MLflow and counted."""

EVENTS_A_BATCH = 500

RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 30.0


class Mlflow:
    """A run in MLflow: params, data, tags, curves, the figure, the weights and a model that loads back in plain torch.

    All of MLflow happens on one thread; `log` only appends to a list in memory. While MLflow does not answer the list
    grows to `BACKLOG` events and everything is tried again, with one warning a run. Of the steps, every
    `every_steps`-th event is logged as it is (no mean over the window), and the first and the last; all other events
    are logged. `metrics.jsonl` has the rest.

    On a SQLite store that does not exist yet, the tables are made, and artifacts go to the folder `mlruns` beside it.

    Args:
        every_steps: about the planned steps / 1,000; None where their number is not known: points get rarer as the run
            goes on, about 700 for 1,000 steps and 2,400 for a million.
        every_seconds: takes the place of `every_steps` where it is given.
        deadline: seconds that `finish` waits at most. A store that never answered is not waited for.
    """

    def __init__(self, every_steps: int | None = 1, every_seconds: float | None = None, deadline: float = 60.0) -> None:
        self._every = every_steps
        self._every_seconds = every_seconds
        self._shown, self._shown_step = 0.0, 0
        self._settings: list[str] = []  # variables that were set here, and are taken back
        self._deadline = deadline
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._thinned: Event | None = None
        self._end: RunEnd | None = None
        self._until = math.inf
        self._unwritten: list[str] = []
        self._warned = False
        self._thread: threading.Thread | None = None
        self._store: Store | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once the run exists there."""
        return self._store.run_id if self._store else None

    def start(self, info: RunInfo) -> None:
        for name, value in CLIENT_SETTINGS.items():
            if name not in os.environ:
                os.environ[name] = value
                self._settings.append(name)
        self._store = Store(info)
        self._thread = threading.Thread(target=self._write, args=(self._store,), name="distgd-mlflow", daemon=True)
        self._thread.start()

    def log(self, event: Event) -> None:
        if event["event"] == "step" and not self._due(event):
            self._thinned = event
            return
        if event["event"] == "step":
            self._thinned = None
            self._shown, self._shown_step = event["seconds"], event["step"]
        self._append(event)

    def _due(self, event: Event) -> bool:
        if event["step"] == 1:
            return True
        if self._every_seconds is not None:
            return bool(event["seconds"] >= self._shown + self._every_seconds)
        if self._every is None:
            return bool(event["step"] >= self._shown_step + max(1, event["step"] // 250))
        return bool(event["step"] % self._every == 0)

    def _append(self, event: Event) -> None:
        with self._changed:
            if len(self._events) < BACKLOG:
                self._events.append(event)
                self._changed.notify()
                return
            self._dropped += 1
        if self._dropped == 1:
            log.warning("MLflow is %d events behind; more are left out there, metrics.jsonl has them all", BACKLOG)

    def finish(self, end: RunEnd) -> None:
        """Write what is left, for at most `deadline` seconds, and name in a warning what was not written."""
        if self._thread is None:
            return
        if self._thinned is not None:
            self._append(self._thinned)
        with self._changed:
            self._end = end
            self._until = time.monotonic() + self._deadline
            self._changed.notify()
        self._thread.join(self._deadline)
        for name in self._settings:
            os.environ.pop(name, None)
        self._warned = True  # the thread has nothing more to say: what is missing is named here
        missing = [*self._unwritten]
        if self._thread.is_alive():
            missing.append(f"what was still being written after {self._deadline:.0f} s")
        if waiting := len(self._events) + self._dropped:
            missing.append(f"{waiting} events")
        if missing:
            log.warning("not written to MLflow at %s: %s", self._store and self._store.uri, ", ".join(missing))

    def _write(self, store: Store) -> None:
        """The thread: open the run, write events until the end is known and none is left, then what the run leaves."""
        self._try("the run", store.open)
        if store.run_id is None:
            return
        self._try("params, tags and data", store.describe)
        while batch := self._next_batch():
            self._try(f"{len(batch)} events", partial(store.write, batch))
        if self._end:
            for what, call in store.closing(self._end):
                self._try(what, call)

    def _next_batch(self) -> list[Event]:
        """Events in order, as many as make one call or so; none when the run has ended and all are written."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._end)
            return [self._events.popleft() for _ in range(min(len(self._events), EVENTS_A_BATCH))]

    def _try(self, what: str, call: Callable[[], None]) -> None:
        """Call until it succeeds, MLflow refuses it for good, or the run has ended and patience with it."""
        pause = RETRY_SECONDS
        while True:
            try:
                return call()
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the thread
                reason = (str(error) or type(error).__name__).splitlines()[0]
                if self.run_id is None or pause > RETRY_SECONDS:
                    self._warn(reason)
                if refused(error) or self._give_up():
                    return self._unwritten.append(f"{what} ({reason})")
            self._rest(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    def _rest(self, seconds: float) -> None:
        """Sleep, but wake up when the run ends."""
        with self._changed:
            before = self._end
            self._changed.wait_for(lambda: self._end is not before, seconds)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("MLflow: %s; training goes on and metrics.jsonl is complete", reason)

    def _give_up(self) -> bool:
        return self._end is not None and (self.run_id is None or time.monotonic() >= self._until)
