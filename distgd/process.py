"""One process: the event loop around a state machine that knows no sockets, and what such a machine must be able to do.

Whoever starts processes says where they are; nothing here knows Ray.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from distgd import events as ev
from distgd import standby
from distgd.errors import DistgdError, users_error
from distgd.transport import Door, Endpoint, Place
from distgd.transport.segments import Array
from distgd.wire import Codec

GLANCE = 0.05  # seconds between two looks at a chore
HEARTS = 1 << 32  # added to an incarnation it is that of its heartbeat
BEAT = 0.5  # seconds between heartbeats
SILENCE = 5.0  # seconds without a heartbeat until a process is taken for lost
SILENT = f"silent for {SILENCE:g} s: it is stopped, or its machine cannot be reached"


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


@runtime_checkable
class Tells(Protocol):
    """An actor that has facts of its own to tell when it is ready."""

    def facts(self) -> dict[str, str]: ...


@runtime_checkable
class Carried(Protocol):
    """An actor whose messages go over an endpoint of its own making; `after` is None where `receive` keeps time."""

    def carrier(self, endpoint: Any, clock: Callable[[], float], after: Any) -> Any: ...


class Spec(Protocol):
    """All that a process is made of; it travels by pickle, through Ray alone."""

    @property
    def role(self) -> str: ...
    @property
    def rules(self) -> Any: ...
    def build(self, clock: Callable[[], float], allocate: Callable[[int, str], Array]) -> Actor: ...


class Process:
    """The event loop: an endpoint once the process is somebody, and a state machine once `run` is called.

    Args:
        path: folders that modules are looked for in, beside this process's own.
        whereabouts: says the machine that this is, by the name that everybody has for it, and its address for others.
    """

    _endpoint: Endpoint  # from the moment it is somebody
    _door: Door  # the same, or what is around it

    def __init__(self, path: Sequence[str], whereabouts: Callable[[], tuple[str, str]]) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        self._node, self._host = whereabouts()
        self._me, self._secret = -1, b""
        self._over = threading.Event()
        self._work: deque[Any] = deque()  # what is to be computed, in order
        self._chores = ThreadPoolExecutor(1, "chores")  # no thread before there is one
        self._begun: deque[Future[Any]] = deque()

    def prepare(self) -> bool:
        """Do what every role needs, before there is one; whether there is memory to wait for it."""
        return standby.prepare()

    def become(self, me: int, role: str, secret: bytes, listen: str, alone: bool, max_bytes: int) -> Place:
        """Be an incarnation from now on; the machine and the addresses that it listens on.

        Args:
            alone: whether the run has one machine.
        """
        type(self).__name__ = role.capitalize()  # Ray writes it over the command line
        if role != "server":
            _give_way()
        self._me, self._secret = me, secret
        host = None if alone else self._host
        self._door = self._endpoint = endpoint(me, role, secret, max_bytes, listen=listen, host=host)
        return Place(self._node, self._endpoint.addresses)

    def run(self, spec: Spec, places: Mapping[int, Place]) -> str:
        """Live until told to end; returns why. An error is sent to the driver before the process ends."""
        self._endpoint.meet(self._node, places)
        timeline = spec.rules.timeline
        try:
            threading.Thread(target=self._beat, args=(places[ev.DRIVER],), daemon=True).start()
            actor = spec.build(time.monotonic, self._endpoint.allocate)
            if isinstance(actor, Places):
                self._endpoint.place = actor.place
            if isinstance(actor, Carried):
                self._door = actor.carrier(self._endpoint, time.monotonic, None)
            gc.freeze()  # what was imported and built stays; the collector need not look at it over and over
            facts = {"pid": str(os.getpid()), "host": socket.gethostname()}
            facts |= actor.facts() if isinstance(actor, Tells) else {}
            self._door.send(ev.DRIVER, ev.ProcessReady(timeline, facts))
            return self._loop(actor)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the driver is told
            kind = type(error).__name__ if isinstance(error, DistgdError) else "RunFailed"
            self._endpoint.send(ev.DRIVER, ev.ProcessFailed(timeline, kind, _told(error)))
            return f"failed: {error}"
        finally:
            self._over.set()
            self._door.close()

    def _beat(self, driver: Place) -> None:
        """Tell the driver from a thread of its own, over a connection of its own, that this process is not stopped."""
        heart = Endpoint(HEARTS + self._me, "heart", self._secret, Codec(ev.MESSAGES))
        heart.meet(self._node, {ev.DRIVER: driver})
        while not self._over.wait(BEAT):
            heart.send(ev.DRIVER, ev.Alive(self._me))
            heart.receive(0.0)
        heart.close()

    def _loop(self, actor: Actor) -> str:
        while True:
            arrived = self._door.receive(0.0 if self._work else 1.0 if not self._begun else GLANCE)
            if arrived is not None and isinstance(arrived[1], ev.Placed):
                new = arrived[1]
                self._endpoint.meet(self._node, {new.incarnation: Place(new.node, new.addresses)})
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
                self._door.send(to, message)
            case ev.Compute(wanted):
                self._work.append(wanted)
            case ev.Update(effects):
                for each in effects:
                    self._do(each)
            case ev.Beside(chore):
                chore.begin()
                self._begun.append(self._chores.submit(chore.finish))
            case ev.Strike(what, seconds):
                strike(what, seconds)


def strike(what: str, seconds: float | None) -> None:
    """Have this process killed (`kill`), or stopped (`stop`) until it goes on by itself in so many seconds."""
    if what == "stop" and seconds is not None:
        again = f"sleep {seconds:g}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", again], start_new_session=True)
    os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)


def endpoint(me: int, role: str, secret: bytes, max_bytes: int, *, listen: str, host: str | None) -> Endpoint:
    """An endpoint that speaks this package's messages; `host` is None where the run has one machine."""
    return Endpoint(me, role, secret, Codec(ev.MESSAGES), listen=listen, host=host, max_bytes=max_bytes)


def _give_way() -> None:
    """Do not take the core from who wakes this process, as a server that still has others to wake would wait for it."""
    if hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, DistgdError) else users_error(error)
