"""A cluster on one thread, in virtual time: the debugger, the test bed, and the simulator of stragglers.

The same server, worker and evaluator classes as on Ray, over the in-memory twin of the transport. Every message takes a
delay drawn from a seed; messages between one pair keep their order, as on a socket. A process that computes handles
nothing until it is done. The arithmetic is real, the durations are not: a slot takes `pace(worker)` virtual seconds.

Break-points work: `cluster.backend=inprocess`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from distgd import events as ev
from distgd.process import SILENCE, SILENT, Actor, Carried, Spec, Tells
from distgd.transport import Envelope, InMemoryNetwork, Loss, LossyNetwork

LATENCY = (50e-6, 150e-6)  # virtual seconds a message takes
CHORE_SECONDS = 1e-2  # virtual seconds that a chore takes beside everything else
START_SECONDS = 5e-3  # virtual seconds until a process that is added is ready
SLOT_SECONDS = 1e-3  # virtual seconds that a slot takes where nothing else is said


@dataclass
class _Process:
    actor: Actor
    inbox: deque[tuple[int, Any]] = field(default_factory=deque)
    work: deque[Any] = field(default_factory=deque)  # what it is to compute, in order
    busy: bool = False
    resumes: float = 0.0  # it is stopped until then
    following: deque[Iterator[ev.Effect]] = field(default_factory=deque)  # what it does then


class InProcessCluster:
    """Processes as objects, a heap of things to come instead of a network.

    Args:
        seed: of the delays; the same seed gives the same run, event by event.
        pace: virtual seconds per slot, by incarnation.
        lose: when an incarnation dies, in virtual seconds.
        machines: how many there are to be; processes are spread over them in turn, each role by itself.
        loss: what the network does to messages; None for one that keeps each.
        room: virtual seconds until there is room for a process that is patient.
    """

    def __init__(
        self,
        seed: int = 0,
        pace: Callable[[int], float] = lambda incarnation: SLOT_SECONDS,
        lose: Mapping[int, float] | None = None,
        machines: int = 1,
        loss: Loss | None = None,
        room: Callable[[], float] = lambda: START_SECONDS,
    ) -> None:
        self._random = random.Random(seed)
        self._pace, self._room = pace, room
        self._machines: list[list[int]] = [[] for _ in range(machines)]
        self._turns: dict[str, int] = {}  # processes so far, by role
        self._now = 0.0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._last_delivery: dict[tuple[int, int], float] = {}
        self._network = InMemoryNetwork(self._sent)
        self.lossy = self._losing(loss) if loss else None
        self._driver = self._network.endpoint(ev.DRIVER)
        self._endpoints: dict[int, Any] = {}
        self._processes: dict[int, _Process] = {}
        self._threads, self._deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        for incarnation, at in (lose or {}).items():
            self._at(at, lambda gone=incarnation: self._die(gone))  # type: ignore[misc]

    def _losing(self, loss: Loss) -> LossyNetwork:
        return LossyNetwork(lambda *_: loss.ways(self._random), self._after, self._deliver, self._lives)

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def spawn(self, specs: Mapping[int, Spec], patient: Collection[int] = ()) -> None:
        """Build processes by incarnation; each reports that it is ready, those that are `patient` some time later."""
        for incarnation, spec in specs.items():
            if incarnation in patient:
                self.add(incarnation, spec, patient=True)
                continue
            self._place(incarnation, spec)
            self._begin(incarnation, spec)

    def add(self, incarnation: int, spec: Spec, *, patient: bool = False) -> None:
        """One more process, which is ready some time later; a `patient` one as late as `room` says."""
        self._place(incarnation, spec)
        later = self._room() if patient else START_SECONDS
        self._at(self._now + later, lambda: self._begin(incarnation, spec))

    def end(self, incarnation: int) -> None:
        """Make sure that a process is gone."""
        self._processes.pop(incarnation, None)

    def _place(self, incarnation: int, spec: Spec) -> None:
        turn = self._turns[spec.role] = self._turns.get(spec.role, -1) + 1
        self._machines[turn % len(self._machines)].append(incarnation)

    def _begin(self, incarnation: int, spec: Spec) -> None:
        actor = spec.build(self.now, np.zeros)
        endpoint = self._network.endpoint(incarnation)
        carried = actor.carrier(endpoint, self.now, self._after) if isinstance(actor, Carried) else endpoint
        self._endpoints[incarnation] = carried
        self._processes[incarnation] = _Process(actor)
        facts = {"device": "this process"} | (actor.facts() if isinstance(actor, Tells) else {})
        ready = ev.ProcessReady(spec.rules.timeline, facts)
        self._endpoints[incarnation].send(ev.DRIVER, ready)

    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """The incarnations on each machine."""
        return tuple(map(tuple, self._machines))

    def send(self, to: int, message: Any) -> None:
        """From the driver."""
        self._driver.send(to, message)

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """Let time pass until something arrives at the driver, for `timeout` virtual seconds at most."""
        until = self._now + timeout
        while (arrived := self._driver.receive(0.0)) is None:
            if not self._heap or self._heap[0][0] > until:
                self._now = until
                return None
            self._now, _, happen = heapq.heappop(self._heap)
            happen()
        return arrived

    def close(self) -> None:
        """Drop every process."""
        self._processes.clear()
        self._heap.clear()
        torch.set_num_threads(self._threads)
        torch.use_deterministic_algorithms(self._deterministic)

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time, next(self._order), happen))

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        self._at(self._now + seconds, happen)

    def _lives(self, incarnation: int) -> bool:
        return incarnation == ev.DRIVER or incarnation in self._processes

    def _sent(self, envelope: Envelope) -> None:
        if self.lossy is not None:
            self.lossy.send(envelope)
            return
        pair = (envelope.source, envelope.destination)
        arrives = max(self._now + self._random.uniform(*LATENCY), self._last_delivery.get(pair, 0.0))
        self._last_delivery[pair] = arrives
        self._at(arrives, lambda: self._deliver(envelope))

    def _deliver(self, envelope: Envelope) -> None:
        self._network.put(envelope)
        process = self._processes.get(envelope.destination)
        if process is None:
            return
        while (arrived := self._endpoints[envelope.destination].receive(0.0)) is not None:
            process.inbox.append(arrived)
        self._turn(envelope.destination)

    def _turn(self, incarnation: int) -> None:
        """Let a process that does not compute handle what has arrived, then start its next work."""
        process = self._processes.get(incarnation)
        if process is None or process.busy or self._now < process.resumes:
            return
        while process.inbox and incarnation in self._processes and self._now >= process.resumes:
            source, message = process.inbox.popleft()
            self._do(incarnation, process.actor.handle(source, message))
        if process.work and incarnation in self._processes and self._now >= process.resumes:
            process.busy = True
            seconds = self._pace(incarnation)
            done = process.actor.perform(process.work.popleft(), lambda effect: self._do(incarnation, [effect]))
            done = replace(done, seconds=seconds)
            self._at(self._now + seconds, lambda: self._finish(incarnation, done))

    def _finish(self, incarnation: int, done: Any) -> None:
        process = self._processes.get(incarnation)
        if process is None:
            return
        if self._now < process.resumes:
            self._at(process.resumes, lambda: self._finish(incarnation, done))
            return
        process.busy = False
        self._do(incarnation, process.actor.handle(incarnation, done))
        self._turn(incarnation)

    def _answer(self, incarnation: int, finish: Callable[[], Any]) -> None:
        process = self._processes.get(incarnation)
        if process is not None:
            process.inbox.append((incarnation, finish()))
            self._turn(incarnation)

    def _do(self, incarnation: int, effects: Iterable[ev.Effect]) -> None:
        following = iter(effects)
        for effect in following:
            match effect:
                case ev.Send(to, message):
                    self._endpoints[incarnation].send(to, message)
                case ev.Compute(work):
                    self._processes[incarnation].work.append(work)
                case ev.Update(later):
                    self._do(incarnation, later)
                    if not self._goes_on(incarnation, following):
                        return
                case ev.Beside(chore):
                    chore.begin()
                    self._at(self._now + CHORE_SECONDS, lambda done=chore.finish: self._answer(incarnation, done))  # type: ignore[misc]
                case ev.End():
                    self._processes.pop(incarnation, None)
                    return
                case ev.Strike("kill"):
                    self._die(incarnation)
                    return
                case ev.Strike(_, seconds):
                    self._stop(incarnation, math.inf if seconds is None else seconds)
                    if not self._goes_on(incarnation, following):
                        return

    def _goes_on(self, incarnation: int, following: Iterator[ev.Effect]) -> bool:
        """Whether it is there and not stopped; if it is, what follows is done when it goes on."""
        process = self._processes.get(incarnation)
        if process is not None and self._now < process.resumes:
            process.following.append(following)
            return False
        return process is not None

    def _stop(self, incarnation: int, seconds: float) -> None:
        """It stands still for so long, in the middle of what it does; silence tells of it."""
        process = self._processes[incarnation]
        process.resumes = self._now + seconds

        def go_on() -> None:
            while process.following and incarnation in self._processes:
                self._do(incarnation, process.following.popleft())
            self._turn(incarnation)

        if seconds < math.inf:
            self._at(process.resumes, go_on)
        if seconds > SILENCE:
            self._at(self._now + SILENCE, lambda: self._silent(incarnation))

    def _silent(self, incarnation: int) -> None:
        if incarnation in self._processes:
            self.end(incarnation)
            self._network.put(Envelope(incarnation, ev.DRIVER, ev.ProcessLost(incarnation, SILENT)))

    def _die(self, incarnation: int) -> None:
        if self._processes.pop(incarnation, None) is not None:
            lost = ev.ProcessLost(incarnation, "lost by plan")
            self._network.put(Envelope(incarnation, ev.DRIVER, lost))
