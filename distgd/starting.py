"""How a run gets going, at its start and after the loss of a shard: everybody is ready, every shard has its state.

Where checkpoints are kept, the first one is there before anything is committed: it is what all go back to, and it shows
that what shards write can be read here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distgd import events as ev
from distgd.assignment import Assignment, Cast
from distgd.checkpoint import Checkpoint, Damaged
from distgd.cluster import Cluster
from distgd.driver import Driver
from distgd.effects import Effect, Finish, Log, Resumed
from distgd.errors import BadInput, DeadlineExceeded, ProcessLost, RunFailed
from distgd.keeping import Keeping
from distgd.plan import Plan
from distgd.process import Spec
from distgd.promise import Promise, Verdict
from distgd.resume import Found, resumed
from distgd.saving import Whole
from distgd.updates import Updates

log = logging.getLogger("distgd.trainer")

RECOVERIES = 10  # attempts to bring all shards back, each ended by the loss of another one


class _ShardLost(Exception):
    """A shard is gone while all of them are being brought back."""

    def __init__(self, incarnation: int) -> None:
        super().__init__(incarnation)
        self.incarnation = incarnation


@dataclass(frozen=True)
class Begun:
    """A driver whose shards have their state; `lines` are for the ledger before its `effects` are performed."""

    driver: Driver
    lines: list[dict[str, Any]]
    effects: list[Effect]


class Starting:
    """Brings processes, weights and the driver's state machine together.

    Args:
        keeping: the run's checkpoints, None where it keeps none.
        specs: of every process of a cast, by incarnation, as `Plan.specs` gives them.
        promise: of the run's bits; it outlives every driver.
        updates: the record, where there is one.
    """

    def __init__(
        self,
        plan: Plan,
        assignment: Assignment,
        run_dir: Path,
        cluster: Cluster,
        keeping: Keeping | None,
        promise: Promise,
        updates: Updates | None,
        specs: Callable[[Cast, str | None], Mapping[int, Spec]],
    ) -> None:
        self._specs = specs
        self._plan, self._assignment, self._run_dir = plan, assignment, run_dir
        self._cluster, self._keeping, self._promise, self._updates = cluster, keeping, promise, updates
        self._refused: set[int] = set()  # workers that were ended, of which the cluster may tell yet
        self._meanwhile: list[tuple[int, Any]] = []  # what arrived and is not what was waited for
        self._strict = True  # whether a timeline needs a checkpoint of its own to begin with
        self._patient: set[int] = set()  # those that the start does not wait for

    def begin(self, cast: Cast, found: Found | None, goes_on: Resumed | None) -> Begun:
        """Wait for every process that the run does not begin without.

        Raises:
            DeadlineExceeded: somebody is not ready in time.
            RunFailed, BadInput: somebody cannot start; the error is what it said. Or nobody may take part.
        """
        self._patient = set(self._plan.patient(cast))
        needed = {incarnation for incarnation in cast.everybody if incarnation not in self._patient}
        ready: dict[int, dict[str, str]] = {}
        self._await_ready(cast, needed, ready)
        verdict = self._promise.judge(cast, ready)
        checkpoint = found.checkpoint if found and goes_on else None
        cast = self._without(cast, verdict)
        begun = self._start(cast, goes_on, checkpoint, found is not None, verdict, self._patient)
        return self._with_meanwhile(begun)

    def _with_meanwhile(self, begun: Begun) -> Begun:
        """Hear what has arrived and was not waited for."""
        later = [e for each in self._meanwhile for e in begun.driver.handle(*each, self._cluster.now())]
        return replace(begun, effects=[*begun.effects, *later])

    def _without(self, cast: Cast, verdict: Verdict) -> Cast:
        """End those that are refused."""
        for worker, why in verdict.refused.items():
            self._refused.add(worker)
            self._cluster.end(worker)
            cast = cast.without(worker)
            if not cast.workers:
                raise self._promise.nobody_left(why)
        return cast

    def recover(self, driver: Driver, gone: int | None) -> Begun:
        """Put another process in the place of one that is gone, if one is, and all shards back to the last checkpoint.

        Workers are not restarted: they are told of the new timeline, and wait. Who else is lost meanwhile is seen to:
        another shard in the same way, all others afterwards.
        """
        assert self._keeping is not None
        cluster, keeping, cast, joining = self._cluster, self._keeping, driver.cast, driver.members.joining
        self._meanwhile.clear()
        waited: set[int] = set()  # shards that are not ready, of all that have been started here
        ready: dict[int, dict[str, str]] = {}
        for _ in range(RECOVERIES):
            keeping.go_back(self._run_dir)
            cast = replace(cast, timeline=keeping.start.timeline)
            try:
                if gone is not None:
                    waited.discard(gone)
                    ready.pop(gone, None)
                    cast, new = self._replace(cast, gone)
                    waited |= {new}.intersection(cast.shards)
                    joining = {*joining, new}.difference(cast.shards)
                self._await_ready(cast, waited, ready, driver)
                verdict = self._promise.judge(cast, ready)
                ready = {}
                for other in cast.everybody:
                    cluster.send(other, ev.TimelineBegun(cast.timeline, cast.shards))
                self._strict = keeping.find()
                assert keeping.newest is not None
                goes_on = resumed(Found(self._run_dir, keeping.newest), self._plan)
                begun = self._start(cast, goes_on, keeping.newest, True, verdict, joining, driver)
            except _ShardLost as lost:
                gone = lost.incarnation
                continue
            return self._with_meanwhile(begun)
        raise ProcessLost(f"{RECOVERIES} times in a row another shard was gone before all had the weights again")

    def _replace(self, cast: Cast, gone: int) -> tuple[Cast, int]:
        """Start another process in a place; the cast with it, and its incarnation."""
        assert self._keeping is not None
        self._cluster.end(gone)
        new = max(cast.everybody) + 1
        cast = cast.replaced(gone, new)
        self._cluster.add(new, self._specs(cast, self._keeping.place.where)[new])
        return cast, new

    def _start(
        self,
        cast: Cast,
        goes_on: Resumed | None,
        checkpoint: Checkpoint | None,
        again: bool,
        verdict: Verdict,
        joining: Collection[int] = (),
        before: Driver | None = None,
    ) -> Begun:
        """Give every shard its state, a checkpoint's or the initial one; `again` if steps may be void."""
        cluster = self._cluster
        if self._updates is not None:
            self._updates.begin(cast.timeline, self._plan.layout.slices(len(cast.shards)), checkpoint)
        version, norms = (goes_on.version, goes_on.progress["suspicions"]["norms"]) if goes_on else (0, ())
        written = self._load(cast, checkpoint, version, norms, before)
        now = cluster.now()
        driver = Driver(cast, self._assignment, now, cluster.nodes(), goes_on, joining, self._promise)
        if before is not None:
            driver.tally.step_seconds, driver.tally.staleness = before.tally.step_seconds, before.tally.staleness
            driver.suspicions.follow(before.suspicions)
            driver.members.fresh = before.members.fresh.intersection(joining)
        warned = self._make_first(written, driver) if self._keeping is not None else []
        back = driver.rolled_back(goes_on) if again else []
        lines = [account.line for account in (*back, *driver.marks(again))]
        return Begun(driver, lines, [*warned, *driver.told(verdict, now), *driver.start(now)])

    def _make_first(self, written: tuple[ev.ShardWritten, ...], driver: Driver) -> list[Effect]:
        """The checkpoint that a timeline begins with. Where all have gone back to the newest, the run goes on without.

        Not where a newer one was passed over: going back to that one later would jump over steps that are void.
        """
        assert self._keeping is not None
        refused = next((part.error for part in written if part.error), "")
        if not refused:
            try:
                self._keeping.make(Whole(0, written, driver.progress()))
                return []
            except OSError as error:
                if self._strict:
                    raise
                refused = f"{self._keeping.place.where}: {error.strerror or error}"
        return [Log(driver.tally.event("warning", self._cluster.now(), {}, message=f"no checkpoint: {refused}"))]

    def _load(
        self,
        cast: Cast,
        checkpoint: Checkpoint | None,
        version: int,
        norms: Sequence[float],
        before: Driver | None,
    ) -> tuple[ev.ShardWritten, ...]:
        where = None
        if checkpoint is not None:
            assert self._keeping is not None
            where = self._keeping.place.at(checkpoint.folder.name)
        for shard, wanted in self._plan.loads(cast, where, version, norms).items():
            self._cluster.send(shard, wanted)
        waiting = set(cast.shards)
        written: dict[int, ev.ShardWritten] = {}
        for source, event in self._arriving(cast, "to have the weights", waiting, before):
            if isinstance(event, ev.ShardWritten) and event.timeline == cast.timeline:
                if self._strict or not event.error:
                    self._check_probe(event)
                written[event.shard] = event
            if isinstance(event, ev.Loaded if self._keeping is None else ev.ShardWritten):
                waiting -= {source} if event.timeline == cast.timeline else set()
        return tuple(written[shard] for shard in sorted(written))

    def _check_probe(self, part: ev.ShardWritten) -> None:
        """What shards write must be there for the driver to read, and for whoever goes on."""
        assert self._keeping is not None
        found = part.error
        if not found:
            try:
                self._keeping.place.check(part.folder, part.file, part.sha256, part.size)
            except Damaged as error:
                found = f"{error}, though shard {part.shard} has written it"
        if found:
            key, what = "run.storage", "to a folder that all nodes share and can write"
            if self._plan.config.checkpoint.storage is not None:
                key, what = "checkpoint.storage", "to a store that all nodes can read and write"
            do = f"set {key} {what}, or checkpoint.every=null"
            raise BadInput.described(key, "a place for checkpoints", found, do)

    def _await_ready(
        self, cast: Cast, waiting: set[int], ready: dict[int, dict[str, str]], before: Driver | None = None
    ) -> None:
        """Wait for everybody; who is ready moves from `waiting` to `ready`, with what each says of itself."""
        for source, event in self._arriving(cast, "to be ready", waiting, before):
            if isinstance(event, ev.ProcessReady):
                if source in waiting:
                    ready[source] = event.facts
                waiting.discard(source)
                log.info("%s is ready: %s", cast.name(source), event.facts)

    def _arriving(self, cast: Cast, what: str, waiting: set[int], before: Driver | None) -> Iterator[tuple[int, Any]]:
        """What arrives while somebody is waited for; `waiting` gets smaller meanwhile."""
        cluster, seconds = self._cluster, self._plan.config.cluster.start_seconds
        began = cluster.now()
        while waiting:
            arrived = cluster.receive(max(0.0, began + seconds - cluster.now()))
            if arrived is None:
                who = f"{', '.join(map(cast.name, sorted(waiting)))} {what}"
                do = "set cluster.start_timeout higher if building model and data takes longer"
                raise DeadlineExceeded.waiting(who, "start", cluster.now() - began, do)
            source, event = arrived
            if before is not None and source not in (ev.DRIVER, *cast.everybody):
                cluster.send(source, ev.Fenced(cast.timeline))
            if isinstance(event, ev.ProcessLost) and event.incarnation in self._refused:
                continue
            lost = event.incarnation if isinstance(event, ev.ProcessLost) else None
            needed = lost is not None and before is None and lost not in self._patient
            if isinstance(event, ev.ProcessFailed) or needed:
                driver = Driver(cast, self._assignment, cluster.now())
                finish = next((e for e in driver.handle(source, event, cluster.now()) if isinstance(e, Finish)), None)
                why = f": {event.why}" if isinstance(event, ev.ProcessLost) else ""
                did_not = RunFailed(f"{cast.name(source)} did not start{why}")
                raise finish.error if finish and finish.error else did_not
            if isinstance(event, ev.ProcessLost) and event.incarnation in cast.shards:
                raise _ShardLost(event.incarnation)
            late = isinstance(event, ev.ProcessReady) and source not in waiting
            if late or isinstance(event, ev.ProcessLost | ev.Injected):
                self._meanwhile.append((source, event))
            yield source, event
