"""What Ray is to set aside for a run's processes, and whether that fits into what a trial of Ray Tune has.

In a trial all processes of the run are placed in the trial's placement group, so that a run never takes more than Tune
has counted for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgd.config import Config, load

SERVER_CPUS = 1.0
TRIAL: Mapping[str, float] = {"CPU": 1.0}
"""For the trial itself: the run's driver, and what the trial computes besides."""


@dataclass(frozen=True)
class Resources:
    """What Ray sets aside for a process of one role."""

    cpus: float
    gpus: float

    def bundle(self) -> dict[str, float]:
        """As a bundle of a placement group; empty where nothing is asked for."""
        asked = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in asked.items() if amount}


def by_role(config: Config) -> dict[str, Resources]:
    """What a process of each role asks for."""
    return {
        "server": Resources(SERVER_CPUS, config.cluster.server_gpus),
        "worker": Resources(config.cluster.cpus, config.cluster.gpus),
        "evaluator": Resources(config.eval.cpus, config.eval.gpus),
    }


def bundles(config: str | Path | Mapping[str, Any] | Config, *overrides: str) -> list[dict[str, float]]:
    """The bundles of a placement group for one run, the first for the trial that calls `distgd.train`.

    For Ray Tune: `tune.with_resources(trial, tune.PlacementGroupFactory(distgd.bundles(config)))`.

    >>> bundles({"task": "digits", "stop": {"epochs": 1}}, "cluster.workers=2")
    [{'CPU': 1.0}, {'CPU': 1.0}, {'CPU': 1.0}, {'CPU': 1.0}]
    """
    resolved = load(config, overrides)
    asks, cluster = by_role(resolved), resolved.cluster
    roles = ["server"] * cluster.servers + ["worker"] * cluster.workers.max + ["evaluator"]
    return [dict(TRIAL), *(bundle for role in roles if (bundle := asks[role].bundle()))]


def fit(asks: Iterable[Resources], free: Sequence[Mapping[str, float]]) -> bool:
    """Whether every process finds a bundle with room for it, the largest placed first.

    >>> fit([Resources(1, 0), Resources(1, 0)], [{"CPU": 1.0}, {"CPU": 1.0}])
    True
    >>> fit([Resources(2, 0)], [{"CPU": 1.0}, {"CPU": 1.0}])
    False
    """
    left = [dict(bundle) for bundle in free]
    for ask in sorted(asks, key=lambda each: (each.gpus, each.cpus), reverse=True):
        wanted = ask.bundle()
        room = next((b for b in left if all(b.get(name, 0.0) >= amount for name, amount in wanted.items())), None)
        if room is None:
            return False
        for name, amount in wanted.items():
            room[name] -= amount
    return True
