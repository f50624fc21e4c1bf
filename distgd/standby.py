"""Idle processes, one a machine, that have done what is slow about a start and wait for a role.

A process that takes over has to import torch, which takes seconds beside busy workers. A standby has done so. It has no
incarnation, no endpoint and no heartbeat until it is taken, so that it is a member of nothing; another one is started
in its place later, when whoever took over has begun to work.

Who starts processes is given: nothing here knows Ray.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from distgd.memory import available

SETTLE = 5.0  # seconds after a start, or after one was taken, in which the machine belongs to those who work
NEEDS = 1 << 30  # bytes that must be free for a standby to stay: it takes a quarter of that, a role takes more
NICENESS = 5  # of what a standby does beside busy workers: about a quarter of a core that somebody else wants
IMPORTED = ("distgd.server", "distgd.worker", "distgd.evaluator", "distgd.checkpoint")
"""What every role needs; torch among it."""


class Starter(Protocol):
    """What it takes to have processes."""

    def begin(self, node: str) -> Any:
        """Start one on a machine; returns at once."""

    def stays(self, process: Any) -> bool | None:
        """Whether it is ready (true), or will not be one (false); None while it is not known."""

    def end(self, process: Any) -> None:
        """Make sure that it is gone."""


@dataclass
class _Standby:
    process: Any
    ready: bool = False


class Standbys:
    """At most one standby on each machine.

    Args:
        starter: starts, asks and ends processes.
        on: whether there are to be any.
    """

    def __init__(self, starter: Starter, *, on: bool) -> None:
        self._starter, self._on = starter, on
        self._idle: dict[str, _Standby] = {}  # by machine
        self._without: set[str] = set()  # machines that have no memory for one
        self._due = 0.0

    def settle(self, now: float) -> None:
        """Somebody has begun to start: start nobody else for a while."""
        self._due = now + SETTLE

    def tend(self, nodes: Callable[[], Collection[str]], now: float) -> None:
        """Look after those that are starting, and start one where there is none, if it is time."""
        if not self._on:
            return
        for node, standby in list(self._idle.items()):
            if not standby.ready and (stays := self._starter.stays(standby.process)) is not None:
                standby.ready = stays
                if not stays:
                    self._without.add(node)
                    self._starter.end(self._idle.pop(node).process)
        if now < self._due:
            return
        self._due = now + SETTLE
        for node in set(nodes()) - self._idle.keys() - self._without:
            self._idle[node] = _Standby(self._starter.begin(node))

    def take(self, node: str, now: float) -> Any | None:
        """The standby on a machine, which is none from now on; None where there is none that is ready."""
        standby = self._idle.get(node)
        if standby is None or not standby.ready:
            return None
        del self._idle[node]
        self.settle(now)
        return standby.process

    def close(self) -> None:
        """End all of them."""
        for standby in self._idle.values():
            self._starter.end(standby.process)
        self._idle.clear()
        self._on = False


def prepare(modules: Sequence[str] = IMPORTED) -> bool:
    """In the process: import what every role needs, giving way to everybody; whether there is memory to stay.

    A thread that has once been made nicer may not come back without privileges, but on Linux each has a niceness of its
    own: another thread does the work, and the process takes a role as it was born.
    """
    if available() < NEEDS:
        return False
    worker = threading.Thread(target=_imported, args=(modules,), name="imports")
    worker.start()
    worker.join()
    return True


def _imported(modules: Sequence[str]) -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    for module in modules:
        import_module(module)
