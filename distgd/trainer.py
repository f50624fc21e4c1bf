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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from distgd import events as ev
from distgd import weights
from distgd.assignment import Cast
from distgd.checkpoint import Damaged, check
from distgd.cluster import Cluster, RayCluster
from distgd.config import Config, load
from distgd.driver import Account, Driver, Effect, Finish, Keep, Log, Recover, Resumed, Save, Spawn
from distgd.errors import (
    BadInput,
    DeadlineExceeded,
    DistgdError,
    Interrupted,
    Preempted,
    ProcessLost,
    RunFailed,
    blaming,
    users_error,
)
from distgd.inprocess import InProcessCluster
from distgd.keeping import Keeping
from distgd.layout import state
from distgd.plan import Plan
from distgd.prepare import prepare
from distgd.records import Jsonl, Many, Onwards, RunEnd, Tracker, logged
from distgd.report import write_report
from distgd.resources import by_role
from distgd.result import Result, summarize
from distgd.resume import Found, find, finished, in_place, resumed
from distgd.runfolder import Start, begin, give_back, mend, missing, new_folder, next_timeline, refused_by_disk
from distgd.runinfo import describe
from distgd.saving import Whole
from distgd.signals import Signals, Terminated, interruptible
from distgd.sources import undisturbed
from distgd.stopping import Stop
from distgd.tasks import Pieces, Task, tracker
from distgd.tracking import Mlflow, absolute, active_run

__all__ = ["Plan", "Result", "launch", "new_folder", "prepare", "train"]

log = logging.getLogger("distgd.trainer")

POINTS = 1000  # of each metric in MLflow, where the config does not say
LISTENING = 0.5  # seconds between two looks at what signals have been heard
RECOVERIES = 10  # attempts to bring all shards back, each ended by the loss of another one
LEAVING_SECONDS = 60.0  # that a signal's checkpoint may take
REST = 0.005  # seconds between two looks at what shards have committed
STATUS_SECONDS = 3.0  # how long processes get to say what they do before a deadline's error is written

Watch = Callable[[dict[str, Any]], object]
"""Sees every event on the driver; ends the run cleanly where it returns a `Stop`."""


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
        made = made if found is None else []
        run = _Run(
            plan, run_dir, watch, began if began is not None else time.time(), parent, also, _begun(run_dir, made)
        )
        run.made = made
        run.found, run.goes_on = found, goes_on
        with interruptible(lambda: run.closing) as run.signals:
            return run.execute(cluster)


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
        "tracking": config.tracking.model_copy(update={"uri": absolute(config.tracking.uri)}),
    }
    return config.model_copy(update=changed)


class _ShardLost(Exception):
    """A shard is gone while all of them are being brought back."""

    def __init__(self, incarnation: int) -> None:
        super().__init__(incarnation)
        self.incarnation = incarnation


class _Run:
    """The parts of one run and the order in which they begin and end."""

    def __init__(
        self,
        plan: Plan,
        run_dir: Path,
        watch: Watch,
        began: float,
        parent: str | None,
        also: list[Tracker],
        start: Start,
    ) -> None:
        self.signals = Signals(lambda: True)
        self.plan = plan
        self.run_dir = run_dir
        self.start = start
        self.found: Found | None = None  # the run that goes on
        self.goes_on: Resumed | None = None
        self.made: list[Path] = []  # folders that were made for the run folder
        self.watch = watch
        self.began = began
        self.parent = parent
        self.driver: Driver | None = None
        self.first_commit: float | None = None  # seconds since `began`
        self.closing = False
        self._cast = plan.cast(self.start.timeline)
        self.meanwhile: list[tuple[int, Any]] = []  # what arrived during a recovery and is not of it
        self.assignment = plan.assignment()
        self.mlflow = _mlflow(plan) if plan.config.tracking.uri != "none" else None
        self.tracker: Tracker = Many(Jsonl(), *([self.mlflow] if self.mlflow else []), *also)
        self.ledger: IO[str]
        self.keeping: Keeping | None = None
        self.files = ExitStack()
        self.files.enter_context(self.start.lock)
        self.final: dict[str, Tensor] = {}  # the last version, once it is here

    @property
    def cast(self) -> Cast:
        """Who plays what now."""
        return self.driver.cast if self.driver is not None else self._cast

    def execute(self, cluster: Cluster | None) -> Result:
        """Everything after the checks; the cluster is closed and the trackers are told, whatever happens."""
        error: DistgdError | None = None
        try:
            self._begin()
            self._train(cluster or _cluster(self.plan))
        except KeyboardInterrupt as heard:
            error = self._interrupted(heard)
        except Exception as raised:  # noqa: BLE001 - the trackers are told, whatever it is
            error = self._error(raised)
        self.closing = True  # the end of a run takes a bounded time, and is not cut in two
        try:
            self._save_final()
            self.files.close()
        except Exception as raised:  # noqa: BLE001 - likewise
            error = error or self._error(raised)
        if isinstance(error, BadInput) and self.first_commit is not None:
            error = RunFailed(str(error))
        result = self._finish(error)
        if isinstance(error, BadInput) and self.found is None:  # the same command, corrected, starts anew
            give_back(self.run_dir, self.made)
            raise error
        if error is not None:
            error.result = result
            raise error
        return result

    def _begin(self) -> None:
        """The run folder's files, the trackers, and what the plan warns of."""
        (self.run_dir / "config.yaml").write_text(self.plan.config.to_yaml(), encoding="utf-8")
        for name in ("ledger.jsonl", "metrics.jsonl"):
            mend(self.run_dir / name)
        ledger = (self.run_dir / "ledger.jsonl").open("a", buffering=1, encoding="utf-8")
        self.ledger = self.files.enter_context(ledger)
        order, mode = self.assignment.order, self.plan.config.consistency.mode
        if self.ledger.tell() == 0:
            whole = {"samples": order.samples, "batch": order.batch, "slots": order.slots, "mode": mode}
            self._write([{"state": "begin", **whole, "timeline": self.cast.timeline}])
        if self.plan.config.checkpoint.every is not None:
            begins = self.found.checkpoint if self.found else None
            self.keeping = Keeping(self.run_dir, self.start, self.plan, self.assignment, begins)
        self._tell({"event": "start", "headline": self.plan.headline(), "steps": self.plan.planned_steps})
        before = logged(self.run_dir / "metrics.jsonl") if self.found is not None else None
        self.tracker = Onwards(self.tracker, before or {})
        self.tracker.start(describe(self.plan, self.run_dir, self.parent, before))
        passed = [f"a damaged checkpoint was passed over: {why}" for why in (self.found.damaged if self.found else ())]
        for warning in (*self.plan.warnings, *passed):
            log.warning("%s", warning)
            at = {"step": 0, "version": 0, "samples": 0, "seconds": 0.0, "metrics": {}}
            self.tracker.log({"event": "warning", **at, "message": warning})

    def _error(self, raised: Exception) -> DistgdError:
        if isinstance(raised, DistgdError):
            return raised
        refused = refused_by_disk(raised, self.run_dir) if isinstance(raised, OSError) else None
        error = refused or RunFailed(users_error(raised))
        error.__cause__ = raised
        return error

    def _train(self, cluster: Cluster) -> None:
        try:
            cluster.spawn(self.plan.specs(self.cast, self.keeping.folder if self.keeping else None))
            self.signals.listen()  # Ray has taken them
            self._await_ready(cluster, self.cast, self.cast.everybody)
            finish = self._perform(cluster, self._start(cluster, self.cast, self.goes_on)) or self._listen(cluster)
            if finish.error is not None:
                raise finish.error
        finally:
            self.closing = True  # a second Ctrl-C waits for that
            with suppress(Exception):  # a cluster that did not come up has nobody to tell
                for incarnation in self.cast.everybody:
                    cluster.send(incarnation, ev.Stop(self.cast.timeline))
            cluster.close()
            self.closing = False

    def _await_ready(self, cluster: Cluster, cast: Cast, who: Collection[int]) -> None:
        waiting = set(who)
        for source, event in self._starting(cluster, cast, "to be ready", waiting):
            if isinstance(event, ev.ProcessReady):
                waiting.discard(source)
                log.info("%s is ready: %s", cast.name(source), event.facts)

    def _start(
        self, cluster: Cluster, cast: Cast, goes_on: Resumed | None, joining: Collection[int] = ()
    ) -> list[Effect]:
        """Give every shard its state, and begin; where checkpoints are kept, the first one is there before anything."""
        written = self._load(cluster, cast, goes_on)
        now, before = cluster.now(), self.driver
        driver = Driver(cast, self.assignment, now, cluster.nodes(), goes_on, joining)
        if before is not None:
            driver.tally.step_seconds, driver.tally.staleness = before.tally.step_seconds, before.tally.staleness
        self.driver = driver
        if self.keeping is not None:
            self.keeping.make(Whole(0, written, driver.progress()))
        if goes_on is not None or self.found is not None:
            self._write([account.line for account in driver.rolled_back(goes_on)])
        return driver.start(now)

    def _load(self, cluster: Cluster, cast: Cast, goes_on: Resumed | None) -> tuple[ev.ShardWritten, ...]:
        checkpoint = goes_on and (self.keeping.newest if self.keeping else self.found and self.found.checkpoint)
        folder = checkpoint.folder if checkpoint else None
        for shard, wanted in self.plan.loads(cast, folder, goes_on.version if goes_on else 0).items():
            cluster.send(shard, wanted)
        waiting = set(cast.shards)
        written: dict[int, ev.ShardWritten] = {}
        for source, event in self._starting(cluster, cast, "to have the weights", waiting):
            if isinstance(event, ev.ShardWritten) and event.timeline == cast.timeline:
                self._check_probe(event)
                written[event.shard] = event
            if isinstance(event, ev.Loaded if self.keeping is None else ev.ShardWritten):
                waiting -= {source} if event.timeline == cast.timeline else set()
        return tuple(written[shard] for shard in sorted(written))

    def _recover(self, cluster: Cluster, shard: int) -> list[Effect]:
        """Put another process in the place of a shard that is gone, and bring all of them back to the last checkpoint.

        Workers are not restarted: they are told of the new timeline, and wait. Who else is lost meanwhile is seen to:
        another shard in the same way, all others afterwards.
        """
        assert self.driver is not None
        assert self.keeping is not None
        cast, joining = self.driver.cast, self.driver.joining
        self.meanwhile.clear()
        for _ in range(RECOVERIES):
            self.keeping.start = next_timeline(self.run_dir, self.keeping.start)
            cluster.end(shard)
            new = max(cast.everybody) + 1
            cast = replace(cast.replaced(shard, new), timeline=self.keeping.start.timeline)
            try:
                cluster.add(new, self.plan.specs(cast, self.keeping.folder)[new])
                self._await_ready(cluster, cast, [new])
                for other in cast.everybody:
                    cluster.send(other, ev.TimelineBegun(cast.timeline, cast.shards))
                self.keeping.find()
                goes_on = resumed(Found(self.run_dir, self.keeping.newest), self.plan)
                effects = self._start(cluster, cast, goes_on, joining)
            except _ShardLost as lost:
                shard = lost.incarnation
                continue
            return [*effects, *(e for each in self.meanwhile for e in self.driver.handle(*each, cluster.now()))]
        raise ProcessLost(f"{RECOVERIES} times in a row another shard was gone before all had the weights again")

    def _check_probe(self, part: ev.ShardWritten) -> None:
        """What shards write must be there for the driver to read, and for whoever goes on."""
        assert self.keeping is not None
        found = part.error
        if not found:
            try:
                check(self.keeping.folder / part.folder / part.file, part.sha256, part.size)
            except Damaged as error:
                found = f"{error}, though shard {part.shard} has written it"
        if found:
            do = "set run.storage to a folder that all nodes share and can write, or checkpoint.every=null"
            raise BadInput.described("run.storage", "a folder for checkpoints", found, do)

    def _starting(self, cluster: Cluster, cast: Cast, what: str, waiting: set[int]) -> Iterator[tuple[int, Any]]:
        """What arrives while somebody is waited for; `waiting` gets smaller meanwhile."""
        began, seconds = cluster.now(), self.plan.config.cluster.start_seconds
        while waiting:
            arrived = cluster.receive(max(0.0, began + seconds - cluster.now()))
            if arrived is None:
                who = f"{', '.join(map(cast.name, sorted(waiting)))} {what}"
                do = "set cluster.start_timeout higher if building model and data takes longer"
                raise DeadlineExceeded.waiting(who, "start", cluster.now() - began, do)
            source, event = arrived
            if isinstance(event, ev.ProcessFailed) or (isinstance(event, ev.ProcessLost) and self.driver is None):
                driver = Driver(cast, self.assignment, cluster.now())
                finish = next((e for e in driver.handle(source, event, cluster.now()) if isinstance(e, Finish)), None)
                why = f": {event.why}" if isinstance(event, ev.ProcessLost) else ""
                did_not = RunFailed(f"{cast.name(source)} did not start{why}")
                raise finish.error if finish and finish.error else did_not
            if isinstance(event, ev.ProcessLost) and event.incarnation in cast.shards:
                raise _ShardLost(event.incarnation)
            if isinstance(event, ev.ProcessLost) or (isinstance(event, ev.ProcessReady) and source not in waiting):
                self.meanwhile.append((source, event))
            yield source, event

    def _listen(self, cluster: Cluster) -> Finish:
        reached, since = (0, 0, -1, 0), cluster.now()
        deadline = self.plan.config.cluster.deadline
        leaving: float | None = None  # since when
        self.signals.patient = True
        while True:
            driver, now = self.driver, cluster.now()
            assert driver is not None
            if self.signals.heard is not None and leaving is None:
                leaving = now
                finish = self._leave(cluster, driver, self.signals.heard)
                if finish is not None:
                    return finish
            if leaving is not None and now - leaving > LEAVING_SECONDS:
                log.warning("no checkpoint within %g s; what was committed since the last one is lost", LEAVING_SECONDS)
                return Finish(self._interrupted(self.signals.heard))
            arrived = cluster.receive(min(LISTENING, max(0.0, since + deadline - now)))
            if arrived is not None:
                if isinstance(arrived[1], ev.ProcessReady):
                    driver.nodes = cluster.nodes()
                finish = self._perform(cluster, driver.handle(*arrived, cluster.now()))
                if finish is not None:
                    return finish
            elif cluster.now() - since >= deadline:
                raise self._stuck(cluster, driver, cluster.now() - since)
            done = (driver.tally.versions, len(driver.final), driver.evaluations.version, driver.saving.version)
            if arrived is not None and (done != reached or driver.tally.steps >= driver.steps):
                reached, since = done, cluster.now()

    def _leave(self, cluster: Cluster, driver: Driver, heard: KeyboardInterrupt) -> Finish | None:
        """Begin to end the run for a signal: with a checkpoint, where it keeps any."""
        why = self._interrupted(heard)
        effects = driver.leave(why, cluster.now())
        return Finish(why) if effects is None else self._perform(cluster, effects)

    def _interrupted(self, heard: BaseException | None) -> Interrupted:
        kind, word = (Preempted, "SIGTERM") if isinstance(heard, Terminated) else (Interrupted, "interrupted")
        on = f"; --resume auto run.name={self.run_dir.name} goes on" if self.keeping is not None else ""
        return kind(f"{word}; what was committed so far is in {self.run_dir}{on}")

    def _stuck(self, cluster: Cluster, driver: Driver, seconds: float) -> DistgdError:
        """Ask everybody what they do, and make the error of it."""
        for incarnation in self.cast.everybody:
            cluster.send(incarnation, ev.StatusRequested(self.cast.timeline))
        answers: dict[int, str] = {}
        until = cluster.now() + STATUS_SECONDS
        while cluster.now() < until and (arrived := cluster.receive(until - cluster.now())):
            source, event = arrived
            if isinstance(event, ev.StatusSent):
                answers[source] = event.text
        lines = [
            f"  {self.cast.name(i)}: {answers.get(i, 'does not answer: it computes, or is stopped')}"
            for i in self.cast.everybody
        ]
        over = driver.tally.steps >= driver.steps
        who = "the last version to be sent and evaluated" if over else f"step {driver.tally.steps} to be committed"
        do = f"set cluster.deadline higher than {self.plan.config.cluster.deadline:g} s if that is what they need"
        phase = "evaluate" if over else "train"
        return DeadlineExceeded.waiting(who, phase, seconds, f"{do}; what each process does:\n" + "\n".join(lines))

    def _perform(self, cluster: Cluster, effects: list[Effect]) -> Finish | None:
        stop: Stop | None = None
        if lines := [effect.line for effect in effects if isinstance(effect, Account)]:
            self._write(lines)
        for effect in effects:
            match effect:
                case ev.Send(to, message):
                    cluster.send(to, message)
                case Log(event):
                    self.tracker.log(event)
                    told = self._tell(event)
                    stop = told if isinstance(told, Stop) else stop
                case Keep(best):
                    weights.save(self._state_of(best.parts), self.run_dir / "best.safetensors")
                    best.parts.clear()
                case Save(whole):
                    finish = self._perform(cluster, self._save(cluster, whole))
                    if finish is not None:
                        return finish
                case Spawn(incarnation):
                    assert self.driver is not None
                    folder = self.keeping.folder if self.keeping else None
                    cluster.add(incarnation, self.plan.specs(self.driver.cast, folder)[incarnation])
                case Recover(shard):
                    return self._perform(cluster, self._recover(cluster, shard))
                case Finish():
                    return effect
        if stop is not None and self.driver is not None:  # behind what was decided before, which may go on
            return self._perform(cluster, self.driver.stop(stop, cluster.now()))
        return None

    def _save(self, cluster: Cluster, whole: Whole) -> list[Effect]:
        """Make a checkpoint of what shards have written; the ledger is durable before that."""
        assert self.driver is not None
        assert self.keeping is not None
        began = time.monotonic()
        try:
            self.ledger.flush()
            os.fsync(self.ledger.fileno())
            self.keeping.make(whole)
        except OSError as error:
            return self.driver.not_saved(f"{self.keeping.folder}: {error.strerror or error}", cluster.now())
        return self.driver.saved(whole, cluster.now(), time.monotonic() - began)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Lines of the ledger, at once: one call a step, and a step is there whole."""
        self.ledger.write("".join(json.dumps(line) + "\n" for line in lines))

    def _tell(self, event: dict[str, Any]) -> object:
        if event["event"] == "step" and self.first_commit is None:
            self.first_commit = time.time() - self.began
        return self.watch(event)

    # The end.

    def _finish(self, error: DistgdError | None) -> Result:
        stopped = self.driver is not None and self.driver.stopped
        status = error.status if error is not None else "stopped" if stopped else "completed"
        result = self._result(status)
        self._last_event(result, str(error) if error is not None else None)
        files = (self.run_dir / "model.safetensors", self.run_dir / "best.safetensors")
        self.tracker.finish(
            RunEnd(
                status,
                {k: v for k, v in result.as_dict().items() if k not in ("metrics", "run_dir", "mlflow_run_id", "best")},
                self._report(),
                tuple(file for file in files if file.exists()),
                self.plan.replica.plain_model() if self.final else None,
                self.plan.example,
            )
        )
        return self._result(status)

    def _save_final(self) -> None:
        if self.driver is not None and self.driver.whole:
            self._write([{"state": "end", "step": self.driver.tally.steps, "timeline": self.cast.timeline}])
            self.final = self._state_of(self.driver.final)
            weights.save(self.final, self.run_dir / "model.safetensors")

    def _last_event(self, result: Result, message: str | None) -> None:
        place = {"step": result.steps, "version": result.versions, "samples": result.samples}
        more = {"seconds": self._seconds(), "metrics": result.metrics, "ended_by": result.ended_by}
        reached = {k: v for k, v in result.as_dict().items() if k not in ("metrics", "run_dir")}
        end = {"event": "end", "status": result.status, **place, **more, "message": message, "result": reached}
        self.tracker.log(end)
        try:
            self._tell(end)
        except Exception as error:  # noqa: BLE001 - the run is over, and its result is not lost for this
            said = str(error) if isinstance(error, DistgdError) else users_error(error)
            log.warning("on_event failed at the end of the run: %s", said)

    def _seconds(self) -> float:
        return self.driver.tally.last_commit - self.driver.tally.began if self.driver else 0.0

    def _state_of(self, parts: Mapping[int, ev.SnapshotSent]) -> dict[str, Tensor]:
        """The model's state from every shard's part of a snapshot."""
        replica = self.plan.replica
        slices = replica.layout.slices(len(self.cast.shards))
        replica.install(slices, {shard: sent.weights for shard, sent in parts.items()}, parts[0].buffers)
        replica.buffer_layout.unpack(replica.buffers, replica.model)
        return weights.copy(state(replica.model))

    def _report(self) -> Path | None:
        """The report; it is about the run and never the end of it."""
        try:
            return write_report(self.run_dir).parent
        except Exception as error:  # noqa: BLE001 - a page is not worth a run
            log.warning("the report could not be written: %s", error)
            return None

    def _result(self, status: str) -> Result:
        return summarize(
            self.plan,
            self.driver,
            self.final,
            run_dir=str(self.run_dir),
            mlflow_run_id=self.mlflow.run_id if self.mlflow else None,
            status=status,
            began=self.began,
            first_commit=self.first_commit,
        )


def _cluster(plan: Plan) -> Cluster:
    config = plan.config
    if config.cluster.backend == "inprocess":
        torch.set_num_threads(config.cluster.threads)
        return InProcessCluster(config.run.seed)
    rest = REST if plan.staged else 0.0  # elsewhere workers wait for leases
    cluster = config.cluster
    return RayCluster(cluster.address, by_role(config), cluster.start_seconds, plan.largest_message, rest)


def _mlflow(plan: Plan) -> Mlflow:
    every, steps = plan.config.tracking.every, plan.planned_steps
    if every is None:
        return Mlflow(None if steps is None else max(1, steps // POINTS))
    return Mlflow(plan.every_steps(every) or 1, every.seconds)
