"""Where processes live: Ray. The only module that imports it.

A cluster spawns processes from specifications, carries the driver's messages, and says which process is gone. What a
message means is no business of this one. `RayCluster` runs each process as an actor whose one long call is the event
loop of a plain class; `distgd.inprocess.InProcessCluster` has the same verbs on one thread.

Ray gives placement, life and death, and hands the run's secret to its processes; no byte of a step goes through it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from distgd import events as ev
from distgd import reaper
from distgd.config import Config
from distgd.errors import BadInput, DeadlineExceeded, DistgdError, RunFailed, users_error
from distgd.resources import Resources, by_role, fit
from distgd.transport import Endpoint, Place
from distgd.transport.segments import Array
from distgd.wire import Codec

log = logging.getLogger("distgd.cluster")

GLANCE = 0.05  # seconds between two looks at a chore
HEARTS = 1 << 32  # added to an incarnation it is that of its heartbeat
BEAT, SILENCE = 0.5, 5.0  # seconds between heartbeats, and without any until a process is taken for lost
POLL = 0.2  # seconds between two looks at Ray for processes that are gone
PATIENCE = 5.0  # seconds that processes get to end by themselves
MESSAGE_SLACK = 1 << 20  # bytes of a message beside its arrays
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


class Actor(Protocol):
    """A process's state machine. `perform` does what takes time; its answer, with its `seconds`, goes to `handle`.

    `emit` performs an effect meanwhile.
    """

    def handle(self, source: int, event: Any) -> list[ev.Effect]: ...

    def perform(self, work: Any, emit: Callable[[ev.Effect], None]) -> Any: ...


@runtime_checkable
class Places(Protocol):
    """An actor that has places for arrays: see `transport.Endpoint.place`."""

    def place(self, message: Any) -> Array | None: ...


class Spec(Protocol):
    """All that a process is made of; it travels by pickle, through Ray alone."""

    @property
    def role(self) -> str: ...
    @property
    def rules(self) -> Any: ...
    def build(self, clock: Callable[[], float], allocate: Callable[[int, str], Array]) -> Actor: ...


class Cluster(Protocol):
    """The verbs that the trainer knows."""

    def now(self) -> float: ...

    def spawn(self, specs: Mapping[int, Spec]) -> None: ...

    def add(self, incarnation: int, spec: Spec) -> None: ...

    def end(self, incarnation: int) -> None: ...

    def nodes(self) -> tuple[tuple[int, ...], ...]: ...

    def send(self, to: int, message: Any) -> None: ...

    def receive(self, timeout: float) -> tuple[int, Any] | None: ...

    def close(self) -> None: ...


class Process:
    """The event loop of one process: an endpoint, and a state machine once `run` is called."""

    def __init__(
        self, me: int, role: str, secret: bytes, listen: str, alone: bool, max_bytes: int, path: Sequence[str]
    ) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        if role != "server":
            _give_way()
        self._me, self._secret = me, secret
        self._over = threading.Event()
        self._work: deque[Any] = deque()  # what is to be computed, in order
        self._chores = ThreadPoolExecutor(1, "chores")  # no thread before there is one
        self._begun: deque[Future[Any]] = deque()
        self._endpoint = _endpoint(me, role, secret, max_bytes, listen=listen, alone=alone)

    def whereabouts(self) -> Place:
        """The Ray node and the addresses that this process listens on."""
        return Place(_node_id(), self._endpoint.addresses)

    def run(self, spec: Spec, places: Mapping[int, Place]) -> str:
        """Live until told to end; returns why. An error is sent to the driver before the process ends."""
        self._endpoint.meet(_node_id(), places)
        timeline = spec.rules.timeline
        try:
            threading.Thread(target=self._beat, args=(_node_id(), places[ev.DRIVER]), daemon=True).start()
            actor = spec.build(time.monotonic, self._endpoint.allocate)
            if isinstance(actor, Places):
                self._endpoint.place = actor.place
            gc.freeze()  # what was imported and built stays; the collector need not look at it over and over
            facts = {"pid": str(os.getpid()), "host": socket.gethostname()}
            self._endpoint.send(ev.DRIVER, ev.ProcessReady(timeline, facts))
            return self._loop(actor)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the driver is told
            kind = type(error).__name__ if isinstance(error, DistgdError) else "RunFailed"
            self._endpoint.send(ev.DRIVER, ev.ProcessFailed(timeline, kind, _told(error)))
            return f"failed: {error}"
        finally:
            self._over.set()
            self._endpoint.close()

    def _beat(self, node: str, driver: Place) -> None:
        """Tell the driver from a thread of its own, over a connection of its own, that this process is not stopped."""
        endpoint = Endpoint(HEARTS + self._me, "heart", self._secret, Codec(ev.MESSAGES))
        endpoint.meet(node, {ev.DRIVER: driver})
        while not self._over.wait(BEAT):
            endpoint.send(ev.DRIVER, ev.Alive(self._me))
            endpoint.receive(0.0)
        endpoint.close()

    def _loop(self, actor: Actor) -> str:
        while True:
            arrived = self._endpoint.receive(0.0 if self._work else 1.0 if not self._begun else GLANCE)
            if arrived is not None and isinstance(arrived[1], ev.Placed):
                new = arrived[1]
                self._endpoint.meet(_node_id(), {new.incarnation: Place(new.node, new.addresses)})
                continue
            if self._begun and self._begun[0].done():
                for effect in actor.handle(self._me, self._begun.popleft().result()):
                    self._do(effect)
            if arrived is not None:
                effects = actor.handle(*arrived)
            elif self._work:
                began = time.monotonic()
                done = actor.perform(self._work.popleft(), self._do)
                effects = actor.handle(self._me, replace(done, seconds=time.monotonic() - began))
            else:
                continue
            for effect in effects:
                if isinstance(effect, ev.End):
                    return effect.why
                self._do(effect)

    def _do(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Send(to, message):
                self._endpoint.send(to, message)
            case ev.Compute(wanted):
                self._work.append(wanted)
            case ev.Update(effects):
                for each in effects:
                    self._do(each)
            case ev.Beside(chore):
                chore.begin()
                self._begun.append(self._chores.submit(chore.finish))


def _endpoint(me: int, role: str, secret: bytes, max_bytes: int, *, listen: str, alone: bool) -> Endpoint:
    """This process's endpoint; `alone` says that the run has one machine."""
    host = None if alone else _node_address()
    return Endpoint(me, role, secret, Codec(ev.MESSAGES), listen=listen, host=host, max_bytes=max_bytes)


def _give_way() -> None:
    """Do not take the core from who wakes this process, as a server that still has others to wake would wait for it."""
    if hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, DistgdError) else users_error(error)


class RayCluster:
    """Processes as Ray actors.

    In a process that is connected to Ray already that cluster is used and left up; else `address` is joined, or a
    private one is started on this machine and ended, with its files, by `close`.

    Args:
        resources: by role.
        start_seconds: how long all processes may take to start.
        max_bytes: the largest array in a message between machines.
        rest: seconds that the driver sleeps before it looks for messages again, so that it is not woken by each one
            where nobody waits for its answer.

    Raises:
        DeadlineExceeded: not everybody was placed and started in time; says what was asked and what each node has.
        BadInput: no cluster answers at `address`.
    """

    def __init__(
        self,
        address: str | None,
        resources: Mapping[str, Resources],
        start_seconds: float,
        max_bytes: int,
        rest: float = 0.0,
    ) -> None:
        self._resources = resources
        self._start_seconds = start_seconds
        self._max_bytes = max_bytes + MESSAGE_SLACK
        self._rest, self._rested = rest, True
        self._address = address
        self._secret = secrets.token_bytes(32)
        self._running: dict[Any, int] = {}  # the call that is a process's life -> incarnation
        self._actors: dict[int, Any] = {}
        self._places: dict[int, Place] = {}
        self._gone: deque[tuple[int, Any]] = deque()
        self._coming: dict[Any, tuple[int, Spec, float]] = {}  # the answer that says where a process is -> who, when
        self._heard: dict[int, float] = {}  # when each heartbeat was heard last, or is due first
        self._alone = True
        self._looked = 0.0
        self._joined = False
        self._private: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._endpoint: Endpoint | None = None

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.monotonic()

    def spawn(self, specs: Mapping[int, Spec]) -> None:
        """Place and start processes by incarnation; each reports that it is ready. Called once."""
        import ray

        began = self.now()
        if not ray.is_initialized():
            self.connect(sum(self._resources[spec.role].cpus for spec in specs.values()))
        self._check_gpus(specs)
        self._check_trial(specs)
        self._alone = len(_nodes()) == 1
        self._endpoint = _endpoint(ev.DRIVER, "driver", self._secret, self._max_bytes, listen="all", alone=self._alone)
        for incarnation, spec in specs.items():
            self._actors[incarnation] = self._actor(incarnation, spec, alone=self._alone)
        asked = {actor.whereabouts.remote(): incarnation for incarnation, actor in self._actors.items()}
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=self._start_seconds)
        if late:
            raise self._not_placed([specs[asked[ref]].role for ref in late], self.now() - began)
        places = {asked[ref]: ray.get(ref) for ref in ready} | {ev.DRIVER: Place(_node_id(), self._endpoint.addresses)}
        self._places = places
        self._endpoint.meet(_node_id(), {i: Place(place.node, ()) for i, place in places.items()})
        for incarnation, spec in specs.items():
            self._run(incarnation, spec)

    def _run(self, incarnation: int, spec: Spec) -> None:
        try:
            life = self._actors[incarnation].run.remote(spec, self._places)
        except (TypeError, pickle.PicklingError) as error:
            do = "keep locks, files and connections out of the task object, or make them in its methods"
            found = f"the error: {error.__cause__ or error}"  # Ray's own text prints everything that is sent
            raise BadInput.described("task", "an object that can be sent to processes", found, do) from error
        self._running[life] = incarnation
        self._heard[incarnation] = self.now() + self._start_seconds - SILENCE  # until its heart beats

    def add(self, incarnation: int, spec: Spec) -> None:
        """Place and start one more process, which reports when it is ready; returns at once."""
        self._actors[incarnation] = actor = self._actor(incarnation, spec, alone=self._alone)
        self._coming[actor.whereabouts.remote()] = incarnation, spec, self.now()

    def _came(self) -> None:
        """Let processes live that have been placed, and tell all others where they are."""
        import ray

        placed, _ = ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0)
        for ref in placed:
            incarnation, spec, _ = self._coming.pop(ref)
            try:
                place = ray.get(ref)
            except Exception as error:  # noqa: BLE001 - Ray raises whatever ended it
                self._gone.append((incarnation, ev.ProcessLost(incarnation, _first_line(error))))
                continue
            assert self._endpoint is not None
            self._places[incarnation] = place
            self._endpoint.meet(_node_id(), {incarnation: Place(place.node, ())})
            for other in self._running.values():
                self._endpoint.send(other, ev.Placed(incarnation, place.node, place.addresses))
            self._run(incarnation, spec)
        for ref, (incarnation, _, began) in list(self._coming.items()):
            if self.now() - began > self._start_seconds:
                del self._coming[ref]
                self.end(incarnation)
                why = f"not there {self._start_seconds:g} s after it was asked for"
                self._gone.append((incarnation, ev.ProcessLost(incarnation, why)))

    def end(self, incarnation: int) -> None:
        """Make sure that a process is gone which is taken for lost."""
        import ray

        actor = self._actors.pop(incarnation, None)
        self._places.pop(incarnation, None)
        self._heard.pop(incarnation, None)
        if actor is not None:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)

    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """The incarnations on each machine, the driver's left out."""
        by_node: dict[str, list[int]] = {}
        for incarnation, place in sorted(self._places.items()):
            if incarnation != ev.DRIVER:
                by_node.setdefault(place.node, []).append(incarnation)
        return tuple(map(tuple, by_node.values()))

    def connect(self, cpus: float) -> None:
        """Join the cluster at the address, or start a private one with so many CPUs; `close` ends that."""
        if self._address is not None:
            self._join(self._address)
        else:
            self._start_private(cpus)

    def _join(self, address: str) -> None:
        import ray

        self._check_address(address)
        try:
            ray.init(address=address, **QUIET)
            self._joined = True
        except (ConnectionError, RuntimeError, ValueError) as error:
            do = "start it with `ray start --head`, or remove the key to train on this machine"
            raise BadInput.described("cluster.address", "a running Ray cluster", f"{address} ({error})", do) from error

    def _start_private(self, cpus: float) -> None:
        """Start Ray on this machine, in a folder of its own.

        Ray turns token authentication on for a cluster that it starts itself, and finds the token in the environment:
        no file is written. RAY_AUTH_MODE is read when Ray is first imported, which may be long ago, so that it is not
        set. The token stays for the runs that follow in this process.
        """
        import ray

        self._private = Path(tempfile.mkdtemp(prefix="distgd-"))
        self._reaper = subprocess.Popen(
            [sys.executable, reaper.__file__, str(self._private)], stdin=subprocess.PIPE, start_new_session=True
        )
        os.environ[reaper.MARK] = str(self._private)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with contextlib.suppress(ImportError, AttributeError):  # no public way to make Ray read another token
            from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

            AuthenticationTokenLoader.instance().reset_cache()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ray.init(
                    address="local",
                    num_cpus=max(1, os.cpu_count() or 1, -int(-cpus // 1)),
                    include_dashboard=False,
                    object_store_memory=max(128 << 20, 4 * self._max_bytes),
                    _temp_dir=str(self._private),
                    _system_config={"worker_niceness": 0},  # Ray makes actors give way to whatever else runs here
                    **QUIET,
                )
            except Exception as error:
                raise RunFailed(_why_not(error)) from error
            finally:
                os.environ.pop(reaper.MARK, None)

    def _check_address(self, address: str) -> None:
        """Ray itself tries for minutes, deaf to Ctrl-C."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            return
        try:
            socket.create_connection((host, int(port)), timeout=min(5.0, self._start_seconds)).close()
        except OSError as error:
            do = "start it with `ray start --head`, or remove the key to train on this machine"
            raise BadInput.described("cluster.address", "a running Ray cluster", f"{address} ({error})", do) from error

    def _check_gpus(self, specs: Mapping[int, Spec]) -> None:
        """On a cluster of one's own nothing will be added, so that waiting for a GPU would be in vain."""
        asked = sum(self._resources[spec.role].gpus for spec in specs.values())
        there = sum(node["Resources"].get("GPU", 0.0) for node in _nodes())
        if self._private is not None and asked > there:
            do = "lower cluster.workers, cluster.gpus, cluster.server_gpus or eval.gpus, or set cluster.address"
            raise BadInput.at("cluster.gpus", f"at most the {there:g} GPUs of this machine in all", asked, do)

    def _check_trial(self, specs: Mapping[int, Spec]) -> None:
        """In a placement group, such as a trial's, processes that find no room would wait for ever."""
        import ray.util

        group = ray.util.get_current_placement_group()
        if group is None:
            return
        free = [dict(bundle) for bundle in group.bundle_specs]
        own: dict[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        for name, amount in own.items():
            mine = next((b for b in free if b.get(name, 0.0) >= amount), None)
            if mine is not None:
                mine[name] -= amount
        asks = [self._resources[spec.role] for spec in specs.values()]
        if not fit(asks, free):
            wanted = [bundle for ask in asks if (bundle := ask.bundle())]
            do = (
                "tune.with_resources(trial, tune.PlacementGroupFactory(distgd.bundles(config))) asks for enough; "
                "or lower cluster.workers, cluster.servers or cluster.cpus"
            )
            found = f"{free} beside what runs there already"
            raise BadInput.at("cluster", f"a placement group with room for {wanted}", found, do)

    def _actor(self, incarnation: int, spec: Spec, *, alone: bool) -> Any:
        import ray

        resources = self._resources[spec.role]
        path = [os.path.abspath(folder) for folder in sys.path]  # what imports here imports there
        listens = "all" if spec.role == "server" else "near" if spec.role == "worker" and not alone else ""
        remote = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_restarts=0, max_task_retries=0)
        named = type(spec.role.capitalize(), (Process,), {})  # so that `ps` and Ray's pages tell who is who
        return remote(named).remote(incarnation, spec.role, self._secret, listens, alone, self._max_bytes, path)

    def _not_placed(self, late: Sequence[str], seconds: float) -> DistgdError:
        asked = ", ".join(f"{r} {w.cpus:g} CPU {w.gpus:g} GPU" for r, w in self._resources.items())
        has = "; ".join(
            f"{n['NodeManagerHostname']} {n['Resources'].get('CPU', 0):g} CPU {n['Resources'].get('GPU', 0):g} GPU"
            for n in _nodes()
        )
        who = ", ".join(f"{late.count(role)} {role}" for role in sorted(set(late)))
        do = f"each asks for: {asked}; the nodes have: {has}; lower cluster.workers, cpus or gpus, or add nodes"
        return DeadlineExceeded.waiting(f"{who} to start", "start", seconds, do)

    def send(self, to: int, message: Any) -> None:
        """From the driver."""
        assert self._endpoint is not None
        self._endpoint.send(to, message)

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """What arrives at the driver next, `ProcessLost` among it; None after `timeout` seconds."""
        assert self._endpoint is not None
        until = self.now() + timeout
        while True:
            if self.now() >= self._looked + POLL:
                self._look()
            arrived = self._endpoint.receive(0.0 if not self._rested else max(0.0, min(POLL, until - self.now())))
            if arrived is not None and isinstance(arrived[1], ev.Alive):
                self._heard[arrived[1].incarnation] = self.now()
                continue
            if arrived is not None:
                self._rested = self._rest == 0.0
                return arrived
            if not self._rested:
                time.sleep(self._rest)
                self._rested = True
                continue
            if self._gone:
                return self._gone.popleft()
            if self.now() >= until:
                return None

    def _look(self) -> None:
        """See which processes have ended: whatever they sent before has been received or is behind this event."""
        import ray

        self._listen_to_hearts()
        if self._coming:
            self._came()
        if not self._running:
            return
        ended, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for ref in ended:
            incarnation = self._running.pop(ref)
            self._heard.pop(incarnation, None)
            try:
                why = str(ray.get(ref))
            except Exception as error:  # noqa: BLE001 - Ray raises what the process raised
                cause = getattr(error, "cause", None)
                why = f"{type(cause).__name__}: {cause}" if cause else _first_line(error)
            self._gone.append((incarnation, ev.ProcessLost(incarnation, why)))

    def _listen_to_hearts(self) -> None:
        """Take whoever has been silent for long for lost. While the driver itself did not look, nobody was."""
        now = self.now()
        missed = max(0.0, now - self._looked - 2 * POLL) if self._looked else 0.0
        self._looked = now
        for incarnation, heard in list(self._heard.items()):
            self._heard[incarnation] = heard + missed
            if now - heard - missed > SILENCE:
                why = f"silent for {SILENCE:g} s: it is stopped, or its machine cannot be reached"
                self.end(incarnation)
                self._gone.append((incarnation, ev.ProcessLost(incarnation, why)))

    def close(self) -> None:
        """End every process of the run, and the cluster where it is private. Safe to call twice, and after errors."""
        import ray

        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ray.wait(list(self._running), num_returns=len(self._running), timeout=PATIENCE if self._running else 0)
            for actor in self._actors.values():
                with contextlib.suppress(Exception):
                    ray.kill(actor, no_restart=True)
        self._actors.clear()
        self._running.clear()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._private is not None or self._joined:
            ray.shutdown()
            self._joined = False
        if self._private is not None:
            reaper.end_all(self._private)
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None
        if self._reaper is not None:
            self._reaper.communicate(reaper.DONE)
            self._reaper = None


@contextlib.contextmanager
def shared_cluster(configs: Sequence[Config], max_bytes: int) -> Iterator[None]:
    """Ray for several runs, one after the other: they find this process connected, use that cluster and leave it up.

    It has the CPUs of the largest run and the first run's address. A process that is connected already stays so.

    Args:
        max_bytes: the largest array in a message of any run.
    """
    import ray

    first = configs[0].cluster
    shared = RayCluster(first.address, {}, max(config.cluster.start_seconds for config in configs), max_bytes)
    try:
        if not ray.is_initialized():
            shared.connect(max(map(_cpus, configs)))
        yield
    finally:
        shared.close()


def _cpus(config: Config) -> float:
    counts = {"server": config.cluster.servers, "worker": config.cluster.workers, "evaluator": 1}
    return sum(counts[role] * wanted.cpus for role, wanted in by_role(config).items())


def _why_not(error: Exception) -> str:
    """Ray's own words, and the way out of the one failure that a process brings about itself."""
    message = f"Ray did not start on this machine: {str(error).strip().splitlines()[0]}"
    if "AuthToken" in str(error):
        message += (
            "; this process has used Ray with another token before: connect with ray.init() first, and the run uses "
            "that cluster"
        )
    return message


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _node_address() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
