"""A slot that is not finite never reaches the weights: whose fault it is, is found by computing it again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recovery import Chaos
from test_resume import STEPS, Ragged, clean, config, events, run, steps, without_pictures

from distgd.audit import audit, read
from distgd.errors import Diverged, RunFailed
from distgd.inprocess import InProcessCluster
from distgd.replay import replay
from distgd.replica import Replica
from distgd.result import Result
from distgd.suspicion import Suspicions
from distgd.trainer import launch

__all__ = ["without_pictures"]
MODES = ["sync", "bounded", "async"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


def lines(path: Path, state: str) -> list[tuple[int, int]]:
    ledger = map(json.loads, (path / "runs/a/ledger.jsonl").read_text().splitlines())
    return [(line["step"], line["slot"]) for line in ledger if line["state"] == state]


class Spoiled(Ragged):
    """Some samples have no finite gradient."""

    def train_data(self) -> Any:
        x, y = super().train_data()
        y[7] = torch.nan
        return x, y


def told(path: Path, kind: str) -> list[str]:
    return [event["message"] for event in events(path) if event["event"] == kind]


def go(path: Path, mode: str, task: Any = None, machines: int = 1, **more: Any) -> Result:
    cluster = InProcessCluster(0, machines=machines)
    return launch(config(path, mode, **more), "x", lambda event: None, task=task or Ragged(), cluster=cluster)


@pytest.mark.parametrize("mode", MODES)
def test_samples_that_are_at_fault_end_the_run_and_are_named_with_both_who_computed_them(
    tmp_path: Path, mode: str
) -> None:
    with pytest.raises(Diverged, match=r"computed twice, by worker \d and worker \d; .*places \d+ to \d+ of epoch 0"):
        go(tmp_path, mode, Spoiled())


@pytest.mark.parametrize("mode", MODES)
def test_or_they_are_skipped_and_every_other_sample_counts_once(tmp_path: Path, mode: str) -> None:
    consistency = {"on_poison": "skip", "max_skips": 20}
    result = go(tmp_path, mode, Spoiled(), consistency=consistency, eval={"every": {"steps": 100}, "best": None})
    assert result.status == "completed"
    assert all(torch.isfinite(value).all() for value in result.state_dict.values())
    skipped = lines(tmp_path, "skipped")
    epochs = -(-STEPS // 3)
    assert len({step for step, _ in skipped}) == epochs, "one step or slot an epoch"
    assert len(skipped) == epochs * (1 if mode != "sync" else len(skipped) // epochs)
    assert len([text for text in told(tmp_path, "warning") if "skipped" in text]) == epochs
    assert clean(tmp_path)
    found = replay(tmp_path / "runs/a", task=Spoiled())
    assert (found.same, found.weights_sha256) == (True, result.weights_sha256)
    assert result.samples < go(tmp_path / "whole", mode).samples


@pytest.mark.parametrize("mode", MODES)
def test_what_was_skipped_stays_so_whoever_is_killed(tmp_path: Path, mode: str, whole: Result) -> None:
    killed = 0
    for seed in range(6):
        path = tmp_path / str(seed)
        cluster = Chaos(seed, 40.0, ("worker", "server"))
        consistency = {"on_poison": "skip", "max_skips": 30}
        given = config(path, mode, consistency=consistency, checkpoint={"every": {"steps": 2}})
        result = launch(given, "x", lambda event: None, task=Spoiled(), cluster=cluster)
        killed += len(cluster.killed)
        counts = audit(read(path / "runs/a/ledger.jsonl")).epochs
        assert clean(path)
        assert sum(count.applied for count in counts) == result.samples < whole.samples
        assert all(count.dropped for count in counts), "the spoiled sample is in every epoch"
    assert killed > 10


@pytest.mark.parametrize("mode", MODES)
def test_the_skip_too_many_ends_the_run(tmp_path: Path, mode: str) -> None:
    with pytest.raises(Diverged, match="after 2 that were skipped"):
        go(tmp_path, mode, Spoiled(), consistency={"on_poison": "skip", "max_skips": 2})


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that computes first finds nothing finite after a few slots; the driver's own trial comes before."""
    made: list[Replica] = []
    computed: list[int] = []
    compute = Replica.gradient

    def gradient(self: Replica, *args: Any) -> Any:
        found = compute(self, *args)
        if self not in made:
            made.append(self)
        if len(made) > 1 and self is made[1]:
            computed.append(args[2])
            return replace(found, bad=found.bad or len(computed) > 4)
        return found

    monkeypatch.setattr(Replica, "gradient", gradient)


@pytest.mark.parametrize(("mode", "machines"), [("sync", 1), ("sync", 2), ("bounded", 1), ("async", 1)])
def test_a_worker_that_computes_something_else_is_named_and_replaced(
    tmp_path: Path, mode: str, machines: int, whole: Result, broken: None
) -> None:
    result = go(tmp_path, mode, machines=machines)
    (fault,) = [text for text in told(tmp_path, "fault") if "quarantined" in text]
    assert fault.startswith("worker ")
    assert (result.samples, result.steps) == (whole.samples, STEPS)
    assert mode != "sync" or result.weights_sha256 == whole.weights_sha256
    assert clean(tmp_path)
    assert steps(tmp_path) == list(range(1, STEPS + 1))


def test_without_checkpoints_such_a_worker_ends_the_run(tmp_path: Path, broken: None) -> None:
    with pytest.raises(RunFailed, match=r"worker \d is quarantined: it found step \d+, slot \d+ not finite, and"):
        go(tmp_path, "sync", checkpoint={"every": None})


@pytest.fixture
def fickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes slot 1 of step 6 in its turn finds nothing finite; whoever is asked again finds it finite."""
    times: list[int] = []
    compute = Replica.gradient

    def gradient(self: Replica, source: Any, order: Any, step: int, slot: int, *more: Any) -> Any:
        found = compute(self, source, order, step, slot, *more)
        if (step, slot) == (6, 1):
            times.append(1)
        return replace(found, bad=(step, slot) == (6, 1) and len(times) % 2 == 1)

    monkeypatch.setattr(Replica, "gradient", gradient)


def test_what_is_another_each_time_is_not_blamed_on_one_worker_after_the_other(tmp_path: Path, fickle: None) -> None:
    with pytest.raises(
        RunFailed, match=r"step 6, slot 1: expected the same from every worker, found not finite 3 times"
    ):
        go(tmp_path, "sync")
    assert len([text for text in told(tmp_path, "fault") if "quarantined" in text]) == 2


def test_a_single_worker_computes_it_again_itself(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"computed twice, by worker 0; "):
        go(tmp_path, "sync", Spoiled(), cluster={"workers": 1})


# Out of proportion: consistency.max_grad_norm_ratio.


class Loud(Ragged):
    """One sample's gradient is far larger than all others, and finite."""

    def train_data(self) -> Any:
        x, y = super().train_data()
        y[7] *= 1e4
        return x, y


PROPORTION = {"max_grad_norm_ratio": 50.0}


@pytest.mark.parametrize("mode", MODES)
def test_a_limit_that_nothing_exceeds_changes_no_bit(tmp_path: Path, mode: str, whole: Result) -> None:
    result = go(tmp_path, mode, consistency=PROPORTION)
    assert (result.steps, result.samples) == (whole.steps, whole.samples)
    assert mode != "sync" or result.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("mode", MODES)
def test_a_slot_out_of_proportion_ends_the_run_and_is_named(tmp_path: Path, mode: str) -> None:
    with pytest.raises(
        Diverged,
        match=r"expected a gradient norm of at most [\d.e+]+, 50 times the median, found .* computed twice, by w",
    ):
        go(tmp_path, mode, Loud(), consistency=PROPORTION)


@pytest.mark.parametrize("mode", MODES)
def test_or_it_is_skipped_and_replayed_so(tmp_path: Path, mode: str) -> None:
    consistency = {**PROPORTION, "on_poison": "skip", "max_skips": 20}
    result = go(tmp_path, mode, Loud(), consistency=consistency, eval={"every": {"steps": 100}, "best": None})
    skipped = lines(tmp_path, "skipped")
    assert 0 < len({step for step, _ in skipped}) <= -(-STEPS // 3), "once an epoch, as soon as there is a median"
    assert all("too large beside the last ones" in text for text in told(tmp_path, "warning") if "skipped" in text)
    assert clean(tmp_path)
    found = replay(tmp_path / "runs/a", task=Loud())
    assert (found.same, found.weights_sha256) == (True, result.weights_sha256)


def test_in_sync_mode_the_same_steps_are_skipped_whoever_computes_and_whoever_is_killed(tmp_path: Path) -> None:
    consistency = {**PROPORTION, "on_poison": "skip", "max_skips": 20}
    alone = go(tmp_path / "alone", "sync", Loud(), consistency=consistency)
    skipped = lines(tmp_path / "alone", "skipped")
    assert skipped
    other = go(tmp_path / "other", "sync", Loud(), consistency=consistency, cluster={"workers": 3, "servers": 3})
    assert (other.weights_sha256, lines(tmp_path / "other", "skipped")) == (alone.weights_sha256, skipped)
    killed = 0
    for seed in range(6):
        cluster = Chaos(seed, 40.0, ("worker", "server"))
        given = config(tmp_path / str(seed), "sync", consistency=consistency, checkpoint={"every": {"steps": 2}})
        result = launch(given, "x", lambda event: None, task=Loud(), cluster=cluster)
        killed += len(cluster.killed)
        assert result.weights_sha256 == alone.weights_sha256
        assert clean(tmp_path / str(seed))
    assert killed > 10


def test_a_median_that_is_forgotten_with_a_shard_gives_other_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test before: the norms are part of the committed state."""
    consistency = {**PROPORTION, "on_poison": "skip", "max_skips": 20}
    alone = go(tmp_path / "alone", "sync", Loud(), consistency=consistency)
    monkeypatch.setattr("distgd.norms.Norms.squares", [])
    differs = 0
    for seed in range(6):
        cluster = Chaos(seed, 40.0, ("worker", "server"))
        given = config(tmp_path / str(seed), "sync", consistency=consistency, checkpoint={"every": {"steps": 2}})
        result = launch(given, "x", lambda event: None, task=Loud(), cluster=cluster)
        differs += result.weights_sha256 != alone.weights_sha256
    assert differs


@pytest.fixture
def exaggerates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that computes first has gradients that are far too large after a while."""
    made: list[Replica] = []
    computed: list[int] = []
    compute = Replica.gradient

    def gradient(self: Replica, source: Any, order: Any, step: int, slot: int, out: torch.Tensor, *more: Any) -> Any:
        found = compute(self, source, order, step, slot, out, *more)
        if self not in made:
            made.append(self)
        if len(made) > 1 and self is made[1]:
            computed.append(step)
            if len(computed) > 12:
                out *= 1e3
                return replace(found, stats=replace(found.stats, squared_norm=1e6 * found.stats.squared_norm))
        return found

    monkeypatch.setattr(Replica, "gradient", gradient)


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_whose_gradients_are_out_of_proportion_is_named_and_replaced(
    tmp_path: Path, mode: str, whole: Result, exaggerates: None
) -> None:
    result = go(tmp_path, mode, consistency=PROPORTION)
    (fault,) = [text for text in told(tmp_path, "fault") if "quarantined" in text]
    assert "too large beside the last ones" in fault
    assert (result.samples, result.steps) == (whole.samples, STEPS)
    assert mode != "sync" or result.weights_sha256 == whole.weights_sha256
    assert clean(tmp_path)


# Going back where it diverges: consistency.on_divergence.


BACK = {"on_divergence": "rollback"}


def counted(path: Path) -> bool:
    found = audit(read(path / "runs/a/ledger.jsonl"))
    return found.clean and found.finished and found.steps == 8


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_diverges_goes_back_and_on_behind_that_step(tmp_path: Path, mode: str) -> None:
    result = go(tmp_path, mode, Spoiled(), consistency={**BACK}, stop={"steps": 8}, checkpoint={"every": {"steps": 2}})
    faults = [text for text in told(tmp_path, "fault") if "rollback" in text]
    assert [text.partition("rollback ")[2][:6] for text in faults] == [f"{n} of 3" for n in range(1, len(faults) + 1)]
    assert 0 < len(faults) <= 3
    assert all(torch.isfinite(value).all() for value in result.state_dict.values())
    assert (result.status, result.steps, result.bits) == ("completed", 8, "not promised")
    skipped = {step for step, _ in lines(tmp_path, "skipped")}
    named = [int(text.partition("step ")[2].partition(",")[0]) for text in faults]
    assert set(named) <= skipped, "the step at which it diverged counts without effect"
    assert counted(tmp_path)
    assert steps(tmp_path) == list(range(1, 9))
    assert result.samples < go(tmp_path / "whole", mode, stop={"steps": 8}).samples
    found = replay(tmp_path / "runs/a", task=Spoiled())
    assert (found.same, found.weights_sha256) == (True, result.weights_sha256)


@pytest.mark.parametrize("mode", MODES)
def test_one_that_diverges_again_and_again_ends(tmp_path: Path, mode: str) -> None:
    with pytest.raises(Diverged, match="expected a finite loss"):
        go(tmp_path, mode, Spoiled(), consistency=BACK)
    assert len([text for text in told(tmp_path, "fault") if "rollback" in text]) == 3


@pytest.mark.parametrize("mode", MODES)
def test_what_was_given_up_stays_so_whoever_is_killed(tmp_path: Path, mode: str) -> None:
    killed = 0
    for seed in range(4):
        path = tmp_path / str(seed)
        cluster = Chaos(seed, 40.0, ("worker", "server"))
        given = config(path, mode, consistency=BACK, checkpoint={"every": {"steps": 2}}, stop={"steps": 8})
        result = launch(given, "x", lambda event: None, task=Spoiled(), cluster=cluster)
        killed += len(cluster.killed)
        assert counted(path)
        counts = audit(read(path / "runs/a/ledger.jsonl")).epochs
        assert sum(count.applied for count in counts) == result.samples
        assert result.steps == 8
    assert killed > 4


def test_without_a_memory_of_it_the_same_step_diverges_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(self: Suspicions, before: Suspicions) -> None:
        self.rollbacks = before.rollbacks

    monkeypatch.setattr(Suspicions, "follow", forgets)
    with pytest.raises(Diverged):
        go(tmp_path, "sync", Spoiled(), consistency=BACK, stop={"steps": 4}, checkpoint={"every": {"steps": 2}})
    assert len([text for text in told(tmp_path, "fault") if "rollback" in text]) == 3
