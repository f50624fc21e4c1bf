"""Whether a run's bits are still promised, and who may take part: the first canary of a role is what all others need.

A canary (`distgd.canary`) comes with each worker and each server that is ready. `run.bits: auto` admits one that
computes otherwise, says so once, and the run is marked from then on; `strict` refuses a worker, and ends the run where
it is a server, as a server cannot be left out. What is known here survives a driver by the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distgd.assignment import Cast
from distgd.errors import BadInput, DistgdError, RunFailed

PROMISED, NOT_PROMISED = "promised", "not promised"
SHOWN = 12
"""Letters of a canary in a message."""

Facts = Mapping[str, str]
"""What a process says of itself: `canary` and `machine` where the bits are looked at, and more."""


@dataclass(frozen=True)
class Verdict:
    """On those who have joined: the workers that are refused and why, and a warning where the run is marked now."""

    refused: Mapping[int, str]
    warning: str | None = None


class Promise:
    """The promise of one run, through all of its drivers.

    Args:
        promises: whether the config promises bits at all.
        strict: whether `run.bits` is. Where it is not and nothing is promised, nobody is looked at.
    """

    def __init__(self, promises: bool, strict: bool) -> None:
        self._promises, self._strict = promises, strict
        self._first: dict[str, Facts] = {}  # by role
        self.broken: str | None = None  # what the promise was broken by

    @property
    def bits(self) -> str:
        """`promised` or `not promised`, as results and manifests say it."""
        return PROMISED if self._promises and self.broken is None else NOT_PROMISED

    def record(self) -> dict[str, str]:
        """The first canaries and machines, for a manifest."""
        met = [(role, facts) for role, facts in self._first.items() if "canary" in facts]
        first = {f"{key}.{role}": facts[key] for role, facts in met for key in ("canary", "machine")}
        return first | ({"broken": self.broken} if self.broken else {})

    def go_on(self, software: Facts, bits: str) -> None:
        """Go on from what a manifest says: its first canaries stay the ones to meet, and its mark stays."""
        for role in ("worker", "shard"):
            if f"canary.{role}" in software:
                self._first[role] = {key: software[f"{key}.{role}"] for key in ("canary", "machine")}
        if bits == NOT_PROMISED:
            self.broken = software.get("broken", "they were not promised when the run was cut off")

    def judge(self, cast: Cast, ready: Mapping[int, Facts]) -> Verdict:
        """Look at those who have become ready, in the cast's order.

        Raises:
            RunFailed: `strict`, and it is a server.
        """
        refused: dict[int, str] = {}
        warning = None
        for who in [i for i in (*cast.shards, *cast.workers) if i in ready and (self._promises or self._strict)]:
            role = "worker" if who in cast.workers else "shard"
            first = self._first.setdefault(role, ready[who])
            if ready[who].get("canary") == first.get("canary"):
                continue
            expected = f"expected one that computes the bits of the run's first {role}, on {_kind(first)}"
            told = f"{cast.name(who)}: {expected}, found {_kind(ready[who])}"
            if self._strict and role == "shard":
                do = "place servers on one kind of machine; run.bits=auto admits it and marks the run"
                raise RunFailed(f"{told}; {do}")
            if self._strict:
                refused[who] = f"{told}; refused, as run.bits is strict"
            elif self.broken is None:
                self.broken = told
                warning = f"{told}; bits are not promised from here on, and run.bits=strict refuses it"
        return Verdict(refused, warning)

    def give_up(self, why: str) -> None:
        """Something has been done that others would not do at the same place."""
        self.broken = self.broken or why

    def nobody_left(self, why: str) -> DistgdError:
        """The error of a run that has refused every worker; `why` the last one was."""
        do = "take machines of the first one's kind, or set run.bits=auto, which marks the run"
        return BadInput.described("run.bits", "a worker that may take part", f"none: {why}", do)

    def line(self, step: int) -> dict[str, Any]:
        """For the ledger: from this step on the bits are not promised."""
        return {"state": "bits", "bits": self.bits, "step": step, "why": self.broken or "the config promises none"}


def _kind(facts: Facts) -> str:
    return f"{facts.get('machine', 'a machine unknown')} (canary {facts.get('canary', 'none')[:SHOWN]})"
