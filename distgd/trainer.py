"""A run from start to finish.

    prepare   config and task are checked, the driver's model is built, one slot is tried    (distgd.prepare)
    start     the run folder, the trackers, the cluster; everybody reports that it is ready
    train     messages go to the driver's state machine, its effects are performed
    finish    the last weights, the figure, the result; the cluster ends, whatever happened

What a run leaves: `config.yaml`, `metrics.jsonl`, `ledger.jsonl`, `model.safetensors`, `report/` in its folder, and
MLflow's own store. Committed steps of a run that failed are in the first three; its weights are lost.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from distgd.cluster import Cluster
from distgd.config import Config, load
from distgd.errors import BadInput, blaming
from distgd.plan import Plan
from distgd.prepare import prepare
from distgd.result import Result
from distgd.resume import find, finished, in_place, resumed
from distgd.run import Run, Watch
from distgd.runfolder import Start, begin, give_back, missing, new_folder, refused_by_disk
from distgd.runstore import run_store
from distgd.signals import interruptible
from distgd.sources import undisturbed
from distgd.stopping import Stop
from distgd.tasks import Pieces, Task, tracker
from distgd.tracking import absolute, active_run

__all__ = ["Plan", "Result", "Watch", "launch", "new_folder", "prepare", "train"]

log = logging.getLogger("distgd.trainer")


def train(
    config: str | Path | Mapping[str, Any] | Config,
    *overrides: str,
    model: Any = None,
    loss: Any = None,
    train_data: Any = None,
    eval_data: Any = None,
    metrics: Any = None,
    evaluate: Any = None,
    collate: Any = None,
    task: Task | None = None,
    on_event: Watch | None = None,
    resume: str = "never",
) -> Result:
    """Train what `config` says: a path, a mapping or a `Config`, with `section.key=value` overrides behind it.

    The task is the config's, or given here: piece by piece, or as one object. The pieces mean what a task's methods of
    these names do (`distgd.tasks`), and data may be given as it is. They travel to the processes of the run by pickle;
    prefer functions that build model and data there to large objects.

    >>> result = train("configs/quickstart.yaml", "cluster.workers=4")  # doctest: +SKIP
    >>> model.load_state_dict(result.state_dict)  # doctest: +SKIP

    Args:
        model: a `torch.nn.Module`, or a class or function that makes one; built after torch has been seeded.
        loss: (model, batch) -> the mean over the samples, a scalar; or (mean, weight) where it is over other things.
        train_data, eval_data: a tensor, a tuple or dict of tensors, a map-style dataset, or a function that returns it.
        metrics: (model, batch) -> {name: a value a sample, or a mean over the batch}.
        evaluate: (model, batches) -> {name: number}, over the whole held-out set.
        collate: a batch from a list of a dataset's samples.
        task: all of these as the methods of one object.
        on_event: sees every committed step, evaluation and fault, here in the driver's thread, as `metrics.jsonl` has
            it. It ends the run cleanly by returning `distgd.Stop("why")`; an exception in it fails the run.
        resume: `auto` goes on from the newest whole checkpoint of the run that `run.name` names, and begins one where
            there is none; the folder of a checkpoint goes on from there; `never` is a new run.

    Raises:
        BadInput: nothing was started.
        Diverged, RunFailed, Interrupted: with `.result`, which says what was reached.
    """
    began = time.time()
    if not isinstance(config, str | Path | Mapping | Config) or not all(isinstance(o, str) for o in overrides):
        do = 'such as train("run.yaml", "batch.size=64")'
        raise BadInput.at("train", "a path, a mapping or a Config, then overrides as text", [config, *overrides], do)
    if isinstance(task, type):
        raise BadInput.at("task", "an object", task.__name__, f"make one: task={task.__name__}(...)")
    pieces = {
        "model": model,
        "loss": loss,
        "train_data": train_data,
        "eval_data": eval_data,
        "metrics": metrics,
        "evaluate": evaluate,
        "collate": collate,
    }
    given = {name: piece for name, piece in pieces.items() if piece is not None}
    if given and task is not None:
        raise BadInput.at("task", "either task= or the pieces of one", ["task", *given], "leave one of them out")
    if given:
        task = cast(Task, Pieces(**given))
    if on_event is not None and not callable(on_event):
        raise BadInput.at("on_event", "a function of an event", on_event, "give the function itself")
    if task is not None:  # on record it is the object, whatever the config names
        overrides += (f"task={json.dumps(_origin(task))}",)
    name = Path(config).stem if isinstance(config, str | Path) else "run"
    watch = _recorded_only(on_event) if on_event is not None else lambda event: None
    return launch(load(config, overrides, os.environ), name, watch, task=task, began=began, resume=resume)


def _origin(task: Task) -> dict[str, str]:
    if isinstance(task, Pieces):
        return task.origin()
    return {"path": f"{type(task).__module__}:{type(task).__qualname__}"}


def _recorded_only(on_event: Watch) -> Watch:
    """Pass on the events that `metrics.jsonl` has, as copies that may be changed."""

    def watch(event: dict[str, Any]) -> object:
        if event["event"] == "start":
            return None
        with blaming("on_event", "a function that takes every event"):
            answer = on_event({**event, "metrics": dict(event["metrics"])})
        if answer is Stop:
            raise BadInput.described("on_event", "a Stop or None", "the class itself", 'return distgd.Stop("why")')
        return answer

    return watch


def launch(
    config: Config,
    name: str,
    watch: Watch,
    *,
    task: Task | None = None,
    began: float | None = None,
    cluster: Cluster | None = None,
    resume: str = "never",
) -> Result:
    """`train` with the config resolved; `watch` sees every event on the driver, the start among them.

    Args:
        name: begins the run folder's name where the config does not give one.
        began: when it all started, seconds since the epoch; now where unset.
        cluster: where processes live, if not where the config says.
    """
    with undisturbed():
        config, parent = _in_active_run(config)
        config = _absolute(config)
        found = None if resume == "never" else find(config, resume)
        plan = prepare(config if found is None else in_place(config, found), task, name)
        also = [tracker(path) for path in plan.config.tracking.also]
        goes_on = resumed(found, plan)
        if found is not None and (done := finished(found, plan)) is not None:
            return done
        made = missing(Path(plan.config.run.storage))
        run_dir = new_folder(plan.config, name) if found is None else found.run_dir
        if found is None:
            _check_store(plan.config, run_dir, made)
        made = made if found is None else []
        run = Run(
            plan, run_dir, watch, began if began is not None else time.time(), parent, also, _begun(run_dir, made)
        )
        run.made = made
        run.found, run.goes_on = found, goes_on
        with interruptible(lambda: run.closing) as run.signals:
            return run.execute(cluster)


def _check_store(config: Config, run_dir: Path, made: Sequence[Path]) -> None:
    """Nothing of that name may be in the object store, if there is one."""
    try:
        if (store := run_store(config, run_dir)) is not None:
            store.check_new()
    except BadInput:
        give_back(run_dir, made)
        raise


def _begun(run_dir: Path, made: Sequence[Path]) -> Start:
    """A start on a run folder; one that nothing can be written to is given back, where it was `made`."""
    try:
        return begin(run_dir)
    except OSError as error:
        refused = refused_by_disk(error, run_dir)
        if made:
            give_back(run_dir, made)
        raise refused or error from error


def _in_active_run(config: Config) -> tuple[Config, str | None]:
    """A run that this process has open in MLflow becomes the parent; where the config is silent, its store is used."""
    tracking, active = config.tracking, active_run()
    if active is None or tracking.uri == "none":
        return config, None
    given = tracking.model_fields_set
    if "uri" in given and absolute(tracking.uri) != active.uri:
        where = absolute(tracking.uri)
        log.warning("MLflow: the active run is in %s, and tracking.uri is %s; it is no parent", active.uri, where)
        return config, None
    experiment = tracking.experiment if "experiment" in given else active.experiment
    changed = tracking.model_copy(update={"uri": active.uri, "experiment": experiment})
    return config.model_copy(update={"tracking": changed}), active.run_id


def _absolute(config: Config) -> Config:
    """Paths are relative to the current folder; from here on they are absolute."""
    changed = {
        "run": config.run.model_copy(update={"storage": str(Path(config.run.storage).absolute())}),
        "data": config.data.absolute(),
        "faults": config.faults.model_copy(
            update={"plan": config.faults.plan and str(Path(config.faults.plan).absolute())}
        ),
        "tracking": config.tracking.model_copy(update={"uri": absolute(config.tracking.uri)}),
    }
    return config.model_copy(update=changed)
