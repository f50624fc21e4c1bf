"""The driver's side of a plan of faults: says which are due, strikes the driver itself, tells what was delivered.

It is put around a run's parts at the start, where there is a plan; without one there is nothing of it. Everything else
goes its usual way: whoever is hit is lost, silent, late or refused by the disk like anybody.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from distgd import events as ev
from distgd.assignment import Cast
from distgd.cluster import Cluster
from distgd.driver import Driver
from distgd.faults import MLFLOW_DOWN, Coming, Fates, Fault, Own, texts
from distgd.injected import Journal
from distgd.plan import Plan
from distgd.process import Spec, strike
from distgd.rehearsed import RehearsedSpec
from distgd.tracking import Outage
from distgd.transport import Unreliable

log = logging.getLogger("distgd.trainer")

Strike = Callable[[str, float | None], None]


class Rehearsal:
    """A run with a plan of faults.

    Args:
        driver: the run's, None before it has one.
        strike: has this process killed or stopped, by `kill` or `stop` and seconds.

    Attributes:
        outage: of MLflow, for the tracker that writes there.
    """

    def __init__(self, plan: Plan, run_dir: Path, driver: Callable[[], Driver | None], strike: Strike = strike) -> None:
        assert plan.faults is not None
        self._plan, self._run_dir, self._driver, self._strike = plan, run_dir, driver, strike
        self._faults: tuple[Fault, ...] = plan.faults.faults
        self._texts = texts(self._faults)
        self._journal = Journal(run_dir)
        done = self._journal.counts(self._texts)
        self._seed = plan.config.run.seed
        self._coming = Coming(self._faults, self._seed, done)
        self._own = Own(self._faults, "driver", 0, self._coming.armed)
        self._fates = Fates(self._faults, "driver", 0, self._coming.armed, self._seed, f"driver {sum(done.values())}")
        self._due: deque[int] = deque()  # faults that nobody has been told of yet
        self._hit: set[int] = set()
        self._begun = False
        self._held: deque[tuple[int, Any]] = deque()  # what arrived while the driver was stopped (in virtual time)
        self._virtual = plan.config.cluster.backend == "inprocess"
        self.outage = Outage()
        self._cluster: Cluster
        self._door: Any

    # Around the run's parts.

    def begin(self) -> None:
        """Put a copy of the plan into the run folder; what was delivered in an earlier process has been told there."""
        assert self._plan.faults is not None
        (self._run_dir / "faults.yaml").write_text(self._plan.faults.text, encoding="utf-8")
        self._journal.new()
        self._due += self._coming.at_start()
        self._outages()

    def specs(self, cast: Cast, checkpoints: str | None = None) -> dict[int, Spec]:
        """Every process by incarnation, and what is meant for it."""
        specs = self._plan.specs(cast, checkpoints)
        done = self._delivered()
        armed = frozenset(n for n in self._coming.armed if self._faults[n].rate is not None or not done.get(n))
        return {
            incarnation: RehearsedSpec(
                spec, incarnation, *_place(cast, incarnation), self._faults, armed, self._seed, str(self._run_dir)
            )
            for incarnation, spec in specs.items()
        }

    def watching(self, watch: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
        """See the run's events, as `watch` does."""

        def see(event: dict[str, Any]) -> object:
            if event["event"] == "step":
                self._due += self._coming.stepped(event["step"], self.now())
            return watch(event)

        return see

    def around(self, cluster: Cluster) -> Rehearsal:
        """Be that cluster from now on."""
        self._cluster = self._door = cluster
        if Fates.any(self._faults, "driver", 0):
            self._door = Unreliable(cluster, ev.DRIVER, self._fates, self._deliver_to_driver, cluster.now)
        return self

    def summary(self) -> str:
        """How many of the plan's faults were delivered, for the result."""
        return f"{len(self._delivered())} of {len(self._faults)} injected"

    def never(self) -> list[str]:
        """What the plan has and nobody was hit by, in words."""
        assert self._plan.faults is not None
        delivered, where = self._delivered(), self._plan.faults.where
        return [
            f"{where}, line {fault.line}: {text}: never came due"
            for number, (fault, text) in enumerate(zip(self._faults, self._texts, strict=True))
            if number not in delivered
        ]

    def _delivered(self) -> Mapping[int, int]:
        return self._journal.counts(self._texts)

    # The cluster's verbs.

    def now(self) -> float:
        """As the cluster."""
        return self._cluster.now()

    def spawn(self, specs: Mapping[int, Spec], patient: Collection[int] = ()) -> None:
        """As the cluster."""
        self._cluster.spawn(specs, patient)

    def add(self, incarnation: int, spec: Spec, *, patient: bool = False) -> None:
        """As the cluster."""
        self._cluster.add(incarnation, spec, patient=patient)

    def end(self, incarnation: int) -> None:
        """As the cluster."""
        self._cluster.end(incarnation)

    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """As the cluster."""
        return self._cluster.nodes()

    def close(self) -> None:
        """As the cluster."""
        self._cluster.close()

    def send(self, to: int, message: Any) -> None:
        """From the driver, if it lives to do so."""
        before, after = self._own.sends(type(message).__name__)
        for number in before:
            self._strike_driver(number)
        self._door.send(to, message)
        for number in after:
            self._strike_driver(number)
        if isinstance(message, ev.MembershipChanged) and not self._begun:  # everybody is there
            self._begun = True
            self._due += self._coming.stepped(0, self.now())

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """What arrives at the driver, and what was delivered."""
        until = self.now() + timeout
        while True:
            if self._driver() is not None and (told := self._journal.new()):
                said = "; ".join(f"{line['fault']} ({line['whom']})" for line in told)
                return ev.DRIVER, ev.Injected(said)
            if self._held:
                return self._held.popleft()
            self._due += self._coming.passed(self.now())
            self._outages()
            self._tell()
            wait = min(until, self._coming.next) - self.now()
            arrived: tuple[int, Any] | None = self._door.receive(max(0.0, wait))
            if arrived is not None or self.now() >= until:
                return arrived

    # Faults that are due.

    def _outages(self) -> None:
        for number in [n for n in self._due if self._faults[n].what == MLFLOW_DOWN]:
            self._due.remove(number)
            self._journal.add(self._texts[number], "MLflow")
            self.outage.begin(self._faults[number].seconds)

    def _tell(self) -> None:
        """Tell those who are meant; one that has not started yet is told when it has."""
        driver = self._driver()
        if driver is None or not self._begun:
            return
        for _ in range(len(self._due)):
            number = self._due.popleft()
            fault = self._faults[number]
            ready = [i for i in driver.cast.everybody if i not in driver.members.joining]
            meant = [i for i in ready if fault.meets(*_place(driver.cast, i))]
            if fault.role == "driver":
                self._inject_driver(number)
            elif not fault.coming:
                self._fates.inject(number)
                for incarnation in meant:
                    self._inject(incarnation, number)
            elif fault.role is None or fault.index is None:
                victim = self._coming.victim(number, meant)
                self._due += [number] if victim is None else []
                if victim is not None:
                    self._inject(victim, number)
            elif meant:
                self._inject(meant[0], number)
            else:
                self._due.append(number)

    def _inject(self, incarnation: int, number: int) -> None:
        driver = self._driver()
        assert driver is not None
        self._cluster.send(incarnation, ev.Inject(driver.cast.timeline, number))

    def _inject_driver(self, number: int) -> None:
        self._fates.inject(number)
        if self._own.inject(number) is not None:
            self._strike_driver(number)

    def _strike_driver(self, number: int) -> None:
        fault = self._faults[number]
        self._deliver_to_driver(number)
        if fault.what == "stop" and self._virtual:
            assert fault.seconds is not None
            until = self.now() + fault.seconds
            while self.now() < until:
                arrived = self._cluster.receive(until - self.now())
                self._held += [] if arrived is None else [arrived]
            return
        log.warning("%s", self._texts[number])
        self._strike(fault.what, fault.seconds)

    def _deliver_to_driver(self, number: int) -> None:
        if number not in self._hit or not self._faults[number].of_messages:
            self._hit.add(number)
            self._journal.add(self._texts[number], "driver")


def _place(cast: Cast, incarnation: int) -> tuple[str, int]:
    """Role and index of a process, in words of a plan."""
    for role, members in (("server", cast.shards), ("worker", cast.workers)):
        if incarnation in members:
            return role, members.index(incarnation)
    return "evaluator", 0
