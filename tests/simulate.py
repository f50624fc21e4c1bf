"""Run a plan on the in-process cluster without run folder or trackers, for tests that need many runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from distgd import events as ev
from distgd import weights
from distgd.config import load
from distgd.driver import Driver
from distgd.effects import Account, Finish, Keep, Log, Spawn
from distgd.errors import DistgdError
from distgd.inprocess import SLOT_SECONDS, InProcessCluster
from distgd.layout import BUCKET, state
from distgd.plan import Plan
from distgd.prepare import prepare
from distgd.stopping import Stop


@dataclass
class Simulated:
    """What a simulated run came to."""

    plan: Plan
    driver: Driver
    error: DistgdError | None
    state: dict[str, Tensor]
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    kept: list[tuple[int, str]] = field(default_factory=list)  # step and fingerprint of each best evaluation

    @property
    def sha256(self) -> str:
        return weights.fingerprint(self.state)


def config(task: Any = None, **sections: Any) -> Any:
    """A config for the in-process cluster: `config(batch={"size": 8}, cluster={"workers": 3})`.

    `builtin` is the config's `task` where no task is given.
    """
    given: dict[str, Any] = {"stop": {"steps": 6}, "tracking": {"uri": "none"}, "checkpoint": {"every": None}}
    builtin = sections.pop("builtin", "digits")
    given["task"] = {"path": "given:object"} if task is not None else builtin
    given |= sections
    given["cluster"] = {"backend": "inprocess", **given.get("cluster", {})}
    return load(given)


def simulate(
    task: Any = None,
    *,
    seed: int = 0,
    pace: Callable[[int], float] = lambda incarnation: SLOT_SECONDS,
    lose: Mapping[int, float] | None = None,
    machines: int = 1,
    bucket: int = BUCKET,
    on_event: Callable[[dict[str, Any]], Stop | None] = lambda event: None,
    **sections: Any,
) -> Simulated:
    """Prepare and run; the error that ended the run is in the answer, not raised."""
    plan = prepare(config(task, **sections), task)
    return run(plan, InProcessCluster(seed, pace, lose, machines), on_event, bucket)


def run(
    plan: Plan,
    cluster: InProcessCluster,
    on_event: Callable[[dict[str, Any]], Stop | None] = lambda event: None,
    bucket: int = BUCKET,
) -> Simulated:
    """Run a plan on a cluster to its end; so many elements travel between machines at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cast = plan.cast()
    rules = {i: replace(spec.rules, bucket=bucket) for i, spec in plan.specs(cast).items()}
    cluster.spawn({i: replace(spec, rules=rules[i]) for i, spec in plan.specs(cast).items()})
    for shard, message in plan.loads(cast).items():
        cluster.send(shard, message)
    driver = Driver(cast, plan.assignment(), cluster.now(), cluster.nodes())
    done = Simulated(plan, driver, None, {})
    effects = driver.start(cluster.now())
    try:
        while True:
            todo, wanted = list(effects), None
            while todo or wanted:
                if not todo:  # as the trainer does: behind what was decided before
                    todo, wanted = driver.stop(wanted, cluster.now()), None
                    continue
                match todo.pop(0):
                    case ev.Send(to, message):
                        cluster.send(to, message)
                    case Log(event):
                        done.events.append(event)
                        if stop := on_event(event):
                            wanted = stop
                    case Keep(best):
                        done.kept.append((best.step, weights.fingerprint(_state(plan, len(cast.shards), best.parts))))
                    case Spawn(incarnation):
                        spec = plan.specs(driver.cast)[incarnation]
                        cluster.add(incarnation, replace(spec, rules=replace(spec.rules, bucket=bucket)))
                    case Account(line):
                        done.lines.append(line)
                    case Finish(error):
                        done.error = error
                        done.state = {} if error else _state(plan, len(cast.shards), driver.final)
                        return done
            arrived = cluster.receive(1e6)
            assert arrived is not None, f"stuck at step {driver.tally.steps}"
            driver.members.nodes = cluster.nodes()
            effects = driver.handle(*arrived, cluster.now())
    finally:
        cluster.close()
        torch.set_num_threads(threads)


def _state(plan: Plan, shards: int, parts: Mapping[int, ev.SnapshotSent]) -> dict[str, Tensor]:
    """The model's state from parts of a snapshot; the plan's initial weights are put back, to be run again."""
    replica = plan.replica
    weights_before, buffers_before = replica.flat.clone(), replica.buffers
    sent = {shard: part.weights for shard, part in parts.items()}
    replica.install(replica.layout.slices(shards), sent, parts[0].buffers)
    replica.buffer_layout.unpack(replica.buffers, replica.model)
    final_state = weights.copy(state(replica.model))
    replica.flat.copy_(weights_before)
    replica.buffers = buffers_before
    return final_state


class Odd(nn.Module):
    """Parameters of odd shapes, as they come."""

    def __init__(self) -> None:
        super().__init__()
        for i, shape in enumerate([(257, 33), (257,), (1003, 7), (3,)]):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape) * 0.1))
        self.norm = nn.BatchNorm1d(7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.p0.T + self.p1)  # [n, 257]
        wide = nn.functional.pad(hidden, (0, 1003 - 257)) @ self.p2  # [n, 7]
        wide = nn.functional.dropout(self.norm(wide), 0.25, self.training)
        return wide[:, :3] + self.p3


class OddTask:
    """A regression with `Odd`, 101 samples, so that a batch of 32 leaves an uneven last one."""

    def __init__(self, samples: int = 101) -> None:
        self.samples = samples

    def model(self) -> nn.Module:
        return Odd()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    def train_data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.samples, 33, generator=generator)
        return x, x[:, :3].sin()


class Smooth:
    """A float64 MLP without chance, so that the whole batch at once is the same mathematics."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3)).to(self.dtype)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def train_data(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(100, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return x.to(self.dtype), x[:, :3].cos().to(self.dtype)
