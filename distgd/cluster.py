"""Where processes live: Ray. The only module that imports it.

A cluster spawns processes from specifications, carries the driver's messages, and says which process is gone. What a
message means is no business of this one. `RayCluster` runs each process as an actor whose one long call is the event
loop of a plain class; `distgd.inprocess.InProcessCluster` has the same verbs on one thread.

Ray gives placement, life and death, and hands the run's secret to its processes; no byte of a step goes through it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Protocol

from distgd import events as ev
from distgd import reaper
from distgd.config import Config
from distgd.errors import BadInput, DeadlineExceeded, DistgdError, RunFailed
from distgd.process import SILENCE, SILENT, Process, Spec, endpoint
from distgd.resources import Resources, by_role, fit
from distgd.standby import Standbys
from distgd.transport import Endpoint, Place

log = logging.getLogger("distgd.cluster")

POLL = 0.2  # seconds between two looks at Ray for processes that are gone
NOTICES = 1.0  # seconds between two looks for machines that are drained
PATIENCE = 5.0  # seconds that processes get to end by themselves
MESSAGE_SLACK = 1 << 20  # bytes of a message beside its arrays
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


class Cluster(Protocol):
    """The verbs that the trainer knows."""

    def now(self) -> float: ...

    def spawn(self, specs: Mapping[int, Spec], patient: Collection[int] = ()) -> None: ...

    def add(self, incarnation: int, spec: Spec, *, patient: bool = False) -> None: ...

    def end(self, incarnation: int) -> None: ...

    def nodes(self) -> tuple[tuple[int, ...], ...]: ...

    def send(self, to: int, message: Any) -> None: ...

    def receive(self, timeout: float) -> tuple[int, Any] | None: ...

    def close(self) -> None: ...


def _named(role: str) -> type[Process]:
    """So that `ps` and Ray's pages tell who is who."""
    return type(role.capitalize(), (Process,), {})


def _life(role: str) -> str:
    """What Ray writes over a process's command line while it lives."""
    return f"{role.capitalize()}.run"


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
        standby: keep an idle process on each machine, which takes over where one is lost.

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
        *,
        standby: bool = False,
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
        self._gone: deque[tuple[float, tuple[int, Any]]] = deque()  # what was seen here, and when it is to be said
        self._coming: dict[Any, tuple[int, Spec, float]] = {}  # the answer that says where a process is -> who, when
        self._heard: dict[int, float] = {}  # when each heartbeat was heard last, or is due first
        self._alone, self._node = True, ""
        self._looked = 0.0
        self._joined = False
        self._private: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._endpoint: Endpoint | None = None
        self._standby = standby
        self._standbys = Standbys(_Idle(), on=False)
        self._vacant: dict[int, tuple[str, str]] = {}  # who is gone -> his role and machine, until somebody is there
        self._roles: dict[int, str] = {}
        self._drained: frozenset[str] = frozenset()  # machines that are about to be taken away
        self._noticed = 0.0
        self._holds: dict[int, Any] = {}  # what Ray sets aside for those who were started without resources

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.monotonic()

    def spawn(self, specs: Mapping[int, Spec], patient: Collection[int] = ()) -> None:
        """Place and start processes by incarnation; each reports that it is ready. Called once.

        Args:
            patient: those that may wait for room as long as it takes; nobody waits for them.
        """
        import ray

        began = self.now()
        if not ray.is_initialized():
            self.connect(sum(self._resources[spec.role].cpus for spec in specs.values()))
        needed = {incarnation: spec for incarnation, spec in specs.items() if incarnation not in patient}
        self._check_gpus(needed)
        self._check_trial(needed)
        self._alone = len(_nodes()) == 1 and (self._private is not None or not patient)  # it may grow by a machine
        self._node, address = _whereabouts()
        host = None if self._alone else address
        self._endpoint = endpoint(ev.DRIVER, "driver", self._secret, self._max_bytes, listen="all", host=host)
        self._standbys = Standbys(_Idle(), on=self._standby and _may_stand_by())
        asked = {self._ask(incarnation, spec): incarnation for incarnation, spec in needed.items()}
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=self._start_seconds)
        if late:
            raise self._not_placed([specs[asked[ref]].role for ref in late], self.now() - began)
        places = {asked[ref]: ray.get(ref) for ref in ready} | {ev.DRIVER: Place(self._node, self._endpoint.addresses)}
        self._places = places
        self._endpoint.meet(self._node, {i: Place(place.node, ()) for i, place in places.items()})
        for incarnation, spec in needed.items():
            self._run(incarnation, spec)
        for incarnation in patient:  # behind all others, so that they take nobody's room
            self.add(incarnation, specs[incarnation], patient=True)
        self._standbys.settle(self.now())

    def _run(self, incarnation: int, spec: Spec) -> None:
        try:
            life = self._actors[incarnation].run.options(name=_life(spec.role)).remote(spec, self._places)
        except (TypeError, pickle.PicklingError) as error:
            do = "keep locks, files and connections out of the task object, or make them in its methods"
            found = f"the error: {error.__cause__ or error}"  # Ray's own text prints everything that is sent
            raise BadInput.described("task", "an object that can be sent to processes", found, do) from error
        self._running[life] = incarnation
        self._heard[incarnation] = self.now() + self._start_seconds - SILENCE  # until its heart beats

    def add(self, incarnation: int, spec: Spec, *, patient: bool = False) -> None:
        """Place and start one more process, which reports when it is ready; returns at once.

        Args:
            patient: it may wait for room as long as it takes.
        """
        self._coming[self._ask(incarnation, spec)] = incarnation, spec, inf if patient else self.now()

    def _came(self) -> None:
        """Let processes live that have been placed, and tell all others where they are."""
        import ray

        placed, _ = ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0)
        for ref in placed:
            incarnation, spec, _ = self._coming.pop(ref)
            try:
                place = ray.get(ref)
            except Exception as error:  # noqa: BLE001 - Ray raises whatever ended it
                self._lost(incarnation, _first_line(error))
                continue
            assert self._endpoint is not None
            self._places[incarnation] = place
            self._endpoint.meet(self._node, {incarnation: Place(place.node, ())})
            for other in self._running.values():
                self._endpoint.send(other, ev.Placed(incarnation, place.node, place.addresses))
            self._run(incarnation, spec)
        for ref, (incarnation, _, began) in list(self._coming.items()):
            if self.now() - began > self._start_seconds:
                del self._coming[ref]
                self.end(incarnation)
                why = f"not there {self._start_seconds:g} s after it was asked for"
                self._lost(incarnation, why)

    def end(self, incarnation: int) -> None:
        """Make sure that a process is gone which is taken for lost."""
        import ray

        self._vacate(incarnation)
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

    def _ask(self, incarnation: int, spec: Spec) -> Any:
        """Ask for a process, an idle one where one was lost if there is one; the answer will say where it is."""
        self._roles[incarnation] = spec.role
        self._actors[incarnation] = actor = self._idle(incarnation, spec) or self._actor(spec)
        listens = "all" if spec.role == "server" else "near" if spec.role == "worker" and not self._alone else ""
        return actor.become.remote(incarnation, spec.role, self._secret, listens, self._alone, self._max_bytes)

    def _actor(self, spec: Spec) -> Any:
        import ray

        resources = self._resources[spec.role]
        remote: Any = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_restarts=0, max_task_retries=0)
        return remote(_named(spec.role)).remote(_path(), _whereabouts)

    def _idle(self, incarnation: int, spec: Spec) -> Any | None:
        """The standby of the machine on which somebody of this role was lost; Ray counts it from now on."""
        gone = next((i for i, (role, _) in self._vacant.items() if role == spec.role), None)
        if gone is None:
            return None
        node = self._vacant.pop(gone)[1]
        resources = self._resources[spec.role]
        fits = not resources.gpus and node not in self._drained  # Ray hides cards from it
        process = self._standbys.take(node, self.now()) if fits else None
        if process is None:
            self._standbys.settle(self.now())
            return None
        if resources.cpus:
            self._holds[incarnation] = _hold(node, resources.cpus)
        return process.actor

    def _vacate(self, incarnation: int) -> None:
        """Somebody is gone: remember where he was, and give back what was held for him."""
        role, place = self._roles.pop(incarnation, None), self._places.get(incarnation)
        if role is not None and place is not None:
            self._vacant[incarnation] = role, place.node
        _let_go(self._holds.pop(incarnation, None))

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
            if self._gone and self.now() >= self._gone[0][0]:
                return self._gone.popleft()[1]
            arrived = self._endpoint.receive(0.0 if not self._rested else max(0.0, min(POLL, until - self.now())))
            if arrived is not None and isinstance(arrived[1], ev.Alive):
                self._beats(arrived[1].incarnation)
                continue
            if arrived is not None:
                self._rested = self._rest == 0.0
                return arrived
            if not self._rested:
                time.sleep(self._rest)
                self._rested = True
                continue
            if self._gone:
                return self._gone.popleft()[1]
            if self.now() >= until:
                return None

    def _beats(self, incarnation: int) -> None:
        """Somebody lives. Who was taken for lost, and could not be ended, is told."""
        if incarnation in self._heard:
            self._heard[incarnation] = self.now()
        else:
            self.send(incarnation, ev.Fenced(0))

    def _look(self) -> None:
        """See which processes have ended: whatever they sent before has been received or is behind this event."""
        import ray

        self._listen_to_hearts()
        if self._coming:
            self._came()
        if self._private is None and self.now() >= self._noticed + NOTICES:
            self._notice()
        self._standbys.tend(lambda: {place.node for place in self._places.values()} - self._drained, self.now())
        if not self._running:
            return
        ended, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for ref in ended:
            incarnation = self._running.pop(ref)
            self._heard.pop(incarnation, None)
            self._vacate(incarnation)
            try:
                why = str(ray.get(ref))
            except Exception as error:  # noqa: BLE001 - Ray raises what the process raised
                cause = getattr(error, "cause", None)
                why = f"{type(cause).__name__}: {cause}" if cause else _first_line(error)
            self._lost(incarnation, why)

    def _notice(self) -> None:
        """Say who is on a machine that is drained, again and again: who is moved elsewhere is no longer there."""
        self._noticed, self._drained = self.now(), _drained()
        leaving = [incarnation for incarnation, place in self._places.items() if place.node in self._drained]
        for incarnation in [ev.DRIVER] if ev.DRIVER in leaving else leaving:
            self._gone.append((self.now(), (ev.DRIVER, ev.Drained(incarnation))))

    def _lost(self, incarnation: int, why: str) -> None:
        """Say that it is gone behind what it has sent, however much others go on to send."""
        self._gone.append((self.now() + POLL, (incarnation, ev.ProcessLost(incarnation, why))))

    def _listen_to_hearts(self) -> None:
        """Take whoever has been silent for long for lost. While the driver itself did not look, nobody was."""
        now = self.now()
        missed = max(0.0, now - self._looked - 2 * POLL) if self._looked else 0.0
        self._looked = now
        for incarnation, heard in list(self._heard.items()):
            self._heard[incarnation] = heard + missed
            if now - heard - missed > SILENCE:
                self.end(incarnation)
                self._lost(incarnation, SILENT)

    def close(self) -> None:
        """End every process of the run, and the cluster where it is private. Safe to call twice, and after errors."""
        import ray

        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ray.wait(list(self._running), num_returns=len(self._running), timeout=PATIENCE if self._running else 0)
            self._standbys.close()
            for actor in self._actors.values():
                with contextlib.suppress(Exception):
                    ray.kill(actor, no_restart=True)
            for hold in self._holds.values():
                _let_go(hold)
        self._holds.clear()
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


@dataclass(frozen=True)
class _Waiting:
    """An actor without a role, and its answer whether it stays."""

    actor: Any
    answer: Any


class _Idle:
    """Standbys as actors that ask Ray for nothing."""

    def begin(self, node: str) -> _Waiting:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there: Any = NodeAffinitySchedulingStrategy(node, soft=False)
        remote: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=there)
        actor = remote(_named("standby")).remote(_path(), _whereabouts)
        return _Waiting(actor, actor.prepare.remote())

    def stays(self, process: _Waiting) -> bool | None:
        import ray

        if not ray.wait([process.answer], timeout=0)[0]:
            return None
        try:
            return bool(ray.get(process.answer))
        except Exception as error:  # noqa: BLE001 - Ray raises whatever ended it
            log.warning("no standby process: %s", _first_line(error))
            return False

    def end(self, process: _Waiting) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(process.actor, no_restart=True)


def _may_stand_by() -> bool:
    """Not in a placement group, such as a trial's: what is outside of it is not this run's to use."""
    import ray.util

    return ray.util.get_current_placement_group() is None


def _hold(node: str, cpus: float) -> Any:
    """Have Ray set aside CPUs on a machine, for a process that was started without."""
    import ray.util

    address = next((n["NodeManagerAddress"] for n in _nodes() if n["NodeID"] == node), None)
    if address is None:
        return None
    return ray.util.placement_group([{"CPU": cpus, f"node:{address}": 0.001}])


def _let_go(hold: Any) -> None:
    if hold is not None:
        import ray.util

        with contextlib.suppress(Exception):
            ray.util.remove_placement_group(hold)


def _path() -> list[str]:
    """What imports here imports there."""
    return [os.path.abspath(folder) for folder in sys.path]


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
    counts = {"server": config.cluster.servers, "worker": config.cluster.workers.max, "evaluator": 1}
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


def _drained() -> frozenset[str]:
    """The nodes that Ray has been told are about to go: by `ray drain-node`, an autoscaler or a spot notice."""
    try:  # what Ray's own trainer asks; there is no public way
        from ray._private.state import state

        return frozenset(state.get_draining_nodes())
    except Exception as error:  # noqa: BLE001 - another version of Ray may not have it, and is no worse off for that
        log.debug("whether machines are drained is not known: %s", error)
        return frozenset()


def _whereabouts() -> tuple[str, str]:
    """This machine: Ray's id of it, and the address that others reach it by."""
    import ray.util

    return str(ray.get_runtime_context().get_node_id()), str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
