"""A run from start to finish.

    prepare   config and task are checked, the driver's model is built, one slot is tried    (distgd.plan)
    start     the run folder, the trackers, the cluster; everybody reports that it is ready
    train     messages go to the driver's state machine, its effects are performed
    finish    the last weights, the figure, the result; the cluster ends, whatever happened

What a run leaves: `config.yaml`, `metrics.jsonl`, `ledger.jsonl`, `model.safetensors`, `report/` in its folder, and
MLflow's own store. Committed steps of a run that failed are in the first three; its weights are lost.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from distgd import events as ev
from distgd import weights
from distgd.cluster import Cluster, RayCluster, Resources
from distgd.config import Config, load
from distgd.driver import Account, Driver, Effect, Finish, Log
from distgd.errors import BadInput, DeadlineExceeded, DistgdError, Interrupted, RunFailed
from distgd.inprocess import InProcessCluster
from distgd.plan import Plan, prepare
from distgd.records import Jsonl, Many, RunEnd, RunInfo, Tracker, strict
from distgd.replica import users_error
from distgd.report import convergence_figure
from distgd.sources import undisturbed
from distgd.tasks import Task
from distgd.tracking import Mlflow, absolute

__all__ = ["Plan", "Result", "launch", "prepare", "train"]

log = logging.getLogger("distgd.trainer")

POINTS = 1000  # of each metric in MLflow, where the config does not say
REST = 0.005  # seconds between two looks at what shards have committed
STATUS_SECONDS = 3.0  # how long processes get to say what they do before a deadline's error is written

Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """What a run came to; `as_dict` is the object that `--json` prints, which leaves the weights out.

    `samples_per_s` is measured from the first commit to the last, `start_s` from the process's start to the first
    commit, `step_ms` between commits. `state_dict` loads into the plain torch model; it is empty where the run failed.
    """

    run_id: str
    mlflow_run_id: str | None
    run_dir: str
    status: str
    mode: str
    workers: int
    servers: int
    slots: int
    steps: int
    versions: int
    samples: int
    samples_per_s: float | None
    step_ms: dict[str, float | None]
    staleness: dict[str, float | None]
    wall_s: float
    start_s: float | None
    bits: str
    weights_sha256: str | None
    metrics: dict[str, float]
    dropped_samples: int
    late_slots: int
    skipped_evaluations: int
    state_dict: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the weights, ready for JSON."""
        fields = {name: value for name, value in self.__dict__.items() if name != "state_dict"}
        return strict(fields)  # type: ignore[no-any-return]


def train(config: str | Path | Mapping[str, Any] | Config, *overrides: str, task: Task | None = None) -> Result:
    """Train what `config` says: a path, a mapping or a `Config`, with `section.key=value` overrides behind it.

    >>> result = train("configs/quickstart.yaml", "cluster.workers=4")  # doctest: +SKIP
    >>> model.load_state_dict(result.state_dict)  # doctest: +SKIP

    Args:
        task: model, loss and data as an object; it takes the place of the config's `task`.

    Raises:
        BadInput: nothing was started.
        Diverged, RunFailed, Interrupted: with `.result`, which says what was reached.
    """
    if not isinstance(config, str | Path | Mapping | Config) or not all(isinstance(o, str) for o in overrides):
        raise BadInput.at("train", "a path, a mapping or a Config, then overrides as text", [config, *overrides])
    if isinstance(task, type):
        raise BadInput.at("task", "an object", task.__name__, f"make one: task={task.__name__}(...)")
    if task is not None:  # on record it is the object, whatever the config names
        overrides += (f"task={{path: '{type(task).__module__}:{type(task).__qualname__}'}}",)
    name = Path(config).stem if isinstance(config, str | Path) else "run"
    return launch(load(config, overrides, os.environ), name, lambda event: None, task=task, began=time.time())


def launch(
    config: Config,
    name: str,
    watch: Watch,
    *,
    task: Task | None = None,
    began: float | None = None,
    cluster: Cluster | None = None,
) -> Result:
    """`train` with the config resolved; `watch` sees every event on the driver.

    Args:
        name: begins the run folder's name where the config does not give one.
        began: when it all started, seconds since the epoch; now where unset.
        cluster: where processes live, if not where the config says.
    """
    with undisturbed():
        plan = prepare(_absolute(config), task, name)
        run_dir = _run_dir(plan.config, name)
        run = _Run(plan, run_dir, watch, began if began is not None else time.time())
        with _interruptible(lambda: run.closing) as run.listen_to_signals:
            return run.execute(cluster)


def _absolute(config: Config) -> Config:
    """Paths are relative to the current folder; from here on they are absolute."""
    path = config.data.path and str(Path(config.data.path).absolute())
    changed = {
        "run": config.run.model_copy(update={"storage": str(Path(config.run.storage).absolute())}),
        "data": config.data.model_copy(update={"path": path}),
        "tracking": config.tracking.model_copy(update={"uri": absolute(config.tracking.uri)}),
    }
    return config.model_copy(update=changed)


def _run_dir(config: Config, name: str) -> Path:
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run_dir = Path(config.run.storage) / (config.run.name or stamp)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise BadInput.at("run.name", "a new run folder", str(run_dir), "choose another with run.name=")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        do = f"{error.strerror}; set it to a folder that can be written"
        raise BadInput.at("run.storage", "a folder for run folders", config.run.storage, do) from error
    return run_dir


class _Run:
    """The parts of one run and the order in which they begin and end."""

    def __init__(self, plan: Plan, run_dir: Path, watch: Watch, began: float) -> None:
        self.listen_to_signals: Callable[[], None] = lambda: None
        self.plan = plan
        self.run_dir = run_dir
        self.watch = watch
        self.began = began
        self.driver: Driver | None = None
        self.first_commit: float | None = None  # seconds since `began`
        self.closing = False
        self.cast = plan.cast()
        self.mlflow = _mlflow(plan) if plan.config.tracking.uri != "none" else None
        self.tracker: Tracker = Many(Jsonl(), *([self.mlflow] if self.mlflow else []))
        self.ledger: IO[str] = (run_dir / "ledger.jsonl").open("a", buffering=1, encoding="utf-8")

    def execute(self, cluster: Cluster | None) -> Result:
        """Everything after the checks; the cluster is closed and the trackers are told, whatever happens."""
        (self.run_dir / "config.yaml").write_text(self.plan.config.to_yaml(), encoding="utf-8")
        self._tell({"event": "start", "headline": self.plan.headline(), "steps": self.plan.steps})
        for warning in self.plan.warnings:
            log.warning("%s", warning)
        self.tracker.start(self._info())
        error: DistgdError | None = None
        try:
            self._train(cluster or _cluster(self.plan))
        except KeyboardInterrupt:
            error = Interrupted("interrupted; what was committed so far is in " + str(self.run_dir))
        except DistgdError as raised:
            error = raised
        except Exception as raised:  # noqa: BLE001 - the trackers are told, whatever it is
            error = RunFailed(users_error(raised))
            error.__cause__ = raised
        finally:
            self.ledger.close()
        if isinstance(error, BadInput) and self.first_commit is not None:
            error = RunFailed(str(error))
        self.closing = True  # the end of a run takes a bounded time, and is not cut in two
        result = self._finish(error)
        if isinstance(error, BadInput):  # found on the cluster; the same command, corrected, starts anew
            shutil.rmtree(self.run_dir, ignore_errors=True)
            raise error
        if error is not None:
            error.result = result
            raise error
        return result

    def _train(self, cluster: Cluster) -> None:
        try:
            cluster.spawn(self.plan.specs(self.cast))
            self.listen_to_signals()  # Ray has taken them
            self._await_ready(cluster)
            self.driver = Driver(self.cast, self.plan.assignment(), cluster.now())
            finish = self._perform(cluster, self.driver.start()) or self._listen(cluster, self.driver)
            if finish.error is not None:
                raise finish.error
        finally:
            self.closing = True  # a second Ctrl-C waits for that
            with suppress(Exception):  # a cluster that did not come up has nobody to tell
                for incarnation in self.cast.everybody:
                    cluster.send(incarnation, ev.Stop(self.cast.timeline))
            cluster.close()
            self.closing = False

    def _await_ready(self, cluster: Cluster) -> None:
        began, seconds = cluster.now(), self.plan.config.cluster.start_seconds
        waiting = set(self.cast.everybody)
        while waiting:
            arrived = cluster.receive(max(0.0, began + seconds - cluster.now()))
            if arrived is None:
                who = ", ".join(map(self.cast.name, sorted(waiting)))
                do = "set cluster.start_timeout higher if building model and data takes longer"
                raise DeadlineExceeded.waiting(who, "start", cluster.now() - began, do)
            source, event = arrived
            if isinstance(event, ev.ProcessReady):
                waiting.discard(source)
                log.info("%s is ready: %s", self.cast.name(source), event.facts)
            elif isinstance(event, ev.ProcessFailed | ev.ProcessLost):
                driver = Driver(self.cast, self.plan.assignment(), cluster.now())
                finish = self._perform(cluster, driver.handle(source, event, cluster.now()))
                raise finish.error if finish and finish.error else RunFailed(f"{self.cast.name(source)} did not start")

    def _listen(self, cluster: Cluster, driver: Driver) -> Finish:
        committed, since = 0, cluster.now()
        deadline = self.plan.config.cluster.deadline
        while True:
            arrived = cluster.receive(max(0.0, since + deadline - cluster.now()))
            if arrived is None:
                raise self._stuck(cluster, driver, cluster.now() - since)
            finish = self._perform(cluster, driver.handle(*arrived, cluster.now()))
            if finish is not None:
                return finish
            done = driver.tally.versions + len(driver.final)
            if done != committed or driver.tally.steps == self.plan.steps:
                committed, since = done, cluster.now()

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
        over = driver.tally.steps >= self.plan.steps
        who = "the last version to be sent and evaluated" if over else f"step {driver.tally.steps} to be committed"
        do = f"set cluster.deadline higher than {self.plan.config.cluster.deadline:g} s if that is what they need"
        phase = "evaluate" if over else "train"
        return DeadlineExceeded.waiting(who, phase, seconds, f"{do}; what each process does:\n" + "\n".join(lines))

    def _perform(self, cluster: Cluster, effects: list[Effect]) -> Finish | None:
        for effect in effects:
            match effect:
                case ev.Send(to, message):
                    cluster.send(to, message)
                case Log(event):
                    self._tell(event)
                    self.tracker.log(event)
                case Account(line):
                    self.ledger.write(json.dumps(line) + "\n")
                case Finish():
                    return effect
        return None

    def _tell(self, event: dict[str, Any]) -> None:
        if event["event"] == "step" and self.first_commit is None:
            self.first_commit = time.time() - self.began
        self.watch(event)

    # The end.

    def _finish(self, error: DistgdError | None) -> Result:
        status = error.status if error is not None else "completed"
        state: dict[str, Tensor] = {}
        if self.driver is not None and self.driver.whole:
            state = self._final_state()
            weights.save(state, self.run_dir / "model.safetensors")
        result = self._result(status, state)
        end = {"event": "end", "status": status, "step": result.steps, "version": result.versions}
        more = {"samples": result.samples, "seconds": self._seconds(), "metrics": result.metrics}
        self._tell({**end, **more})
        self.tracker.log({**end, **more})
        figure = self._figure()
        self.tracker.finish(
            RunEnd(
                status,
                {k: v for k, v in result.as_dict().items() if k not in ("metrics", "run_dir", "mlflow_run_id")},
                figure,
                self.run_dir / "model.safetensors" if state else None,
                self.plan.replica.plain_model() if state else None,
                self.plan.example,
            )
        )
        return self._result(status, state)

    def _seconds(self) -> float:
        return self.driver.tally.last_commit - self.driver.tally.began if self.driver else 0.0

    def _final_state(self) -> dict[str, Tensor]:
        assert self.driver is not None
        replica, final = self.plan.replica, self.driver.final
        slices = replica.layout.slices(len(self.cast.shards))
        replica.install(slices, {shard: sent.weights for shard, sent in final.items()}, final[0].buffers)
        replica.buffer_layout.unpack(replica.buffers, replica.model)
        return weights.copy(replica.model.state_dict())

    def _figure(self) -> Path | None:
        """The convergence figure; it is a picture of the run and never the end of it."""
        out = self.run_dir / "report" / "convergence.png"
        try:
            out.parent.mkdir(exist_ok=True)
            return convergence_figure(self.run_dir / "metrics.jsonl", out, self.plan.headline().split(",")[0])
        except Exception as error:  # noqa: BLE001 - a picture is not worth a run
            log.warning("the convergence figure could not be drawn: %s", error)
            return None

    def _result(self, status: str, state: dict[str, Tensor]) -> Result:
        config, tally = self.plan.config, self.driver.tally if self.driver else None
        nothing: dict[str, float | None] = {}
        return Result(
            run_id=self.run_dir.name,
            mlflow_run_id=self.mlflow.run_id if self.mlflow else None,
            run_dir=str(self.run_dir),
            status=status,
            mode=config.consistency.mode,
            workers=config.cluster.workers,
            servers=config.cluster.servers,
            slots=self.plan.order.slots,
            steps=tally.steps if tally else 0,
            versions=tally.versions if tally else 0,
            samples=tally.samples if tally else 0,
            samples_per_s=tally.samples_per_s() if tally else None,
            step_ms=tally.step_ms() if tally else nothing,
            staleness=tally.staleness_quantiles() if tally else nothing,
            wall_s=time.time() - self.began,
            start_s=self.first_commit,
            bits=self.plan.bits,
            weights_sha256=weights.fingerprint(state) if state else None,
            metrics=tally.metrics if tally else {},
            dropped_samples=tally.dropped if tally else 0,
            late_slots=tally.late_slots if tally else 0,
            skipped_evaluations=tally.skipped_evaluations if tally else 0,
            state_dict=state,
        )

    def _info(self) -> RunInfo:
        plan = self.plan
        schema = json.dumps(plan.source.schema(), default=str, sort_keys=True)
        described = f"{plan.model_name} {len(plan.source)} {schema}"
        digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        data = {"name": plan.model_name, "samples": len(plan.source), "digest": digest, "schema": plan.source.schema()}
        return RunInfo(
            run_id=self.run_dir.name,
            name=self.run_dir.name,
            run_dir=self.run_dir,
            params=plan.config.flat(),
            tags=_tags(plan),
            data=data,
            steps=plan.steps,
            uri=plan.config.tracking.uri,
            experiment=plan.config.tracking.experiment,
        )


def _cluster(plan: Plan) -> Cluster:
    config = plan.config
    if config.cluster.backend == "inprocess":
        torch.set_num_threads(config.cluster.threads)
        return InProcessCluster(config.run.seed)
    resources = {
        "server": Resources(1.0, 0.0),
        "worker": Resources(config.cluster.cpus, config.cluster.gpus),
        "evaluator": Resources(config.eval.cpus, config.eval.gpus),
    }
    state = plan.layout.size * plan.layout.itemsize + plan.replica.buffer_layout.size
    rest = REST if plan.staged else 0.0  # elsewhere workers wait for leases
    return RayCluster(config.cluster.address, resources, config.cluster.start_seconds, state, rest)


def _mlflow(plan: Plan) -> Mlflow:
    every = plan.config.tracking.every
    if every is None:
        return Mlflow(every_steps=max(1, plan.steps // POINTS))
    return Mlflow(plan.every_steps(every) or 1, every.seconds)


def _tags(plan: Plan) -> dict[str, str]:
    packages = {f"version.{name}": version(name) for name in ("distgd", "torch", "ray", "numpy")}
    with suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        ).stdout.strip()
        packages |= {"mlflow.source.git.commit": described} if described else {}
    with suppress(KeyError, OSError):  # a user id without a name
        packages["mlflow.user"] = getpass.getuser()
    packages |= {"mlflow.source.name": "distgd", "host": platform.node(), "python": platform.python_version()}
    return {**packages, "bits": plan.bits}


@contextmanager
def _interruptible(deaf: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """SIGTERM ends a run as Ctrl-C does, and neither interrupts what ends the processes.

    Yields what sets the handlers once more, after somebody else did. Elsewhere than in the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def interrupt(*_: object) -> None:
        if not deaf():
            raise KeyboardInterrupt

    def listen() -> None:
        for number in before:
            signal.signal(number, interrupt)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    listen()
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
