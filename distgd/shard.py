"""One server's whole state: its slice of the weights, the optimizer's state, the policy. `handle(event) -> [effect]`.

In sync mode gradients gather beside the weights, and one decision for the step comes from shard 0 when every shard is
full (stage, then commit). Before the decision version t exists everywhere, so any slot can be computed again; after it
no gradient is needed any more. In bounded and async mode each push is an update, let through by the policy.

A shard never waits, sends, sleeps, logs or reads a clock. It knows its peers by incarnation only. Everything in it is
lost when its process dies.

Norms travel as sums of squares per block of 64 elements and are added by shard 0 in the order of blocks, so that the
clip scale is the same number for any number of shards.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distgd import events as ev
from distgd import policy as pol
from distgd.codecs import CODECS
from distgd.layout import Slice, block_squares, squared_norm, tensor_of
from distgd.norms import Norms
from distgd.optim import PieceOptimizer, Schedule, clip_scale
from distgd.recording import Recording
from distgd.reduce import Node
from distgd.returning import Returning
from distgd.rules import ShardRules
from distgd.snapshots import Snapshots
from distgd.staging import Block, Mean, Staging

Array = np.ndarray[Any, Any]
OF_WORKERS = (ev.PullRequested, ev.GradientArrived, ev.GradientPart)


class Shard:
    """The state machine of one shard.

    Args:
        part: which elements of the flat vector are here.
        weights: their values, shape [part.size]; stepped in place from then on.
        buffers: the model's buffers as bytes, shard 0 only.
        optimizer: built over views of `weights`, one per piece.
        eager: whether arriving gradients may be added before the set of slots is known (no quorum).
    """

    def __init__(
        self,
        rules: ShardRules,
        part: Slice,
        weights: Tensor,
        buffers: Array | None,
        optimizer: PieceOptimizer,
        policy: pol.Policy,
        schedule: Schedule,
        *,
        eager: bool,
    ) -> None:
        self.rules = rules
        self.part = part
        self.weights = weights
        self.buffers = buffers
        self.buffers_version = 0
        self.optimizer = optimizer
        self.policy = policy
        self.schedule = schedule
        self._blocks = [Block.of(part, cuts) for cuts in optimizer.blocks]
        self._scratch = torch.empty(max((b.stop - b.first for b in self._blocks), default=0), dtype=weights.dtype)
        self._eager = eager
        self._staging = Staging(rules.slots, part.size, rules.bucket, eager=eager)
        self._codec = CODECS[rules.dtype]()
        self._returning = Returning(rules.timeline, part.index, weights, rules.bucket, rules.dtype)
        self._update: Iterator[ev.Effect] | None = None  # what is left to do of one
        self._measured: tuple[frozenset[int], Tensor] | None = None  # slots, and their mean where its norm was needed
        self._staged: dict[Node, ev.GradientArrived] = {}  # headers of what the tree holds (sync)
        self._norm: float | None = None  # shard 0: the norm that the last decision was made with
        self._waiting: dict[tuple[int, int], tuple[int, ev.GradientArrived]] = {}  # pushes by lease, held or arriving
        self._squares: dict[int, Array] = {}  # shard 0: each shard's last sums of squares of this step
        self._pulls: list[tuple[int, ev.PullRequested]] = []  # reads of a version that is still to come
        self._published: Array | None = None  # a copy of this version's weights, shared by all answers
        self._snapshots = Snapshots(rules.timeline, part.index)
        here = len(rules.incarnations)
        self._recording = Recording(rules.timeline, part.index, here) if rules.record else None
        self._stores: list[ev.Store] = []  # what may not have been written yet
        self._limit: int | None = None  # shard 0: the first step that may not be decided yet
        self._members = ev.MembershipChanged(rules.timeline, -1, frozenset(), -1, ())
        self._near: frozenset[int] = frozenset()  # who is on this machine
        self._parked: list[tuple[int, Any]] = []  # from incarnations that this shard has not been told of yet
        self._commit: ev.Commit | None = None  # the decision that the policy has been told of last
        self._bad: tuple[int, ...] = ()
        self.version = 0  # updates applied or skipped so far
        self._norms = Norms(rules.norm_ratio)  # shard 0, sync
        self.late = 0  # slots that came after their step was decided, since the last report

    @property
    def leads(self) -> bool:
        """Whether this is shard 0, which decides."""
        return self.part.index == 0

    def restore(self, version: int, buffers_version: int, applied: str, norms: Collection[float] = ()) -> None:
        """Go on from `version`, whose weights and optimizer's state are in place; `applied` is what `Store` said.

        Args:
            norms: of the slots that were applied last, squared.
        """
        self._norms = Norms(self.rules.norm_ratio, norms)
        self.version, self.buffers_version = version, buffers_version
        self.policy.restore(version, json.loads(applied) if applied else {})

    def store(self, number: int, name: int) -> ev.Store:
        """This version for a file: all that the steps to come depend on."""
        applied = self.policy.applied
        self._stores = [store for store in self._stores if not store.written]
        store = ev.Store(
            self.rules.timeline,
            number,
            name,
            self.version,
            self.weights.numpy(),
            self.optimizer.state_parts(),
            self.buffers,
            self.buffers_version,
            "" if applied is None else json.dumps(applied),
        )
        self._stores.append(store)
        return store

    def handle(self, source: int, event: Any) -> list[ev.Effect]:
        """Take one message of incarnation `source`; what is not for this timeline or from the dead has no effect."""
        if event.timeline != self.rules.timeline:
            return self._fence(source)
        if self._update is not None:  # nobody sees half a version
            return [*self._update, *self.handle(source, event)]
        if isinstance(event, ev.MembershipChanged):
            return self._membership(event)
        if fenced := self._fence(source):
            return fenced
        if source > self._members.newest or (isinstance(event, OF_WORKERS) and not self._members.places(source)):
            self._parked.append((source, event))  # the driver knows of it, and will tell
            return []
        return self._dispatch(source, event)

    def _fence(self, source: int) -> list[ev.Effect]:
        """The dead are told, in whatever timeline they were left; who is newer than all that are known here is not."""
        dead = source not in self._members.live and source <= self._members.newest
        return [ev.Send(source, ev.Fenced(self.rules.timeline))] if dead else []

    def describe(self) -> str:
        """What this shard waits for, in words."""
        text = f"at version {self.version}"
        if not self.rules.staged:
            return f"{text}, {len(self._waiting)} pushes held"
        if self.version >= self.rules.last:
            return f"{text}, the last one"
        if self._limit is not None and self.version >= self._limit:
            return f"{text}, which stands until the driver lets the run go on"
        held = {k for node in self._staged for k in range(*node)}
        missing = [k for k in range(self.rules.slots) if k not in held]
        return f"{text}, waits for slots {missing}" if missing else f"{text}, full, waits for the decision"

    def _dispatch(self, source: int, event: Any) -> list[ev.Effect]:
        match event:
            case ev.PullRequested():
                return self._pull(source, event)
            case ev.GradientArrived():
                return self._push(source, event)
            case ev.GradientPart():
                return self._part(event)
            case ev.ShardFilled():
                return self._filled(event)
            case ev.Measure():
                return self._report(event.attempt, frozenset(event.slots), frozenset(), measure=True)
            case ev.Commit():
                return self._committed(event)
            case ev.Limit():
                return self._obey(self.policy.handle(pol.Limited(event.steps)))
            case ev.Skip():
                return self._obey(self.policy.handle(pol.Skipped(event.step)))
            case ev.LeaseExpired():
                return self._obey(self.policy.handle(pol.Closed((event.worker, event.lease))))
            case ev.TakeSnapshot():
                return self._snapshot_asked(event)
            case ev.RecordsRequested() if self._recording is not None:
                return [ev.Send(ev.DRIVER, self._recording.take(event.number))]
            case ev.SnapshotPulled():
                return [ev.Send(source, found) for found in self._snapshots.pulled(source, event.number)]
            case _:
                return []

    def _membership(self, event: ev.MembershipChanged) -> list[ev.Effect]:
        if event.number <= self._members.number:
            return []
        self._members = event
        self._near = event.beside(self.rules.incarnations[self.part.index])
        effects = self._obey(self.policy.handle(pol.Survived(event.live)))
        self._pulls = [(source, pull) for source, pull in self._pulls if source in event.live]
        parked, self._parked = self._parked, []
        for source, message in parked:
            effects += self.handle(source, message)
        return effects

    # Reading.

    def _pull(self, source: int, pull: ev.PullRequested) -> list[ev.Effect]:
        if pull.lease >= 0:
            refused = self.policy.handle(pol.Opened((source, pull.lease), pull.step, pull.slot))
            if refused:
                return [self._answer(source, pull.lease, "gone")]
        if self.version < pull.at_least:
            if (source, pull) not in self._pulls:
                self._pulls.append((source, pull))
            return []
        return self._weights_for(source, pull)

    def _weights_for(self, source: int, pull: ev.PullRequested, *, there: bool = False) -> list[ev.Effect]:
        """This version for a reader; `there` says that its weights have been sent."""
        newer = self.buffers is not None and self.buffers_version > pull.buffers
        parts, weights = 0, None
        effects: list[ev.Effect] = []
        if there or self._is_far(source):
            parts = len(self._returning.cuts)
            effects = [] if there else [ev.Send(source, part) for part in self._returning.whole(self.version)]
        else:
            whole_step = self.rules.staged and self._eager  # nobody computes while this shard applies
            weights = self.weights.numpy() if whole_step else self._copy()
        message = ev.WeightsSent(
            self.rules.timeline,
            self.part.index,
            self.version,
            pull.lease,
            self.buffers_version,
            weights,
            self.buffers if newer else None,
            parts,
        )
        return [*effects, ev.Send(source, message)]

    def _is_far(self, reader: int) -> bool:
        """Whether weights go to a reader in parts: where every slot is required, to other machines."""
        return self._eager and self.rules.staged and reader not in self._near

    def _advanced(self, there: Collection[tuple[int, ev.PullRequested]] = ()) -> list[ev.Effect]:
        """After every update: the copy is stale, readers may go on, a snapshot may be due.

        Args:
            there: reads whose weights have been sent.
        """
        self._published = None
        ready = [read for read in self._pulls if read[1].at_least <= self.version]
        self._pulls = [read for read in self._pulls if read[1].at_least > self.version]
        answers = [effect for read in ready for effect in self._weights_for(*read, there=read in there)]
        sent, stored = self._take_due()
        return [*sent, *answers, *stored]  # workers wait, files do not

    # Gradients.

    def _part(self, part: ev.GradientPart) -> list[ev.Effect]:
        """A bucket of a push that is still under way: it is added, and counts once the push is closed."""
        gathers = self._eager and isinstance(self.policy, pol.Staged) and part.attempt == self.policy.attempt
        if gathers and part.step == self.version:
            gradient = self._codec.decode(part.gradient, self.weights.dtype)
            self._staging.put_part((part.first, part.stop), part.start, gradient)
        return []

    def _push(self, source: int, push: ev.GradientArrived) -> list[ev.Effect]:
        node = (push.first, push.stop)
        bad = frozenset(push.bad)
        if self.rules.staged:
            if push.parts and push.step == self.version and not self._staging.complete(node):
                return []  # its sender is gone and was another's successor, or a connection broke: it comes again
            decisions = self.policy.handle(pol.Arrived(node, push.step, node, push.attempt, push.version, bad))
            if pol.Hold(node) in decisions:
                self._stage(node, push)
            elif pol.Drop(node, "late") in decisions:
                self.late += push.stop - push.first
            reads = ev.PullRequested(self.rules.timeline, push.step + 1, push.reads, holds=push.step)
            asked = self._pull(source, reads) if push.reads >= 0 else []
            return [*asked, *self._obey(decisions)]
        key = (source, push.lease)
        self._waiting.setdefault(key, (source, push))
        return self._obey(self.policy.handle(pol.Arrived(key, push.step, node, 0, push.version, bad)))

    def _stage(self, node: Node, push: ev.GradientArrived) -> None:
        first, stop = node
        for inner in [n for n in self._staged if first <= n[0] and n[1] <= stop]:
            del self._staged[inner]
        self._staged[node] = push
        if push.parts:
            self._staging.close(node, push.weight)
        elif push.gradient is None:
            self._staging.put(node, push.weight, None, owned=False)
        else:
            owned = push.gradient.flags.writeable
            self._staging.put(node, push.weight, tensor_of(push.gradient), owned=owned)

    def _obey(self, decisions: list[pol.Decision]) -> list[ev.Effect]:
        effects: list[ev.Effect] = []
        for decision in decisions:
            match decision:
                case pol.Report(_, attempt, slots, bad):
                    effects += self._report(attempt, slots, bad, measure=self._eager)
                case pol.ApplyStep():
                    effects += self._apply_step(decision)
                case pol.ApplyPush():
                    effects += self._apply_push(decision)
                    effects += self._obey(self.policy.handle(pol.Made()))
                case pol.Drop(key, reason) if not self.rules.staged:
                    effects += self._dropped(key, reason)
                case pol.Propose():
                    effects += self._propose(decision)
                case pol.Suspect():
                    effects.append(ev.Send(ev.DRIVER, self._poisoned(decision)))
                case pol.Decide():
                    effects += self._decide(decision)
                case pol.Limit(steps):
                    self._limit = steps
                    effects.append(ev.Send(ev.DRIVER, ev.Limited(self.rules.timeline, steps)))
        return effects

    def _dropped(self, key: tuple[int, int], reason: str) -> list[ev.Effect]:
        source, lease = key
        self._waiting.pop(key, None)
        return [self._answer(source, lease, reason)] if source in self._members.live else []

    def _answer(self, source: int, lease: int, outcome: str, staleness: int = 0) -> ev.Send:
        return ev.Send(source, ev.PushAnswered(self.rules.timeline, self.part.index, lease, outcome, staleness))

    # The commit round (sync).

    def _report(self, attempt: int, slots: frozenset[int], bad: frozenset[int], *, measure: bool) -> list[ev.Effect]:
        squares = None
        if measure and self.rules.clip is not None:
            squares = block_squares(self._measure(slots)).numpy()
        if self.leads:
            bad |= {s.slot for push in self._staged.values() for s in push.stats if self._norms.exceeds(s)}
        report = ev.ShardFilled(
            self.rules.timeline,
            self.part.index,
            self.version,
            attempt,
            tuple(sorted(slots)),
            tuple(sorted(bad)),
            squares,
        )
        return self._filled(report) if self.leads else [ev.Send(self.rules.incarnations[0], report)]

    def _filled(self, report: ev.ShardFilled) -> list[ev.Effect]:
        if report.squares is not None and report.step == self.version:
            self._squares[report.shard] = report.squares
        event = pol.Filled(report.shard, report.step, report.attempt, frozenset(report.slots), frozenset(report.bad))
        return self._obey(self.policy.handle(event))

    def _propose(self, proposal: pol.Propose) -> list[ev.Effect]:
        ask = ev.Measure(self.rules.timeline, proposal.step, proposal.attempt, tuple(sorted(proposal.slots)))
        others: list[ev.Effect] = [ev.Send(shard, ask) for shard in self.rules.incarnations[1:]]
        return [*others, *self._report(proposal.attempt, proposal.slots, frozenset(), measure=True)]

    def _poisoned(self, suspect: pol.Suspect) -> ev.Poisoned:
        bad = tuple(sorted(suspect.bad))
        stats = tuple(s for push in self._staged.values() for s in push.stats if s.slot in suspect.bad)
        return ev.Poisoned(self.rules.timeline, suspect.step, bad, tuple(sorted(stats, key=lambda s: s.slot)))

    def _decide(self, decision: pol.Decide) -> list[ev.Effect]:
        clip, self._norm = 1.0, None
        if self.rules.clip is not None and decision.apply:
            blocks = np.concatenate([self._squares[i] for i in range(len(self.rules.incarnations))])
            square = squared_norm(torch.from_numpy(blocks))
            self._norm, clip = square**0.5, clip_scale(square, self.rules.clip)
        numbers = tuple(number for number, at in self._snapshots.due.items() if at <= self.version + 1)
        slots = tuple(sorted(decision.slots))
        commit = ev.Commit(self.rules.timeline, decision.step, slots, decision.apply, clip, numbers)
        others: list[ev.Effect] = [ev.Send(shard, commit) for shard in self.rules.incarnations[1:]]
        return [*others, *self._committed(commit, tuple(sorted(decision.bad)))]

    def _committed(self, commit: ev.Commit, bad: tuple[int, ...] = ()) -> list[ev.Effect]:
        self._commit, self._bad = commit, bad
        return self._obey(self.policy.handle(pol.Decided(commit.step, frozenset(commit.slots), commit.apply)))

    def _apply_step(self, decision: pol.ApplyStep) -> list[ev.Effect]:
        """Step at once; or, where others wait for the decision or for weights, when these have been told.

        Other machines are sent weights bucket by bucket while the rest is still being stepped.
        """
        far = [r for r in self._pulls if r[1].at_least <= self.version + 1 and self._is_far(r[0])]
        far = [r for r in far if self._returning.continues(self.version + 1, r[1].holds)]
        others = self.leads and len(self.rules.incarnations) > 1
        if decision.apply and (far or others):
            self._update = self._step_and_send(decision, far)
            return [ev.Update(self._update)]
        if decision.apply:
            for _ in self._step(self._mean(decision), self.schedule.factor(decision.step)):
                pass
        return self._stepped(decision, ())

    def _step_and_send(
        self, decision: pol.ApplyStep, far: Sequence[tuple[int, ev.PullRequested]]
    ) -> Iterator[ev.Effect]:
        readers = sorted({source for source, _ in far})
        left = deque(self._returning.cuts)
        for done in self._step(self._mean(decision), self.schedule.factor(decision.step)):
            while left and left[0][1] <= done:
                part = self._returning.part(self.version + 1, *left.popleft())
                yield from (ev.Send(reader, part) for reader in readers)
        self._update = None
        yield from self._stepped(decision, far)

    def _stepped(self, decision: pol.ApplyStep, there: Collection[tuple[int, ev.PullRequested]]) -> list[ev.Effect]:
        """The version that a decision makes is here."""
        commit = self._commit
        assert commit is not None
        if decision.apply and 0 in decision.slots:
            self._commit_buffers(next(push.buffers for node, push in self._staged.items() if node[0] == 0))
        self.version += 1
        effects: list[ev.Effect] = []
        if self.leads:
            record = self._record(commit)
            self._norms.observe(record.stats if decision.apply else ())
            effects.append(ev.Send(ev.DRIVER, record))
        self._staging.clear()
        self._staged.clear()
        self._squares.clear()
        self._measured = None
        for number in commit.snapshots:
            self._snapshots.due[number] = self.version
        return [*self._advanced(there), *effects]  # workers wait, the driver does not

    def _record(self, commit: ev.Commit) -> ev.StepCommitted:
        times: dict[int, dict[str, float]] = {}
        for push in self._staged.values():
            for worker, spent in push.times.items():
                of_worker = times.setdefault(worker, {})
                for phase, seconds in spent.items():
                    of_worker[phase] = of_worker.get(phase, 0.0) + seconds
        stats = (s for push in self._staged.values() for s in push.stats if s.slot in commit.slots)
        late, self.late = self.late, 0
        return ev.StepCommitted(
            self.rules.timeline,
            commit.step,
            commit.apply,
            commit.slots,
            self._bad,
            tuple(sorted(stats, key=lambda s: s.slot)),
            times,
            late,
            self._norm,
            commit.clip,
            0.0,
        )

    def _measure(self, slots: frozenset[int]) -> Tensor:
        """The mean gradient over `slots` as one vector, kept for the step."""
        if self._measured is None or self._measured[0] != slots:
            mean = self._staging.total(slots).block(0, self.part.size, torch.empty_like(self.weights))
            self._measured = (slots, mean)
        return self._measured[1]

    def _mean(self, decision: pol.ApplyStep) -> Mean:
        assert self._commit is not None
        if self._measured is not None and self._measured[0] == decision.slots:
            return Mean.of(self._measured[1], 1.0, self._commit.clip)
        return self._staging.total(decision.slots, self._commit.clip)

    def _step(self, mean: Mean, factor: float) -> Iterator[int]:
        """One update, block by block: gradients and weights are read once, and a block's mean stays in the cache.

        Returns:
            After each block, how many of the shard's first elements are done.
        """
        for store in self._stores:
            store.keep()
        self._stores.clear()
        for number, block in enumerate(self._blocks):
            grad = mean.block(block.first, block.stop, self._scratch[: block.stop - block.first])
            self.optimizer.step_block(number, [grad[lo:hi] for lo, hi in block.parts], factor)
            yield self._blocks[number + 1].first if number + 1 < len(self._blocks) else self.part.size
        if not self._blocks:  # an empty shard
            yield 0

    def _commit_buffers(self, buffers: Array | None) -> None:
        if self.leads and buffers is not None:
            self.buffers = buffers
            self.buffers_version += 1

    # One update a push (bounded, async).

    def _apply_push(self, decision: pol.ApplyPush) -> list[ev.Effect]:
        source, push = self._waiting.pop(decision.key)
        scale = self.rules.lr_scale(self.schedule.factor(push.step), decision.staleness)
        if self._recording is not None:
            self._recording.add(self.version, source, push, decision.staleness, scale, applied=decision.apply)
        if decision.apply and push.gradient is not None:
            for _ in self._step(Mean.of(tensor_of(push.gradient), push.weight), scale):
                pass
            self._commit_buffers(push.buffers)
        self.version += 1
        answer = self._answer(source, push.lease, "applied", decision.staleness)
        return [answer, *self._advanced(), *self._told(enough=True)]

    def _told(self, *, enough: bool = False) -> list[ev.Effect]:
        """Tell the driver what has been applied; with `enough`, only if it is so much that it is worth a message."""
        if self._recording is None or (enough and not self._recording.enough):
            return []
        return [ev.Send(ev.DRIVER, self._recording.take())]

    # Snapshots.

    def _snapshot_asked(self, ask: ev.TakeSnapshot) -> list[ev.Effect]:
        if self._snapshots.has(ask.number):  # a number is taken once
            return []
        at = min(ask.version, self.rules.last)
        if not (self.rules.staged and self.leads):
            self._snapshots.due[ask.number] = at
            for number in self._snapshots.due:  # an earlier one that is due later never comes: the run ends here
                if number != ask.number and self._goes_with(number, ask.number):
                    self._snapshots.due[number] = min(at, self._snapshots.due[number])
            return self._due()
        # Sync: the number travels with the decision that makes its version, so that all shards take the same one.
        self._snapshots.due[ask.number] = max(at, self.version + 1)
        stands = self._limit is not None and self.version >= self._limit and at <= self.version
        if self.version < self.rules.last and not stands and at != self.version:
            return []
        now = [number for number in self._snapshots.due if self._goes_with(number, ask.number)]
        self._snapshots.due |= dict.fromkeys(now, self.version)
        others: list[ev.Effect] = [
            ev.Send(shard, replace(ask, number=number, version=self.version))
            for number in now
            for shard in self.rules.incarnations[1:]
        ]
        return [*others, *self._due()]

    @staticmethod
    def _goes_with(number: int, asked: int) -> bool:
        """Whether a snapshot is due at the latest when `asked` is: an earlier evaluation; all before the run's last."""
        return number == asked or asked == ev.FINAL or 0 < number < asked

    def _due(self) -> list[ev.Effect]:
        sent, stored = self._take_due()
        return [*sent, *stored]

    def _take_due(self) -> tuple[list[ev.Effect], list[ev.Effect]]:
        """What is due for readers, and what is due for files."""
        last = self._snapshots.due.get(ev.FINAL, self.version + 1) <= self.version
        record = self._told() if last else []
        stored = [self.store(number, name) for number, name in self._snapshots.stored(self.version)]
        taken = self._snapshots.take(self.version, self._copy, self.buffers)
        return [*record, *(ev.Send(reader, snapshot) for reader, snapshot in taken)], list(stored)

    def _copy(self) -> Array:
        if self._published is None:
            self._published = self.weights.numpy().copy()
        return self._published
