"""Real Ray: the same promises with real processes, sockets and deaths. One cluster serves all of these tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from simulate import OddTask, simulate

from distgd import Stop, train
from distgd import events as ev
from distgd.audit import audit, read
from distgd.cluster import RayCluster
from distgd.config import load
from distgd.errors import BadInput, DeadlineExceeded, Diverged, RunFailed
from distgd.process import SILENT
from distgd.resources import Resources
from distgd.standby import Standbys
from distgd.trainer import launch

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster that the process is connected to: runs use it and leave it up."""
    import ray

    folder = tmp_path_factory.mktemp("r")
    before = os.environ.get("RAY_AUTH_TOKEN")
    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)  # Ray remembers the one of an earlier run in this process
    ray.init(address="local", num_cpus=12, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder))
    yield
    assert ray.is_initialized(), "a run must leave a cluster up that it did not start"
    ray.shutdown()
    if before is None:
        del os.environ["RAY_AUTH_TOKEN"]


def sections(tmp_path: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"run": {"storage": str(tmp_path)}, "tracking": {"uri": "none"}, "stop": {"steps": 5}}
    for name, section in more.items():
        given[name] = {**given.get(name, {}), **section}
    return given


@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 3), (3, 2), (4, 1), (1, 3), (4, 2)])
def test_the_bits_on_ray_are_those_in_process(ray_cluster: None, tmp_path: Path, workers: int, servers: int) -> None:
    how: dict[str, Any] = {
        "batch": {"size": 32, "slots": 5},
        "optimizer": {"name": "adam", "lr": 0.01, "clip": {"norm": 0.7}},
        "stop": {"steps": 6},
    }
    task = OddTask(samples=106)
    result = train(sections(tmp_path, cluster={"workers": workers, "servers": servers}, **how), task=task)
    assert result.bits == "promised"
    assert result.weights_sha256 == simulate(task, cluster={"workers": 2, "servers": 2}, **how).sha256


@pytest.mark.parametrize(
    "consistency", [{"mode": "sync"}, {"mode": "bounded", "staleness": 2}, {"mode": "async"}], ids=lambda c: c["mode"]
)
def test_counting_every_sample_once_an_epoch(ray_cluster: None, tmp_path: Path, consistency: dict[str, Any]) -> None:
    updates = {"sync": 16, "bounded": 4, "async": 4}[consistency["mode"]]
    result = train(
        sections(
            tmp_path,
            task={"name": "counting", "args": {"samples": 128}},
            batch={"size": 16, "slots": 4},
            stop={"epochs": 3, "steps": 10**6},
            optimizer={"name": "sgd", "lr": float(updates)},
            cluster={"workers": 3, "servers": 2},
            consistency=consistency,
        )
    )
    (counts,) = result.state_dict.values()
    assert torch.equal(counts, torch.full((128,), 3.0))
    assert result.samples == 3 * 128
    assert result.versions == (24 if consistency["mode"] == "sync" else 96)


def test_under_quorum_the_zeros_are_the_dropped_samples(ray_cluster: None, tmp_path: Path) -> None:
    result = train(
        sections(
            tmp_path,
            task={"name": "counting", "args": {"samples": 256}},
            batch={"size": 16, "slots": 4},
            stop={"epochs": 1, "steps": 10**6},
            optimizer={"name": "sgd", "lr": 8.0},
            cluster={"workers": 4},
            consistency={"quorum": 2},
        )
    )
    lines = [json.loads(line) for line in (Path(result.run_dir) / "ledger.jsonl").read_text().splitlines()]
    dropped = sum(line["last"] - line["first"] + 1 for line in lines if line["state"] == "dropped")
    (counts,) = result.state_dict.values()
    assert int((counts == 0).sum()) == dropped == result.dropped_samples > 0
    assert result.bits == "not promised"


class Unlucky(OddTask):
    """The loss of one sample is not a number."""

    def loss(self, model: Any, batch: Any) -> Any:
        x, y = batch
        return super().loss(model, (x, torch.where(x[:, :1] == self.poison, torch.nan, y)))

    @property
    def poison(self) -> torch.Tensor:
        return self.train_data()[0][7, 0]


def test_a_loss_that_is_not_finite_names_step_and_slot(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step \d+, slot \d+: expected a finite loss") as caught:
        train(sections(tmp_path, batch={"size": 32, "slots": 4}, stop={"epochs": 1}), task=Unlucky(106))
    assert caught.value.result.status == "diverged"
    assert caught.value.result.weights_sha256 is None


class Broken(OddTask):
    """Fails in a worker, not on the driver, which tries step 0 only."""

    def loss(self, model: Any, batch: Any) -> Any:
        if model.training and float(model.p3.detach().abs().sum()) != self.start(model):
            raise ZeroDivisionError("the user's own")
        return super().loss(model, batch)

    def start(self, model: Any) -> float:
        torch.manual_seed(0)
        return float(self.model().p3.detach().abs().sum())


def test_an_error_in_the_users_code_comes_back_with_its_frames_only(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(
        RunFailed, match=r"(?s)worker \d: ZeroDivisionError: the user's own.*test_cluster\.py"
    ) as caught:
        train(sections(tmp_path), task=Broken(106))
    assert "distgd/worker/" not in str(caught.value)


def test_a_killed_worker_costs_its_recomputation_only(ray_cluster: None, tmp_path: Path) -> None:
    """Killed in mid-run by signal: the survivors take its slots and the bits stay."""
    how: dict[str, Any] = {"batch": {"size": 32, "slots": 4}, "stop": {"steps": 400}, "optimizer": {"lr": 0.01}}
    killed: list[int] = []

    def kill_one(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] >= 50 and not killed:
            mine = psutil.Process().children(recursive=True)
            workers = [process.pid for process in mine if "ray::Worker.run" in process.cmdline()]
            killed.append(max(workers))
            os.kill(killed[0], signal.SIGKILL)

    task = OddTask(samples=112)
    config = load({**sections(tmp_path, cluster={"workers": 3, "servers": 2}, **how), "task": {"path": "a:b"}})
    result = launch(config, "kill", kill_one, task=task)
    events = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert killed
    assert [event["message"] for event in events if event["event"] == "fault"]
    assert result.weights_sha256 == simulate(task, cluster={"workers": 2}, **how).sha256


@pytest.mark.parametrize(("role", "number"), [("Server", signal.SIGKILL), ("Worker", signal.SIGSTOP)])
def test_a_shard_that_is_killed_and_a_worker_that_is_stopped_cost_no_bit(
    ray_cluster: None, tmp_path: Path, role: str, number: signal.Signals
) -> None:
    """A shard's loss goes back to the last checkpoint; a process that only stands still is found and replaced."""
    how: dict[str, Any] = {
        "batch": {"size": 32, "slots": 4},
        "stop": {"steps": 10**5 if number == signal.SIGSTOP else 400},
        "optimizer": {"name": "adam", "lr": 0.001},
    }
    hit: list[int] = []
    said: list[str] = []

    def strike(event: dict[str, Any]) -> Stop | None:
        if event["event"] == "step" and event["step"] >= 50 and not hit:
            mine = psutil.Process().children(recursive=True)
            hit.append(max(process.pid for process in mine if f"ray::{role}.run" in process.cmdline()))
            os.kill(hit[0], number)
        if event["event"] in ("fault", "joined"):
            said.append(event["message"])
        return Stop("seen") if number == signal.SIGSTOP and len(said) == 2 else None

    task = OddTask(samples=112)
    more = {"cluster": {"workers": 2, "servers": 2}, "checkpoint": {"every": {"steps": 30}}}
    config = load({**sections(tmp_path, **more, **how), "task": {"path": "a:b"}})
    result = launch(config, "strike", strike, task=task)
    how["stop"] = {"steps": result.steps}
    assert result.weights_sha256 == simulate(task, cluster={"workers": 2}, **how).sha256
    if number == signal.SIGSTOP:
        assert "silent for 5 s" in said[0]
        assert said[1] == said[0].partition(" is gone")[0] + " is there again"
        wait_until(lambda: not psutil.pid_exists(hit[0]), 10)
    else:
        assert "shard" in said[0]
        found = audit(read(Path(result.run_dir) / "ledger.jsonl"))
        assert (found.clean, found.rollbacks, found.steps) == (True, 1, 400)


def processes_named(*names: str) -> list[int]:
    """Of Ray's processes below this one, those that call themselves one of these."""
    found: list[int] = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] if (process.cmdline() or [""])[0] in [f"ray::{name}" for name in names] else []
    return found


@pytest.mark.timeout(480)  # three processes import torch, one after the other, beside a run
def test_a_standby_takes_over_from_two_shards_and_ray_counts_as_before(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that waited is the one that replaces, under the name of its role; another waits after that."""
    import ray

    how: dict[str, Any] = {"batch": {"size": 32, "slots": 4}, "optimizer": {"name": "adam", "lr": 0.001}}
    waiting: list[int] = []
    killed: list[int] = []
    free: list[float] = []
    before = ray.available_resources().get("CPU", 0.0)

    def strike(event: dict[str, Any]) -> Stop | None:
        if event["event"] != "step" or event["step"] % 20:
            return None
        idle = processes_named("Standby")  # and at work on nothing
        servers = processes_named("Server.run")
        ready = [pid for pid in idle if pid not in waiting] if any(taken_care_of(standbys)) else []
        if len(waiting) == len(killed) and ready:
            free.append(ray.available_resources().get("CPU", 0.0))
            assert killed == [] or waiting[-1] in servers, "it is a server now"
            if len(killed) == 2:
                return Stop("seen")
            waiting.append(ready[0])
            killed.append(max(servers))
            os.kill(killed[-1], signal.SIGKILL)
        return None

    def taken_care_of(standbys: list[Standbys]) -> Iterator[bool]:  # the driver knows of them that they are ready
        return (standby.ready for kept in standbys for standby in kept._idle.values())

    class Kept(Standbys):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            standbys.append(self)

    standbys: list[Standbys] = []
    monkeypatch.setattr("distgd.cluster.Standbys", Kept)
    task = OddTask(samples=112)
    more = {"cluster": {"workers": 2, "servers": 2}, "checkpoint": {"every": {"steps": 30}}, "stop": {"steps": 10**5}}
    config = load({**sections(tmp_path, **more, **how), "task": {"path": "a:b"}})
    result = launch(config, "strike", strike, task=task)
    assert len(killed) == 2
    assert free[0] == free[1] == free[2] == before - 4, "each process is counted once, whoever began as what"
    assert audit(read(Path(result.run_dir) / "ledger.jsonl")).clean
    wait_until(lambda: not processes_named("Standby", "Standby.prepare", "Standby.__init__"), 10)
    wait_until(lambda: ray.available_resources().get("CPU", 0.0) == before, 10)


def test_an_address_without_a_cluster_is_bad_input_at_once(tmp_path: Path) -> None:
    config = {**sections(tmp_path, cluster={"address": "127.0.0.1:1"}), "task": "digits"}
    file = tmp_path / "nowhere.yaml"
    file.write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "distgd", "train", str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "cluster.address: expected a running Ray cluster" in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "no run folder is left"


def test_what_cannot_be_placed_is_an_error_that_says_what_there_is(ray_cluster: None) -> None:
    cluster = RayCluster(None, {"worker": Resources(500.0, 0.0)}, start_seconds=1.0, max_bytes=1 << 20)
    plan = simulate_plan()
    try:
        with pytest.raises(DeadlineExceeded, match=r"(?s)1 worker to start; each asks for: worker 500 CPU.*12 CPU"):
            cluster.spawn({9: plan})
    finally:
        cluster.close()


def simulate_plan() -> Any:
    from simulate import config

    from distgd.prepare import prepare

    plan = prepare(config(OddTask(106)), OddTask(106))
    return plan.specs(plan.cast())[2]


def left_of(mark: str, folder: Path) -> set[str]:
    """Processes that carry the run's mark in their environment, and files in its temporary folder."""
    processes = set()
    for process in psutil.process_iter(["cmdline"]):
        try:
            if mark in process.environ().values():
                processes.add(f"{process.pid} {' '.join(process.info['cmdline'] or [])[:60]}")
        except psutil.Error:
            continue
    return processes | {str(path) for path in folder.glob("distgd-*")}


@pytest.mark.parametrize("end", ["success", "divergence", "interrupt", "terminate", "early"])
def test_nothing_is_left_behind(tmp_path: Path, end: str) -> None:
    more = {
        "success": ["stop.epochs=1"],
        "divergence": ["optimizer.name=sgd", "optimizer.lr=1e30"],
        "interrupt": ["stop.epochs=10000"],
        "terminate": ["stop.epochs=10000"],
        "early": ["stop.epochs=10000"],
    }[end]
    mark, folder = f"mark-{os.getpid()}-{end}", Path(tempfile.mkdtemp(prefix="d", dir="/tmp"))  # short, for sockets
    shared = set(Path("/dev/shm").iterdir())
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "distgd",
            "train",
            str(CONFIGS / "quickstart.yaml"),
            "--json",
            "tracking.uri=none",
            *more,
        ],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(folder), "DISTGD_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if end in ("interrupt", "terminate"):
        wait_until(lambda: any(path.stat().st_size for path in (tmp_path / "runs").glob("*/metrics.jsonl")), 90)
        if end == "interrupt":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
    if end == "early":  # while Ray starts
        wait_until(lambda: any(folder.glob("distgd-*/session_2*/logs/*")), 60)
        os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    code, status = {
        "success": (0, "completed"),
        "divergence": (3, "diverged"),
        "terminate": (75, "preempted"),
    }.get(end, (130, "interrupted"))
    assert process.returncode == code, stderr
    assert json.loads(stdout.splitlines()[-1])["status"] == status
    wait_until(lambda: not left_of(mark, folder), 10)
    assert {path for path in Path("/dev/shm").iterdir() if "distgd" in path.name} <= shared
    shutil.rmtree(folder)  # what torch keeps there


def test_a_driver_that_is_killed_leaves_nothing_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The same bits, though it was killed in the middle."""
    mark, folder = f"mark-{os.getpid()}-kill", Path(tempfile.mkdtemp(prefix="d", dir="/tmp"))
    command = [sys.executable, "-m", "distgd", "train", str(CONFIGS / "quickstart.yaml"), "--resume", "auto", "--json"]
    more = ["tracking.uri=none", "checkpoint.every.steps=20", "stop.epochs=8", "run.name=killed"]
    environment = {**os.environ, "TMPDIR": str(folder), "DISTGD_TEST_MARK": mark}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *more], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    first = start()
    wait_until(lambda: (tmp_path / "runs/killed/checkpoints/v20-t1/manifest.json").exists(), 90)
    first.kill()
    first.communicate()
    wait_until(lambda: not left_of(mark, folder), 10)
    result = json.loads(start().communicate(timeout=120)[0].splitlines()[-1])
    assert result["status"] == "completed"
    more[-1] = "run.name=whole"
    whole = json.loads(start().communicate(timeout=120)[0].splitlines()[-1])
    assert result["weights_sha256"] == whole["weights_sha256"]
    assert result["samples"] == whole["samples"]
    shutil.rmtree(folder)


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not so after {seconds} s"
        time.sleep(0.1)


class Stuck(OddTask):
    """Never comes back from the second step."""

    def loss(self, model: Any, batch: Any) -> Any:
        if model.training and not torch.equal(model.norm.running_mean, torch.zeros(7)):
            time.sleep(1000)
        return super().loss(model, batch)


def test_a_deadline_names_who_was_waited_for_and_in_which_phase(ray_cluster: None, tmp_path: Path) -> None:
    how = {"batch": {"size": 32, "slots": 2}, "cluster": {"deadline": 2.0, "servers": 2}}
    with pytest.raises(DeadlineExceeded) as caught:
        train(sections(tmp_path, **how), task=Stuck(112))
    assert "train: waited 2 s for step 1 to be committed" in str(caught.value)
    assert "worker 0: does not answer" in str(caught.value)
    assert "shard 0: at version 1, waits for slots [0, 1]" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"gpus": 1.0}, "cluster.gpus: expected at most the 0 GPUs of this machine in all, found 2.0"),
        ({"server_device": "cuda", "server_gpus": 0.5}, "at most the 0 GPUs of this machine in all, found 0.5"),
        ({"device": "cuda"}, "cluster.device: expected a CUDA GPU for every worker, found 'none on"),
    ],
)
def test_a_gpu_that_is_not_there_is_bad_input(tmp_path: Path, cluster: dict[str, Any], words: str) -> None:
    config = {**sections(tmp_path, cluster=cluster), "task": "digits"}
    file = tmp_path / "gpu.yaml"
    file.write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "distgd", "train", str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


class SlowToScore(OddTask):
    """The evaluation of the whole set takes longer than the deadline; the trial of a few samples does not."""

    def loss(self, model: Any, batch: Any) -> Any:
        if not model.training and len(batch[0]) > 20:
            time.sleep(6)
        return super().loss(model, batch)

    def eval_data(self) -> Any:
        return self.train_data()


def test_a_deadline_in_the_last_evaluation_keeps_the_weights(ray_cluster: None, tmp_path: Path) -> None:
    how = {"batch": {"size": 32, "slots": 4}, "cluster": {"deadline": 2.0}}
    with pytest.raises(
        DeadlineExceeded, match="evaluate: waited 2 s for the last version to be sent and eval"
    ) as caught:
        train(sections(tmp_path, **how), task=SlowToScore(112))
    assert caught.value.result.weights_sha256 == simulate(OddTask(112), stop={"steps": 5}, batch=how["batch"]).sha256


def test_an_object_that_cannot_be_sent_is_bad_input(ray_cluster: None, tmp_path: Path) -> None:
    task = OddTask(64)
    task.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="expected an object that can be sent to processes"):
        train(sections(tmp_path), task=task)


TWICE = """
import ray, torch, distgd
if {before}:
    ray.init(include_dashboard=False, log_to_driver=False)
    ray.shutdown()
config = {{"task": {{"name": "counting", "args": {{"samples": 16}}}}, "batch": {{"size": 4, "slots": 2}}}}
config |= {{"stop": {{"epochs": 1}}, "tracking": {{"uri": "none"}}, "cluster": {{"workers": 1}}}}
print(len({{distgd.train(config, "optimizer.lr=4.0").weights_sha256 for _ in range(2)}}), ray.is_initialized())
"""


@pytest.mark.parametrize("before", [False, True], ids=["alone", "after Ray was used"])
def test_two_runs_in_one_process_each_with_a_cluster_of_its_own(tmp_path: Path, before: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE.format(before=before)], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "False"]


def test_a_cluster_by_address_is_used_and_left_up(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="a", dir="/tmp"))
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=4", "--include-dashboard=false"]
    head = subprocess.Popen(
        [sys.executable, *command, f"--port={port}", f"--temp-dir={folder}", "--block"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: listens(port), 60)
        more = ["--json", "tracking.uri=none", "stop.epochs=1", f"cluster.address=127.0.0.1:{port}"]
        done = subprocess.run(
            [sys.executable, "-m", "distgd", "train", str(CONFIGS / "quickstart.yaml"), *more],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["steps"] == 45
        assert head.poll() is None
        assert listens(port), "the cluster is somebody else's and stays up"
    finally:
        started = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(timeout=60)
        for process in psutil.wait_procs(started, timeout=10)[1]:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("consistency", [{"mode": "sync"}, {"mode": "async"}], ids=lambda c: c["mode"])
@pytest.mark.parametrize(
    "cluster",
    [["gpus=0.5"], ["gpus=0.25", "server_device=cuda", "server_gpus=0.25"], ["server_device=cuda", "server_gpus=0.5"]],
    ids=["workers", "all", "servers"],
)
def test_a_model_on_a_gpu_learns(tmp_path: Path, consistency: dict[str, Any], cluster: list[str]) -> None:
    result = train(
        CONFIGS / "quickstart.yaml",
        f"run.storage={tmp_path}",
        "tracking.uri=none",
        *(f"cluster.{key}" for key in cluster),
        f"consistency.mode={consistency['mode']}",
    )
    assert result.metrics["eval/accuracy"] >= 0.94
    assert result.bits == "not promised"


def test_who_is_gone_is_told_though_others_never_cease_to_send() -> None:
    """In async mode messages of those that live come without a pause."""

    class Busy:
        def receive(self, timeout: float) -> tuple[int, Any]:
            time.sleep(0.001)
            return 2, "again"

    cluster = RayCluster(None, {}, 10.0, 1)
    cluster._endpoint, cluster._private, cluster._heard = Busy(), Path(), {1: 0.0}  # type: ignore[assignment]
    until = time.monotonic() + 10.0
    while (arrived := cluster.receive(1.0)) == (2, "again"):
        assert time.monotonic() < until, "starved"
    assert arrived == (1, ev.ProcessLost(1, SILENT))
