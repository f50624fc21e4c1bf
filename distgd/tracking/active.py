"""Runs that contain others: the one that this process has open in MLflow, and one that is opened for several."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from distgd.records import RunEnd, RunInfo
from distgd.tracking.store import CLIENT_SETTINGS, Store, absolute

log = logging.getLogger("distgd.tracking")


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
