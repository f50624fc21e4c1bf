"""A plan of faults: what a file may say, which faults are due, and that each happens, here and on real processes."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_recovery import right
from test_resume import FRESH, STEPS, Ragged, Watch, config, events, run, without_pictures

from distgd import train
from distgd.config import load
from distgd.errors import BadInput
from distgd.faults import Coming, Fates, Own, check, parse, texts
from distgd.inprocess import InProcessCluster
from distgd.result import Result
from distgd.trainer import launch

__all__ = ["without_pictures"]
CONFIGS = Path(__file__).parents[1] / "configs"
COUNTS = {"worker": 3, "server": 2, "evaluator": 0, "driver": 1}


def one(what: str) -> Any:
    (fault,) = parse(f"- {{{what}}}", "plan.yaml")
    return fault


# What a file may say.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("what: kill, whom: worker 1, when: {step: 20}", "kill worker 1 at step 20"),
        ("what: stop, whom: server 0, when: {step: 6}, seconds: 8", "stop server 0 for 8 s at step 6"),
        (
            "what: kill, whom: any worker, when: {rate: 0.05, seed: 1}, times: 3",
            "kill any worker at random, 0.05 a second, 3 times at most",
        ),
        (
            "what: kill, whom: server 0, when: {message: Commit, number: 2, sent: true, step: 5}",
            "kill server 0 after its Commit 2 from step 5 on",
        ),
        ("what: drop, whom: any, when: {rate: 0.1}", "drop messages of any process, each with a chance of 0.1"),
        (
            "what: delay, whom: driver, when: {step: 3}, seconds: 0.1",
            "delay messages of driver by 0.1 s from step 3 on",
        ),
        (
            "what: reorder, whom: worker 0, when: {message: GradientArrived}",
            "reorder GradientArrived 1 of worker 0 by 0.005 s",
        ),
        (
            "what: disk full, whom: server 1, when: {step: 10}, times: 2",
            "disk full at server 1 at step 10, 2 times at most",
        ),
        ("what: mlflow down, when: {step: 0}, seconds: 20", "mlflow down for 20 s at step 0"),
    ],
)
def test_a_fault_in_words(text: str, words: str) -> None:
    assert str(one(text)) == words


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "plan.yaml: expected a list of faults, found something else; write lines such as - {what: kill, whom:"),
        ("[]", "plan.yaml: expected a list of faults, found an empty list"),
        ("- kill", "plan.yaml, line 1: expected a fault, such as - {what: kill, whom: worker 1, when: {step: 20}}"),
        ("- {what: kil}", "plan.yaml, line 1: what: expected one of kill, stop, disk full, delay, drop, duplicate, "
         "reorder, mlflow down, found 'kil'; did you mean kill?"),
        ("- {whom: driver}", "line 1: expected the key what (one of kill, stop,"),
        ("- {what: kill, whom: wroker 1, when: {step: 2}}", "whom: expected worker N, server N, evaluator, driver, any "
         "worker, any server or any, found 'wroker 1'; did you mean worker 1?"),
        ("- {what: kill, whom: 3, when: {step: 2}}", "found 3; choose one"),
        ("- {what: kill, whom: worker 1}", "line 1: expected the key when"),
        ("- {what: kill, whom: worker 1, when: 7}", "when: expected {step: N}, {message: KIND, number: N}, {rate: R}"),
        ("- what: kill\n  whom: worker 0\n  when:\n    step: 3\n    nunber: 2", "plan.yaml, line 5: when.nunber: "
         "expected one of the keys step, message, number, sent, rate, seed, found another one; did you mean number?"),
        ("- {what: kill, whom: driver, when: {step: 2}}\n- {what: kill, whom: worker 1, when: {step: -1}}",
         "plan.yaml, line 2: when.step: expected an integer >= 0, found -1; correct it"),
        ("- {what: kill, whom: worker 1, when: {step: true}}", "when.step: expected an integer >= 0, found True"),
        ("- {what: kill, whom: worker 1, when: {rate: .inf}}", "when.rate: expected a number > 0, found inf"),
        ("- {what: kill, whom: worker 1, when: {message: Comit}}", "found 'Comit'; did you mean Commit?"),
        ("- {what: kill, whom: any, when: {message: Commit}}", "whom: expected one process beside message"),
        ("- {what: drop, whom: any, when: {step: 3}}", "when: expected a rate or a message with what: drop"),
        ("- {what: drop, whom: any, when: {rate: 1}}", "when.rate: expected a chance below 1 of each message, found 1"),
        ("- {what: delay, whom: any, when: {rate: 0.5}}", "expected seconds with what: delay, found nothing"),
        ("- {what: stop, whom: driver, when: {step: 2}}", "expected seconds with what: stop, found nothing"),
        ("- {what: kill, whom: driver, when: {step: 3}, seconds: 3}", "seconds: expected no seconds with what: kill"),
        ("- {what: kill, whom: driver, when: {step: 3}, times: 3}", "times: expected times only beside when.rate"),
        ("- {what: kill, whom: driver, when: {step: 3, seed: 3}}", "when.seed: expected seed only where"),
        ("- {what: kill, whom: driver, when: {step: 3, sent: true}}", "when.sent: expected sent only beside message"),
        ("- {what: disk full, whom: any, when: {step: 3}}", "whom: expected a server with what: disk full"),
        ("- {what: mlflow down, whom: any, when: {step: 3}}", "whom: expected no whom with what: mlflow down"),
        ("- {what: kill, what: stop}", "plan.yaml, line 1: expected plain YAML, found the key 'what' twice"),
        ("- {what: kill", "plan.yaml, line 1: expected plain YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(text: str, says: str) -> None:
    with pytest.raises(BadInput) as error:
        parse(text, "plan.yaml")
    assert says in str(error.value)


@pytest.mark.parametrize("whom", ["worker 3", "server 2", "evaluator"])
def test_whom_a_run_does_not_have(whom: str) -> None:
    with pytest.raises(
        BadInput, match=r"line 1: whom: expected a process of this run \(worker 0 to 2, server 0 to 1, dr"
    ):
        check([one(f"what: kill, whom: {whom}, when: {{step: 1}}")], COUNTS, "plan.yaml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"faults.plan: expected a file that lists faults, found .*No such file"):
        launch(config(tmp_path, faults={"plan": str(tmp_path / "plan.yaml")}), "x", print, task=Ragged())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", sorted((CONFIGS / "faults").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_plans_that_are_shipped(file: Path) -> None:
    assert texts(parse(file.read_text(), file.name))


# Which are due.


def test_equal_faults_are_told_apart() -> None:
    fault = one("what: kill, whom: driver, when: {step: 3}")
    assert texts([fault, fault]) == ["kill driver at step 3", "kill driver at step 3 (2)"]


def test_steps_bring_each_once_and_what_was_delivered_before_not_again() -> None:
    plan = parse(
        "- {what: kill, whom: worker 1, when: {step: 2}}\n- {what: stop, whom: worker 2, when: {step: 4}}", "p"
    )
    coming = Coming(plan, 0, {})
    assert [coming.stepped(step, 0.0) for step in (0, 1, 3, 3, 9)] == [[], [], [0], [], [1]]
    assert Coming(plan, 0, {0: 1}).stepped(9, 0.0) == [1]


def test_chance_is_seeded_and_at_the_rate_that_is_asked_for() -> None:
    def times(text: str, seed: int, done: int = 0) -> list[float]:
        coming, found = Coming([one(text)], seed, {0: done}), []
        assert coming.stepped(0, 10.0) == []
        while coming.next < 1e9:
            at = coming.next
            found += [at] * len(coming.passed(at))
        return found

    text = "what: kill, whom: any, when: {rate: 0.5}, times: 400"
    drawn = times(text, 0)
    assert drawn == times(text, 0) != times(text, 1)
    assert len(drawn) == 400 and drawn[0] > 10.0
    assert 1.7 < (drawn[-1] - 10.0) / 400 < 2.3
    assert len(times(text, 0, done=150)) == 250


def test_the_message_that_brings_it_is_counted_from_its_step_on() -> None:
    plan = [one("what: kill, whom: worker 1, when: {message: GradientArrived, number: 2, step: 5}")]
    assert Own(plan, "worker", 0, {0}).sends("GradientArrived") == ([], [])
    own = Own(plan, "worker", 1, ())
    assert [own.sends("GradientArrived") for _ in range(3)] == [([], [])] * 3
    assert own.inject(0) is None
    sent = [own.sends(kind) for kind in ("GradientArrived", "PullRequested", "GradientArrived", "GradientArrived")]
    assert sent == [([], []), ([], []), ([0], []), ([], [])]


def test_a_full_disk_refuses_so_many_writes() -> None:
    own = Own([one("what: disk full, whom: server 0, when: {step: 5}, times: 2")], "server", 0, ())
    assert own.writes() is None
    own.inject(0)
    assert [own.writes() for _ in range(3)] == [0, 0, None]


def test_each_message_has_its_fate_and_each_process_its_own_chance() -> None:
    drop, delay = "what: drop, whom: any worker, when: {rate: 0.3}", "what: delay, whom: worker 0, when: {step: 1}"
    plan = [one(drop), one(f"{delay}, seconds: 2")]

    def lost(index: int, whose: str) -> list[bool]:
        fates = Fates(plan, "worker", index, {0}, 0, whose)
        return [fates.first("Alive").lost for _ in range(1000)]

    assert lost(0, "a") == lost(0, "a") != lost(0, "b")
    assert 250 < sum(lost(0, "a")) < 350
    assert not Fates.any(plan, "server", 0) and Fates.any(plan, "worker", 2)
    fates = Fates(plan, "worker", 0, {0}, 0, "a")
    fates.inject(1)
    assert fates.first("Alive").late == 2.0
    one_alone = Fates([one("what: drop, whom: any, when: {message: Commit, number: 2}")], "server", 0, {0}, 0, "a")
    assert [one_alone.first(kind).lost for kind in ("Commit", "Loaded", "Commit", "Commit")] == [
        False,
        False,
        True,
        False,
    ]
    assert not one_alone.lost_again("Commit")


# In virtual time.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


def go(
    path: Path,
    plan: str,
    mode: str = "sync",
    resume: str = "never",
    watch: Watch = lambda event: None,
    **more: Any,
) -> Result:
    path.mkdir(exist_ok=True)
    (path / "plan.yaml").write_text(plan)
    given = config(path, mode, faults={"plan": str(path / "plan.yaml")}, **more)
    return launch(given, "x", watch, task=Ragged(), cluster=InProcessCluster(0), resume=resume)


def told(path: Path, kind: str) -> list[str]:
    return [event["message"] for event in events(path) if event["event"] == kind]


KILLS = """
- {what: kill, whom: worker 1, when: {step: 5}}
- {what: kill, whom: server 1, when: {step: 9}}
- {what: kill, whom: evaluator, when: {step: 12}}
- {what: kill, whom: any worker, when: {step: 14}}
- {what: kill, whom: worker 2, when: {message: GradientArrived, number: 3, step: 1}}
- {what: disk full, whom: server 0, when: {step: 14}}
"""
STOPS = """
- {what: stop, whom: worker 1, when: {step: 5}, seconds: 0.01}
- {what: stop, whom: worker 0, when: {step: 7}}
- {what: stop, whom: server 1, when: {step: 9}}
- {what: stop, whom: server 0, when: {step: 12}, seconds: 0.02}
- {what: stop, whom: worker 2, when: {message: GradientArrived, number: 4}, seconds: 0.02}
- {what: stop, whom: driver, when: {step: 14}, seconds: 0.02}
"""
NETWORK = """
- {what: delay, whom: any worker, when: {rate: 0.2}, seconds: 0.01}
- {what: drop, whom: any, when: {rate: 0.1}}
- {what: duplicate, whom: server 0, when: {rate: 0.1}}
- {what: reorder, whom: worker 0, when: {rate: 0.1}}
- {what: drop, whom: server 1, when: {message: WeightsSent, number: 2}}
- {what: drop, whom: driver, when: {rate: 0.1}}
- {what: kill, whom: any, when: {rate: 20}, times: 5}
"""
PLANS = {"kills": KILLS, "stops": STOPS, "network": NETWORK}


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_fault_is_delivered_and_costs_no_bit_and_no_sample(
    tmp_path: Path, plan: str, mode: str, whole: Result
) -> None:
    result = go(tmp_path, PLANS[plan], mode)
    assert right(result, tmp_path, whole, mode)
    count = len(parse(PLANS[plan], "p"))
    assert result.faults == f"{count} of {count} injected"
    said = "; ".join(told(tmp_path, "injected"))
    assert all(text in said for text in texts(parse(PLANS[plan], "p")))
    assert told(tmp_path, "warning")[0] == f"{count} faults of plan.yaml to be injected on purpose"
    assert plan != "kills" or "No space left on device" in told(tmp_path, "warning")[1]
    assert plan != "stops" or sum("silent for 5 s" in text for text in told(tmp_path, "fault")) == 2
    assert (tmp_path / "runs/a/faults.yaml").read_text() == PLANS[plan]


def test_the_same_plan_gives_the_same_run(tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        path = tmp_path / name
        go(path, NETWORK)
        measured = [{k: v for k, v in e.items() if k not in ("result", "metrics")} for e in events(path)]
        journal = (path / "runs/a/faults.jsonl").read_text()
        found.append((measured, journal, (path / "runs/a/ledger.jsonl").read_text()))
    assert found[0] == found[1]
    assert go(tmp_path / "third", NETWORK.replace("0.2}", "0.21}")).faults
    assert (tmp_path / "third/runs/a/faults.jsonl").read_text() != found[0][1]


def test_what_never_came_due_is_told_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = go(
        tmp_path, "- {what: kill, whom: worker 0, when: {step: 2}}\n- {what: kill, whom: driver, when: {step: 999}}"
    )
    assert result.faults == "1 of 2 injected"
    assert told(tmp_path, "warning")[-1] == "plan.yaml, line 2: kill driver at step 999: never came due"
    assert events(tmp_path)[-1]["result"]["faults"] == "1 of 2 injected"


def test_without_a_plan_nothing_is_wrapped(tmp_path: Path) -> None:
    cluster = InProcessCluster(0)
    seen: list[str] = []

    def watch(event: dict[str, Any]) -> None:
        seen.extend(type(process.actor).__name__ for process in cluster._processes.values())

    result = launch(config(tmp_path), "x", watch, task=Ragged(), cluster=cluster)
    assert result.faults is None
    assert set(seen) == {"Server", "Worker", "Evaluator"}


def dies(path: Path, plan: str) -> None:
    go(path, plan, resume="auto")


@pytest.mark.parametrize("when", ["{step: 10}", "{message: TakeSnapshot, number: 2}", "{message: Stop, sent: true}"])
def test_a_driver_is_killed_once_and_the_same_command_goes_on(tmp_path: Path, whole: Result, when: str) -> None:
    plan = f"- {{what: kill, whom: driver, when: {when}}}\n- {{what: kill, whom: worker 0, when: {{step: 5}}}}"
    process = FRESH.Process(target=dies, args=(tmp_path, plan))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    result = go(tmp_path, plan, resume="auto")
    assert "Stop" in when or right(result, tmp_path, whole, "sync")
    assert result.weights_sha256 == whole.weights_sha256
    lines = [json.loads(line)["fault"] for line in (tmp_path / "runs/a/faults.jsonl").read_text().splitlines()]
    assert Counter(lines) == Counter(texts(parse(plan, "p")))


def test_another_plan_may_be_used_when_a_run_goes_on(tmp_path: Path, whole: Result) -> None:
    process = FRESH.Process(target=dies, args=(tmp_path, "- {what: kill, whom: driver, when: {step: 10}}"))
    process.start()
    process.join(60)
    result = go(tmp_path, "- {what: kill, whom: server 0, when: {step: 14}}", resume="auto")
    assert (result.faults, result.weights_sha256) == ("1 of 1 injected", whole.weights_sha256)
    assert len((tmp_path / "runs/a/faults.jsonl").read_text().splitlines()) == 2


def test_mlflow_is_down_for_a_while_and_has_everything_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr("distgd.tracking.writer.RETRY_SECONDS", 0.05)

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    plan = "- {what: mlflow down, when: {step: 0}, seconds: 0.5}\n- {what: mlflow down, when: {step: 9}, seconds: 0.5}"

    def wait_for_the_first_to_be_over(event: dict[str, Any]) -> None:
        while event["event"] == "step" and not (tmp_path / "runs/a/mlflow.json").exists():
            time.sleep(0.01)

    tracking = {"uri": uri, "every": {"steps": 1}}
    result = go(tmp_path, plan, watch=wait_for_the_first_to_be_over, tracking=tracking)
    assert result.faults == "2 of 2 injected"
    assert any("the store is down, as the plan of faults has it" in record.message for record in caplog.records)
    assert result.mlflow_run_id is not None
    client = MlflowClient(uri)
    tags = client.get_run(result.mlflow_run_id).data.tags
    assert (tags["faults"], tags["result.faults"]) == ("injected", "2 of 2 injected")
    history = client.get_metric_history(result.mlflow_run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
@pytest.mark.parametrize("whom", ["server 0", "server 1"])
def test_a_disk_that_is_full_just_when_all_go_back_costs_that_checkpoint_and_not_the_run(
    tmp_path: Path, mode: str, whom: str
) -> None:
    """Its first write after the loss of the other is the one that a new timeline begins with."""
    other = {"server 0": "server 1", "server 1": "server 0"}[whom]
    plan = f"""
- {{what: disk full, whom: {whom}, when: {{step: 6}}}}
- {{what: kill, whom: {other}, when: {{step: 7}}}}
- {{what: kill, whom: {other}, when: {{step: 12}}}}
"""
    whole = run(tmp_path / "whole")
    result = go(tmp_path, plan, mode=mode, checkpoint={"every": {"steps": 1000}})
    assert result.faults == "3 of 3 injected"
    assert right(result, tmp_path, whole, mode)
    assert any(why.startswith("no checkpoint: ") for why in told(tmp_path, "warning"))


# On real processes.


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_on_real_processes(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        """
- {what: kill, whom: worker 1, when: {step: 100}}
- {what: kill, whom: server 0, when: {message: Commit, number: 300, sent: true}}
- {what: stop, whom: worker 0, when: {step: 500}, seconds: 1}
- {what: drop, whom: any, when: {rate: 0.01}}
- {what: delay, whom: driver, when: {step: 300, rate: 0.1}, seconds: 0.05}
- {what: disk full, whom: server 1, when: {step: 200}}
"""
    )
    given: dict[str, Any] = {
        "task": "digits",
        "run": {"name": "run", "storage": str(tmp_path / "runs")},
        "batch": {"size": 128, "slots": 4},
        "stop": {"steps": 1200},
        "optimizer": {"name": "adam", "lr": 0.001},
        "cluster": {"workers": 3, "servers": 2},
        "checkpoint": {"every": {"seconds": 1.0}},
        "tracking": {"uri": "none"},
    }
    result = train(given, f"faults.plan={plan}")
    calm = load({**given, "cluster": {**given["cluster"], "backend": "inprocess"}, "run": {"storage": str(tmp_path)}})
    assert result.faults == "6 of 6 injected"
    assert result.weights_sha256 == train(calm).weights_sha256
