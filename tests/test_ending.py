"""Runs that end before their planned steps: at the right step, with that step's weights, whatever comes in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulate import Simulated, Smooth, simulate

from distgd.shard import Shard
from distgd.stopping import Stop

MODES = ["sync", "bounded", "async"]
BATCH = {"size": 16, "slots": 4}  # 100 samples: 7 steps an epoch, the last of them short


class Watched(Smooth):
    """The smooth task with held-out data."""

    def eval_data(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.train_data()
        return x[:20], y[:20]


def run(mode: str = "sync", seed: int = 0, **sections: Any) -> Simulated:
    given = {"batch": BATCH, "stop": {"steps": 40}, "optimizer": {"name": "adam", "lr": 0.01}, **sections}
    consistency = {"mode": mode, **given.pop("consistency", {})}
    return simulate(Watched(), seed=seed, consistency=consistency, **given)


def at(step: int, kind: str = "step") -> Callable[[dict[str, Any]], Stop | None]:
    return lambda event: Stop("enough") if event["event"] == kind and event["step"] >= step else None


def applied(done: Simulated) -> Counter[tuple[int, int]]:
    return Counter((line["step"], line["slot"]) for line in done.lines if line["state"] == "applied")


def whole_steps(done: Simulated) -> bool:
    """Whether exactly the slots that hold samples of the steps before the end were applied, once each."""
    order, steps = done.plan.order, done.driver.tally.steps
    return applied(done) == Counter((t, k) for t in range(steps) for k in range(order.filled(t)))


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_a_stop_ends_at_a_whole_step_with_every_sample_of_it_applied_once(mode: str, servers: int, seed: int) -> None:
    who = {"workers": 3, "servers": servers}
    lose = {servers + 2: 0.004} if seed % 2 else None
    done = run(mode, seed, cluster=who, on_event=at(3 + 2 * seed), lose=lose, eval={"every": {"steps": 3}})
    assert done.error is None
    assert done.driver.ended == "stopped: enough"
    assert 3 + 2 * seed <= done.driver.tally.steps <= 9 + 2 * seed
    assert whole_steps(done)
    assert [e["step"] for e in done.events if e["event"] == "eval"][-1] == done.driver.tally.steps
    if mode == "sync":
        assert done.sha256 == run(stop={"steps": done.driver.tally.steps}).sha256


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_a_stop_at_an_evaluation_or_at_the_first_step_does_not_get_stuck(mode: str, seed: int) -> None:
    for watch in (at(0, "eval"), at(1)):
        done = run(mode, seed, on_event=watch, eval={"every": {"seconds": 0.002}}, stop={"epochs": 9})
        assert done.error is None
        assert whole_steps(done)


@pytest.mark.parametrize("mode", MODES)
def test_seconds_end_a_run_without_a_number_of_steps(mode: str) -> None:
    done = run(mode, stop={"seconds": 0.05})
    assert done.error is None
    assert str(done.driver.ended).startswith("stop.seconds")
    assert whole_steps(done)
    assert done.driver.tally.steps > 1


TARGET = {"steps": 60, "target": {"metric": "eval/loss", "at_most": 0.35}}


def test_a_target_ends_at_the_same_step_with_the_same_bits_for_any_workers_and_servers() -> None:
    ends = set()
    for seed, (workers, servers) in enumerate([(1, 1), (2, 3), (3, 2), (4, 1)]):
        who = {"workers": workers, "servers": servers}
        done = run(seed=seed, stop=TARGET, eval={"every": {"steps": 4}}, cluster=who)
        evals = [(e["step"], e["metrics"]["eval/loss"]) for e in done.events if e["event"] == "eval"]
        steps = done.driver.tally.steps
        assert [step for step, _ in evals] == list(range(4, steps + 1, 4)), "none is skipped, the last not repeated"
        assert [loss <= 0.35 for _, loss in evals] == [False] * (len(evals) - 1) + [True]
        assert steps < 60
        assert done.driver.tally.skipped_evaluations == 0
        ends.add((steps, done.sha256))
    assert len(ends) == 1
    ((steps, sha256),) = ends
    assert run(stop={"steps": steps}).sha256 == sha256


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [2, 5])
def test_patience_ends_at_the_right_evaluation_in_each_mode(mode: str, workers: int) -> None:
    patience = {"metric": "eval/loss", "evals": 2, "min_delta": 0.02}
    who = {"workers": workers, "servers": 2}
    done = run(mode, stop={"epochs": 60, "patience": patience}, eval={"every": {"epochs": 1}}, cluster=who)
    losses = [e["metrics"]["eval/loss"] for e in done.events if e["event"] == "eval"]
    best, since = float("inf"), 0
    for loss in losses:
        assert since < 2, "it went on for too long"
        best, since = (loss, 0) if loss < best - 0.02 else (best, since + 1)
    assert since == 2
    assert done.driver.tally.steps == 7 * len(losses)
    assert whole_steps(done)


@pytest.mark.parametrize("servers", [1, 3])
def test_the_weights_of_the_best_evaluation_are_those_of_its_step(servers: int) -> None:
    how: dict[str, Any] = {"eval": {"every": {"steps": 3}, "best": {"metric": "eval/loss"}}, "optimizer": {"lr": 0.5}}
    done = run(stop={"steps": 30}, cluster={"servers": servers}, **how)
    evals = {e["step"]: e["metrics"]["eval/loss"] for e in done.events if e["event"] == "eval"}
    step, sha256 = done.kept[-1]
    assert evals[step] == min(evals.values())
    assert done.driver.evaluations.best is not None
    assert done.driver.evaluations.best.metrics == {"eval/loss": evals[step]}
    assert sha256 == run(stop={"steps": step}, optimizer={"lr": 0.5}).sha256
    assert [step for step, _ in done.kept] == sorted({step for step, _ in done.kept})


@pytest.mark.parametrize("mode", MODES)
def test_the_last_evaluation_can_be_the_best(mode: str) -> None:
    best = {"every": {"steps": 2}, "best": {"metric": "eval/loss"}}
    done = run(mode, stop={"steps": 9}, optimizer={"name": "sgd", "lr": 0.01}, eval=best)
    assert done.kept[-1] == (9, done.sha256), "gradient descent with a small step goes down"


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_quorum_ends_cleanly_too(clip: float | None) -> None:
    for step in (1, 6, 11):
        optimizer = {"name": "sgd", "lr": 0.1, "clip": {"norm": clip}}
        who = {"workers": 4, "servers": 3}
        done = run(consistency={"quorum": 3}, on_event=at(step), cluster=who, optimizer=optimizer)
        assert done.error is None
        assert done.driver.tally.steps == done.driver.tally.versions


def test_without_the_limit_training_runs_past_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard's twin: a shard that ignores the limit commits steps beyond the one that reached the target."""
    real = Shard._dispatch
    ignore = lambda self, source, event: [] if type(event).__name__ == "Limit" else real(self, source, event)  # noqa: E731
    monkeypatch.setattr(Shard, "_dispatch", ignore)
    done = run(stop=TARGET, eval={"every": {"steps": 4}}, on_event=at(59))
    first = next(e["step"] for e in done.events if e["event"] == "eval" and e["metrics"]["eval/loss"] <= 0.35)
    assert done.driver.tally.steps > first


@pytest.mark.parametrize("best", [None, {"metric": "eval/loss"}])
@pytest.mark.parametrize("rule", [{}, {"target": {"metric": "eval/loss", "at_most": 1e-9}}])
def test_a_stop_at_any_event_ends_with_the_weights_of_its_step(best: Any, rule: dict[str, Any]) -> None:
    """Also where the same event lets training go on: what was to come before the stop must not come after it."""
    for nth in range(1, 14):
        seen: list[str] = []

        def watch(event: dict[str, Any], nth: int = nth, seen: list[str] = seen) -> Stop | None:
            seen.append(event["event"])
            return Stop("enough") if len(seen) == nth else None

        done = run(stop={"steps": 12, **rule}, eval={"every": {"steps": 3}, "best": best}, on_event=watch)
        steps = done.driver.tally.steps
        assert done.error is None and whole_steps(done)
        assert done.sha256 == run(stop={"steps": steps}).sha256, f"stopped at event {nth}"
        assert {part.version for part in done.driver.final.values()} == {steps}
        assert done.driver.stopped is (steps < 12 or done.driver.ended is not None)
        assert [e["step"] for e in done.events if e["event"] == "eval"][-1] == steps
