"""One run, from its folder to its result: everybody is told when it begins and when it ends, whatever happens."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from distgd import events as ev
from distgd import weights
from distgd.assignment import Cast
from distgd.cluster import Cluster, RayCluster
from distgd.driver import Driver
from distgd.effects import Account, Effect, Finish, Keep, Log, Record, Recover, Refuse, Resumed, Save, Spawn
from distgd.errors import BadInput, DeadlineExceeded, DistgdError, Interrupted, Preempted, RunFailed, users_error
from distgd.inprocess import InProcessCluster
from distgd.keeping import Keeping
from distgd.layout import state
from distgd.plan import Plan
from distgd.process import Spec
from distgd.promise import PROMISED, Promise
from distgd.records import Jsonl, Many, Onwards, RunEnd, Tracker, logged
from distgd.rehearsal import Rehearsal
from distgd.report import write_report
from distgd.resources import by_role
from distgd.result import Result, summarize
from distgd.resume import Found
from distgd.runfolder import Start, give_back, mend, refused_by_disk
from distgd.runinfo import describe
from distgd.saving import Whole
from distgd.signals import Signals, Terminated
from distgd.starting import Begun, Starting
from distgd.stopping import Stop
from distgd.tracking import Mlflow, Store
from distgd.updates import Updates

log = logging.getLogger("distgd.trainer")

POINTS = 1000  # of each metric in MLflow, where the config does not say
LISTENING = 0.5  # seconds between two looks at what signals have been heard
LEAVING_SECONDS = 60.0  # that a signal's checkpoint may take
REST = 0.005  # seconds between two looks at what shards have committed
STATUS_SECONDS = 3.0  # how long processes get to say what they do before a deadline's error is written

Specs = Callable[[Cast, str | None], Mapping[int, Spec]]
Watch = Callable[[dict[str, Any]], object]
"""Sees every event on the driver; ends the run cleanly where it returns a `Stop`."""


class Run:
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
        self.promise = Promise(plan.bits == PROMISED, plan.config.run.bits == "strict")
        self.made: list[Path] = []  # folders that were made for the run folder
        self.rehearsal = Rehearsal(plan, run_dir, lambda: self.driver) if plan.faults else None
        self.watch = self.rehearsal.watching(watch) if self.rehearsal else watch
        self.specs: Specs = self.rehearsal.specs if self.rehearsal else plan.specs
        self.began = began
        self.parent = parent
        self.driver: Driver | None = None
        self.first_commit: float | None = None  # seconds since `began`
        self.closing = False
        self.leaving: KeyboardInterrupt | None = None  # what ends the run, with a checkpoint
        self._cast = plan.cast(self.start.timeline)
        self.assignment = plan.assignment()
        self.mlflow = _mlflow(plan, self.rehearsal) if plan.config.tracking.uri != "none" else None
        self.tracker: Tracker = Many(Jsonl(), *([self.mlflow] if self.mlflow else []), *also)
        self.ledger: IO[str]
        self.starting: Starting
        self.keeping: Keeping | None = None
        self.updates: Updates | None = None
        self.files = ExitStack()
        self.files.enter_context(self.start.lock)
        self.final: dict[str, Tensor] = {}  # the last version, once it is here

    @property
    def cast(self) -> Cast:
        """Who plays what now."""
        return self.driver.cast if self.driver is not None else self._cast

    def execute(self, cluster: Cluster | None) -> Result:
        """Everything after the checks; the cluster is closed and the trackers are told, whatever happens."""
        with self.files:  # also where something passes through that is no error, such as SystemExit
            return self._execute(cluster)

    def _execute(self, cluster: Cluster | None) -> Result:
        error: DistgdError | None = None
        try:
            self._begin()
            cluster = cluster or _cluster(self.plan)
            self._train(self.rehearsal.around(cluster) if self.rehearsal else cluster)
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
        if self.rehearsal is not None:
            self.rehearsal.begin()
        for name in ("ledger.jsonl", "metrics.jsonl"):
            mend(self.run_dir / name)
        ledger = (self.run_dir / "ledger.jsonl").open("a", buffering=1, encoding="utf-8")
        self.ledger = self.files.enter_context(ledger)
        order, mode = self.assignment.order, self.plan.config.consistency.mode
        if self.found and self.found.checkpoint:
            manifest = self.found.checkpoint.manifest
            self.promise.go_on(manifest.software, manifest.bits)
        if self.ledger.tell() == 0:
            whole = {"samples": order.samples, "batch": order.batch, "slots": order.slots, "mode": mode}
            self._write([{"state": "begin", **whole, "bits": self.plan.bits, "timeline": self.cast.timeline}])
        if self.plan.records:
            self.updates = self.files.enter_context(Updates(self.run_dir))
        if self.plan.config.checkpoint.every is not None:
            begins = self.found.checkpoint if self.found else None
            self.keeping = Keeping(self.run_dir, self.start, self.plan, self.assignment, begins, self.promise)
        self._tell({"event": "start", "headline": self.plan.headline(), "steps": self.plan.planned_steps})
        before = logged(self.run_dir / "metrics.jsonl") if self.found is not None else None
        self.tracker = Onwards(self.tracker, before or {})
        self.tracker.start(describe(self.plan, self.run_dir, self.parent, before))
        passed = [f"a damaged checkpoint was passed over: {why}" for why in (self.found.damaged if self.found else ())]
        for warning in (*self.plan.warnings, *passed):
            self._warn(warning)

    def _warn(self, message: str) -> None:
        """A warning that is no business of the driver's."""
        log.warning("%s", message)
        at = {"step": 0, "version": 0, "samples": 0, "seconds": 0.0, "metrics": {}}
        at = self.driver.tally.event("warning", self.driver.tally.last_commit, {}) if self.driver else at
        self.tracker.log({**at, "event": "warning", "message": message})

    def _error(self, raised: Exception) -> DistgdError:
        if isinstance(raised, DistgdError):
            return raised
        refused = refused_by_disk(raised, self.run_dir) if isinstance(raised, OSError) else None
        error = refused or RunFailed(users_error(raised))
        error.__cause__ = raised
        return error

    def _train(self, cluster: Cluster) -> None:
        try:
            folder = self.keeping.place.where if self.keeping else None
            cluster.spawn(self.specs(self.cast, folder), self.plan.patient(self.cast))
            self.signals.listen()  # Ray has taken them
            self.starting = Starting(
                self.plan, self.assignment, self.run_dir, cluster, self.keeping, self.promise, self.updates, self.specs
            )
            begun = self.starting.begin(self.cast, self.found, self.goes_on)
            finish = self._go_on(cluster, begun) or self._listen(cluster)
            if finish.error is not None:
                raise finish.error
        finally:
            self.closing = True  # a second Ctrl-C waits for that
            with suppress(Exception):  # a cluster that did not come up has nobody to tell
                for incarnation in self.cast.everybody:
                    cluster.send(incarnation, ev.Stop(self.cast.timeline))
            cluster.close()
            self.closing = False

    def _go_on(self, cluster: Cluster, begun: Begun) -> Finish | None:
        """Listen to this driver from now on."""
        self.driver = begun.driver
        self._write(begun.lines)
        finish = self._perform(cluster, begun.effects)
        if finish is None and self.leaving is not None and self.driver is begun.driver:
            return self._leave(cluster, begun.driver, self.leaving)
        return finish

    def _listen(self, cluster: Cluster) -> Finish:
        reached, since = (0, 0, -1, 0), cluster.now()
        deadline = self.plan.config.cluster.deadline
        leaving: float | None = None  # since when
        noticed: KeyboardInterrupt | None = None  # no signal, so that the first one that comes is still the first
        self.signals.patient = True
        while True:
            driver, now = self.driver, cluster.now()
            assert driver is not None
            heard = self.signals.heard or noticed
            if heard is not None and leaving is None:
                leaving = now
                finish = self._leave(cluster, driver, heard)
                if finish is not None:
                    return finish
            if leaving is not None and now - leaving > LEAVING_SECONDS:
                log.warning("no checkpoint within %g s; what was committed since the last one is lost", LEAVING_SECONDS)
                return Finish(self._interrupted(heard))
            arrived = cluster.receive(min(LISTENING, max(0.0, since + deadline - now)))
            if arrived is not None and arrived[1] == ev.Drained(ev.DRIVER):
                noticed = Terminated("the driver's machine is drained")
                continue
            if arrived is not None:
                if isinstance(arrived[1], ev.ProcessReady):
                    driver.members.nodes = cluster.nodes()
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
        self.leaving, why = heard, self._interrupted(heard)
        effects = driver.leave(why, cluster.now())
        return Finish(why) if effects is None else self._perform(cluster, effects)

    def _interrupted(self, heard: BaseException | None) -> Interrupted:
        kind, word = (Preempted, str(heard)) if isinstance(heard, Terminated) else (Interrupted, "interrupted")
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
                    if event["event"] == "warning":
                        log.warning("%s", event["message"])
                    told = self._tell(event)
                    stop = told if isinstance(told, Stop) else stop
                case Keep(best):
                    weights.save(self._state_of(best.parts), self.run_dir / "best.safetensors")
                    best.parts.clear()
                    if self.keeping is not None:
                        self.keeping.found_best(self.assignment.versions(best.step))
                case Save(whole):
                    finish = self._perform(cluster, self._save(cluster, whole))
                    if finish is not None:
                        return finish
                case Record(updates):
                    assert self.updates is not None
                    self.updates.add(updates)
                case Spawn(incarnation, patient):
                    assert self.driver is not None
                    folder = self.keeping.place.where if self.keeping else None
                    spec = self.specs(self.driver.cast, folder)[incarnation]
                    cluster.add(incarnation, spec, patient=patient)
                case Refuse(incarnation):
                    cluster.end(incarnation)
                case Recover(gone):
                    assert self.driver is not None
                    finish = self._go_on(cluster, self.starting.recover(self.driver, gone))
                    return finish or self._stop(cluster, stop)
                case Finish():
                    return effect
        return self._stop(cluster, stop)  # behind what was decided before, which may go on

    def _stop(self, cluster: Cluster, stop: Stop | None) -> Finish | None:
        if stop is None or self.driver is None:
            return None
        return self._perform(cluster, self.driver.stop(stop, cluster.now()))

    def _save(self, cluster: Cluster, whole: Whole) -> list[Effect]:
        """Make a checkpoint of what shards have written; ledger and record are durable before that."""
        assert self.driver is not None
        assert self.keeping is not None
        began = time.monotonic()
        try:
            self.ledger.flush()
            os.fsync(self.ledger.fileno())
            if self.updates is not None:
                self.updates.sync()
            self.keeping.make(whole, self.assignment.versions(self.driver.evaluations.wanted))
        except OSError as error:
            return self.driver.not_saved(f"{self.keeping.place.where}: {error.strerror or error}", cluster.now())
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
        for never in self.rehearsal.never() if self.rehearsal else ():
            self._warn(never)
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
            end = {"state": "end", "step": self.driver.tally.steps, "timeline": self.cast.timeline}
            self._write([{**end, "bits": self._result("completed").bits}])
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
            bits=self.promise.bits,
            began=self.began,
            first_commit=self.first_commit,
            faults=self.rehearsal.summary() if self.rehearsal else None,
        )


def _cluster(plan: Plan) -> Cluster:
    config = plan.config
    if config.cluster.backend == "inprocess":
        torch.set_num_threads(config.cluster.threads)
        return InProcessCluster(config.run.seed)
    rest = REST if plan.staged else 0.0  # elsewhere workers wait for leases
    cluster = config.cluster
    return RayCluster(
        cluster.address,
        by_role(config),
        cluster.start_seconds,
        plan.largest_message,
        rest,
        standby=cluster.standby,
    )


def _mlflow(plan: Plan, rehearsal: Rehearsal | None) -> Mlflow:
    every, steps = plan.config.tracking.every, plan.planned_steps
    store = rehearsal.outage.store if rehearsal is not None else Store
    if every is None:
        return Mlflow(None if steps is None else max(1, steps // POINTS), store=store)
    return Mlflow(plan.every_steps(every) or 1, every.seconds, store=store)
