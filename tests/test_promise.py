"""Who computes other bits than the first is refused or marks the run; the mark outlives drivers and rollbacks.

The machines of one test differ by what an incarnation says of itself; those at the end really compute otherwise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import STEPS, Ragged, clean, config, events, interrupted, run, without_pictures

from distgd import audit, canary, train
from distgd import events as ev
from distgd.assignment import Cast
from distgd.checkpoint import newest
from distgd.config import load
from distgd.errors import BadInput, RunFailed
from distgd.inprocess import InProcessCluster
from distgd.prepare import prepare
from distgd.promise import Promise, Verdict
from distgd.result import Result
from distgd.runfolder import identity
from distgd.server import Server
from distgd.trainer import launch
from distgd.weights import fingerprint
from distgd.worker.actor import Worker

__all__ = ["without_pictures"]

CAST = Cast(1, (1, 2), (3, 4, 5), 6)
HERE, THERE = {"canary": "aaaa", "machine": "one"}, {"canary": "bbbb", "machine": "another"}
STRICT = {"run": {"bits": "strict"}}
SHARDS, WORKERS, EVALUATOR = (1, 2), (3, 4, 5), 6  # of `config`


class TestJudging:
    def test_the_first_of_each_role_is_what_the_others_need(self) -> None:
        promise = Promise(promises=True, strict=False)
        server = {**HERE, "canary": "cccc"}
        ready = {5: HERE, 3: HERE, 4: HERE, 1: server, 2: server, 6: {}}
        assert promise.judge(CAST, ready) == Verdict({})
        assert promise.bits == "promised"

    def test_it_is_the_first_of_the_cast_and_not_the_first_to_arrive(self) -> None:
        verdict = Promise(promises=True, strict=True).judge(CAST, {5: THERE, 4: HERE, 3: HERE})
        assert set(verdict.refused) == {5}

    def test_auto_warns_once_and_the_mark_stays(self) -> None:
        promise = Promise(promises=True, strict=False)
        verdict = promise.judge(CAST, {3: HERE, 4: THERE, 5: THERE})
        assert not verdict.refused
        assert verdict.warning is not None
        assert "worker 1" in verdict.warning
        assert "on one (canary aaaa), found another (canary bbbb)" in verdict.warning
        assert promise.bits == "not promised"
        assert promise.judge(CAST, {5: THERE}) == Verdict({})
        assert promise.judge(CAST, {5: HERE}) == Verdict({})
        assert promise.bits == "not promised"

    def test_strict_refuses_by_name_and_goes_on_promising(self) -> None:
        promise = Promise(promises=True, strict=True)
        verdict = promise.judge(CAST, {3: HERE, 4: THERE, 5: HERE})
        assert list(verdict.refused) == [4]
        assert "on one (canary aaaa), found another (canary bbbb)" in verdict.refused[4]
        assert promise.bits == "promised"

    def test_a_server_is_looked_at_too_and_cannot_be_left_out(self) -> None:
        promise = Promise(promises=True, strict=False)
        assert "shard 1" in str(promise.judge(CAST, {1: HERE, 2: THERE}).warning)
        with pytest.raises(RunFailed, match=r"^shard 1: expected .*on one.*found another"):
            Promise(promises=True, strict=True).judge(CAST, {1: HERE, 2: THERE})

    def test_where_nothing_is_promised_nothing_is_said(self) -> None:
        promise = Promise(promises=False, strict=False)
        assert promise.judge(CAST, {3: HERE, 4: THERE}) == Verdict({})
        assert promise.bits == "not promised"

    def test_what_was_not_promised_once_stays_so(self) -> None:
        """`cluster` may change, so that a run may have been on a card for a while, where nothing is looked at."""
        card, after = Promise(promises=False, strict=False), Promise(promises=True, strict=False)
        card.judge(CAST, {3: HERE})
        after.go_on(card.record(), card.bits)
        assert after.bits == "not promised"

    def test_what_is_on_record_is_what_another_driver_goes_on_with(self) -> None:
        before = Promise(promises=True, strict=False)
        before.judge(CAST, {1: HERE, 3: HERE})
        after = Promise(promises=True, strict=False)
        after.go_on(before.record(), before.bits)
        assert after.bits == "promised"
        assert after.judge(CAST, {1: HERE, 3: THERE}).warning is not None
        again = Promise(promises=True, strict=False)
        again.go_on(after.record(), after.bits)
        assert again.bits == "not promised"
        assert again.broken == after.broken
        assert again.judge(CAST, {3: THERE, 4: THERE}) == Verdict({})


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"consistency": {"mode": "bounded"}}, "consistency.mode=bounded"),
        ({"consistency": {"mode": "async"}}, "consistency.mode=async"),
        ({"consistency": {"quorum": 2}}, "consistency.quorum=2"),
        ({"transport": {"dtype": "bfloat16"}}, "transport.dtype=bfloat16"),
    ],
)
def test_strict_is_refused_where_no_bits_are_promised(more: Any, why: str) -> None:
    given = {"task": "digits", "stop": {"steps": 1}, "batch": {"slots": 3}, **more}
    with pytest.raises(BadInput, match=rf"^run.bits: expected auto with {why}, found 'strict'"):
        load({**given, **STRICT})
    assert load(given).run.bits == "auto"
    load({**given, **STRICT, "consistency": {"quorum": 3}, "transport": {}})  # every slot: that is no quorum


def test_canaries_are_taken_where_they_are_of_use_and_cuda_is_made_deterministic() -> None:
    def flags(**more: Any) -> set[tuple[str, bool, bool]]:
        given = {"task": "digits", "stop": {"steps": 1}, **more}
        plan = prepare(load(given))
        specs = plan.specs(plan.cast()).values()
        return {(s.role, s.canary, s.deterministic) for s in specs if s.role != "evaluator"}  # type: ignore[union-attr]

    card = {"cluster": {"gpus": 1.0, "server_device": "cuda", "server_gpus": 0.5}}
    assert flags() == {("server", True, False), ("worker", True, False)}
    assert flags(**STRICT) == flags()
    assert flags(consistency={"mode": "async"}) == {("server", False, False), ("worker", False, False)}
    assert flags(**card) == {("server", False, False), ("worker", False, False)}
    assert flags(**card, **STRICT) == {("server", True, True), ("worker", True, True)}


def test_what_is_set_in_this_process_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    plan = prepare(load({"task": "digits", "stop": {"steps": 1}, "cluster": {"backend": "inprocess"}}))
    cluster = InProcessCluster()
    specs = plan.specs(plan.cast())
    cluster.spawn({3: replace(specs[3], deterministic=True)})
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "what is set already stays"
    cluster.close()
    assert not torch.are_deterministic_algorithms_enabled()


# Runs in virtual time.

Odd = Callable[[int], bool]


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Callable[[Odd], None]:
    """Let the processes of some incarnations say that they are on another machine, which computes otherwise."""

    def force(who: Odd) -> None:
        for actor in (Worker, Server):
            monkeypatch.setattr(actor, "facts", _lying(actor.facts, who))

    return force


def _lying(facts: Any, who: Odd) -> Any:
    def told(self: Any) -> dict[str, str]:
        rules = self.spec.rules
        me = rules.incarnations[self.spec.part.index] if isinstance(self, Server) else self.spec.incarnation
        return {**facts(self), **(THERE if who(me) else {})}

    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


def said(path: Path, kind: str) -> list[str]:
    return [event["message"] for event in events(path) if event["event"] == kind]


def audited(path: Path) -> audit.Audit:
    return audit.audit(audit.read(path / "runs/a/ledger.jsonl"))


def recorded(path: Path) -> Any:
    found = newest(path / "runs/a/checkpoints", str(identity(path / "runs/a")), [])
    assert found is not None
    return found.manifest


def go(
    path: Path, lose: dict[int, float], *, watch: Any = lambda event: None, resume: str = "never", **more: Any
) -> Result:
    cluster = InProcessCluster(0, lose=lose)
    return launch(config(path, **more), "x", watch, task=Ragged(), cluster=cluster, resume=resume)


def test_of_one_kind_nothing_is_said(tmp_path: Path, whole: Result) -> None:
    assert whole.bits == "promised"
    done = run(tmp_path, **STRICT)
    assert (done.bits, done.weights_sha256) == ("promised", whole.weights_sha256)
    assert not said(tmp_path, "warning") + said(tmp_path, "fault")
    manifest = recorded(tmp_path)
    assert manifest.bits == "promised"
    assert manifest.software["canary.worker"] == canary.gradients("cpu", 1)
    assert {"machine.worker", "canary.shard", "machine.shard"} <= set(manifest.software)
    assert (audited(tmp_path).bits, audited(tmp_path).why) == ("promised", None)


def test_auto_admits_it_warns_once_and_marks_the_run_everywhere(
    tmp_path: Path, odd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    odd({4, 5}.__contains__)
    tracking = {"uri": f"sqlite:///{tmp_path}/m.db"}
    with caplog.at_level(logging.WARNING, "distgd.trainer"):
        done = run(tmp_path, tracking=tracking)
    assert done.bits == done.as_dict()["bits"] == "not promised"
    (warning,) = said(tmp_path, "warning")
    assert warning.startswith("worker 1: expected one that computes the bits of the run's first worker, on ")
    assert "found another (canary bbbb)" in warning
    assert warning in caplog.text
    assert recorded(tmp_path).bits == "not promised"
    found = audited(tmp_path)
    assert (found.clean, found.bits) == (True, "not promised")
    assert str(found.why) in warning
    tags = MlflowClient(tracking["uri"]).get_run(str(done.mlflow_run_id)).data.tags
    assert (tags["bits"], tags["result.bits"]) == ("not promised", "not promised")


def test_strict_refuses_it_and_the_run_goes_on_without(tmp_path: Path, odd: Any, whole: Result) -> None:
    odd({4}.__contains__)
    done = run(tmp_path, **STRICT)
    assert (done.bits, done.weights_sha256, done.steps) == ("promised", whole.weights_sha256, STEPS)
    (fault,) = said(tmp_path, "fault")
    assert fault.startswith("worker 1: expected")
    assert "found another (canary bbbb); refused, as run.bits is strict" in fault
    assert torch.__version__ in fault, "the first one's machine is named, too"
    assert clean(tmp_path)
    assert audited(tmp_path).bits == "promised"
    workers = {name for event in events(tmp_path) for name in event["metrics"] if "compute/worker" in name}
    assert workers == {"time/compute/worker_0", "time/compute/worker_1"}, "nobody is in its place"


def test_admitted_under_strict_it_would_compute(tmp_path: Path, odd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without the verdict all three workers compute."""
    odd({4}.__contains__)
    monkeypatch.setattr(Promise, "judge", lambda self, cast, ready: Verdict({}))
    run(tmp_path, **STRICT)
    assert not said(tmp_path, "fault")
    workers = {name for event in events(tmp_path) for name in event["metrics"] if "compute/worker" in name}
    assert len(workers) == 3


def test_a_replacement_is_looked_at_as_it_joins(tmp_path: Path, odd: Any, whole: Result) -> None:
    odd(lambda incarnation: incarnation > EVALUATOR)
    marked = go(tmp_path / "auto", {4: 0.02})
    assert (marked.bits, marked.steps) == ("not promised", STEPS)
    (warning,) = said(tmp_path / "auto", "warning")
    assert warning.startswith("worker 1: expected")
    found = audited(tmp_path / "auto")
    assert (found.clean, found.bits) == (True, "not promised")
    assert '"state": "bits"' in (tmp_path / "auto/runs/a/ledger.jsonl").read_text()

    refused = go(tmp_path / "strict", {4: 0.02}, **STRICT)
    assert (refused.bits, refused.weights_sha256) == ("promised", whole.weights_sha256)
    gone, fault = said(tmp_path / "strict", "fault")
    assert "refused, as run.bits is strict" in fault
    assert gone == "worker 1 is gone: lost by plan"
    assert not said(tmp_path / "strict", "joined")
    assert clean(tmp_path / "strict")


def test_a_refused_one_whose_end_is_told_of_is_not_replaced(tmp_path: Path, odd: Any, whole: Result) -> None:
    """On Ray the cluster tells of the end of whatever was ended, at the start and later."""

    class Telling(InProcessCluster):
        def end(self, incarnation: int) -> None:
            self._endpoints[incarnation].send(ev.DRIVER, ev.ProcessLost(incarnation, "killed"))
            super().end(incarnation)

    odd(lambda incarnation: incarnation in (4, 7))
    cluster = Telling(0, lose={5: 0.02})
    done = launch(config(tmp_path, **STRICT), "x", lambda event: None, task=Ragged(), cluster=cluster)
    assert done.weights_sha256 == whole.weights_sha256
    assert len(said(tmp_path, "fault")) == 3, "two that are refused, one that is lost"


def test_with_every_worker_gone_or_refused_the_run_ends_and_says_why(tmp_path: Path, odd: Any) -> None:
    odd(lambda incarnation: incarnation > EVALUATOR)
    lose = {3: 0.02, 4: 0.02, 5: 0.02}
    with pytest.raises(RunFailed, match=r"^run.bits: expected a worker that may take part, found none: worker 0"):
        go(tmp_path, lose, **STRICT)


def test_a_shard_that_computes_otherwise(tmp_path: Path, odd: Any) -> None:
    """It ends a strict run, and marks any other; a mark from a recovery stays though all went back."""
    odd({2}.__contains__)
    assert run(tmp_path / "auto").bits == "not promised"
    with pytest.raises(RunFailed, match=r"^shard 1: expected .* found another"):
        run(tmp_path / "strict", **STRICT)
    odd(lambda incarnation: incarnation > EVALUATOR)
    done = go(tmp_path / "recovered", {2: 0.03})
    assert (done.bits, audited(tmp_path / "recovered").bits) == ("not promised", "not promised")
    assert audited(tmp_path / "recovered").clean
    assert len(said(tmp_path / "recovered", "warning")) == 1
    with pytest.raises(RunFailed, match=r"^shard 1: expected"):
        go(tmp_path / "refused", {2: 0.03}, **STRICT)


class TestResume:
    def test_on_another_kind_of_machine_it_is_marked_or_refused(self, tmp_path: Path, odd: Any, whole: Result) -> None:
        interrupted(tmp_path, 6)
        odd(lambda incarnation: incarnation in WORKERS)
        with pytest.raises(BadInput, match=r"^run.bits: expected a worker that may take part, found none") as refused:
            run(tmp_path, "auto", **STRICT)
        assert refused.value.exit_code == 2
        assert "found another" in str(refused.value)
        done = run(tmp_path, "auto")
        assert (done.bits, done.steps) == ("not promised", STEPS)
        assert (audited(tmp_path).bits, clean(tmp_path)) == ("not promised", True)
        assert recorded(tmp_path).software["canary.worker"] == canary.gradients("cpu", 1), "the first one's"

    def test_the_mark_survives_machines_of_one_kind(
        self, tmp_path: Path, odd: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "facts", _lying(Worker.facts, {4}.__contains__))
            interrupted(tmp_path, 6)
        done = run(tmp_path, "auto", **STRICT)
        assert done.bits == "not promised"
        assert audited(tmp_path).bits == "not promised"
        assert len(said(tmp_path, "warning")) == 1, "and nothing more is said of it"
        assert not said(tmp_path, "fault")

    def test_forgotten_it_would_be_promised(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The twin: what a manifest says is not read."""
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "facts", _lying(Worker.facts, {4}.__contains__))
            interrupted(tmp_path, 6)
        monkeypatch.setattr(Promise, "go_on", lambda self, software, bits: None)
        assert run(tmp_path, "auto").bits == "promised"

    def test_from_a_checkpoint_before_the_mark_it_is_promised_again(
        self, tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "facts", _lying(Worker.facts, lambda incarnation: incarnation > EVALUATOR))
            marked = go(tmp_path, {4: 0.03}, checkpoint={"every": {"steps": 2}, "keep": 50})
        assert marked.bits == audited(tmp_path).bits == "not promised"
        old = tmp_path / "runs/a/checkpoints/v2-t1"
        done = run(tmp_path, str(old))
        assert (done.bits, done.weights_sha256) == ("promised", whole.weights_sha256)
        assert audited(tmp_path).bits == "promised"

    def test_with_other_threads_it_is_marked(self, tmp_path: Path) -> None:
        """No machine is another one; the arithmetic is."""
        canary.of_worker.cache_clear()
        interrupted(tmp_path, 6)
        done = run(tmp_path, "auto", cluster={"threads": 2})
        assert done.bits == "not promised"
        (warning,) = said(tmp_path, "warning")
        assert "1 thread (canary" in warning
        assert "2 threads (canary" in warning


# Machines that really compute otherwise.


@contextmanager
def two_kinds_of_nodes() -> Iterator[None]:
    """Two Ray nodes on this machine, the second of which has torch use the plainest vector instructions."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)  # Ray remembers the one of an earlier run in this process
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2, env_vars={"ATEN_CPU_CAPABILITY": "default"})
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def on_two_kinds(folder: Path, bits: str, steps: int) -> tuple[Result, list[str], list[str]]:
    """A run with two workers on each kind of node: its result, the faults and the warnings that were told."""
    seen: list[dict[str, Any]] = []
    given: dict[str, Any] = {
        "task": "digits",
        "run": {"storage": str(folder), "name": bits, "bits": bits},
        "batch": {"size": 128, "slots": 4},
        "stop": {"steps": steps},
        "optimizer": {"name": "adam", "lr": 0.001},
        "cluster": {"workers": 4, "servers": 1},
        "tracking": {"uri": "none"},
    }
    if bits == "strict":
        alone = {"backend": "inprocess", "workers": 1, "servers": 1}
        train({**given, "run": {**given["run"], "name": "alone"}, "cluster": alone})
    result = train(given, on_event=seen.append)
    told = [[event["message"] for event in seen if event["event"] == kind] for kind in ("fault", "warning")]
    return result, told[0], told[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="the CPU has one kind of vectors")
def test_two_kinds_of_machines(tmp_path: Path) -> None:
    with two_kinds_of_nodes():
        strict, refused, _ = on_two_kinds(tmp_path, "strict", 100)
        auto, _, warnings = on_two_kinds(tmp_path, "auto", 100)
    assert len(refused) == 2
    assert all("refused, as run.bits is strict" in each and ", DEFAULT, " in each for each in refused)
    assert (strict.bits, strict.weights_sha256, strict.steps) == ("promised", alone(tmp_path), 100)
    assert (auto.bits, auto.steps, len(warnings)) == ("not promised", 100, 1)
    assert auto.weights_sha256 != alone(tmp_path), "so the mark is right"


def alone(folder: Path) -> str:
    """The fingerprint of the same run in one process."""
    return fingerprint(load_file(folder / "alone" / "model.safetensors"))
