"""Checkpoints in an object store, and a run that goes on from there on another machine.

The store is a folder behind `file://`: the same calls of pyarrow as for any other.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_recovery import Chaos, right
from test_resume import STEPS, Ragged, clean, config, events, interrupted, killed, run, steps, without_pictures

from distgd.audit import audit, read
from distgd.checkpoint import Checkpoints, Objects
from distgd.errors import BadInput, RunFailed
from distgd.export import export
from distgd.inprocess import InProcessCluster
from distgd.replay import replay
from distgd.result import Result
from distgd.trainer import launch

__all__ = ["without_pictures"]
MODES = ["sync", "bounded", "async"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("whole"))


def stored(path: Path, **more: Any) -> dict[str, Any]:
    return {"checkpoint": {"every": {"steps": 3}, "storage": f"file://{path}/store", **more}}


def in_store(path: Path) -> list[str]:
    return Objects(f"file://{path}/store/a").names()


def move(path: Path) -> None:
    """Another machine: nothing is left of the driver's disk."""
    shutil.rmtree(path / "runs")


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_are_in_the_store_alone_and_old_ones_go(tmp_path: Path, whole: Result, mode: str) -> None:
    result = run(tmp_path, mode=mode, **stored(tmp_path))
    assert right(result, tmp_path, whole, mode)
    assert not (tmp_path / "runs/a/checkpoints").exists()
    names = in_store(tmp_path)
    assert len({name.split("/")[1] for name in names if name.startswith("checkpoints/")}) == 2
    assert {"run.json", "config.yaml", "ledger.jsonl", "metrics.jsonl"} <= set(names)


@pytest.mark.parametrize("mode", MODES)
def test_a_driver_that_is_killed_goes_on_on_another_machine(tmp_path: Path, whole: Result, mode: str) -> None:
    killed(tmp_path, 14, mode, **stored(tmp_path))
    move(tmp_path)
    result = run(tmp_path, "auto", mode=mode, **stored(tmp_path), cluster={"workers": 2})
    assert right(result, tmp_path, whole, mode)
    found = audit(read(tmp_path / "runs/a/ledger.jsonl"))
    assert (found.clean, found.rollbacks) == (True, 1)
    if mode != "sync":
        again = replay(tmp_path / "runs/a", task=Ragged())
        assert (again.same, again.weights_sha256) == (True, result.weights_sha256)


def test_what_is_newer_on_this_disk_is_not_replaced(tmp_path: Path, whole: Result) -> None:
    killed(tmp_path, 14, **stored(tmp_path))
    (tmp_path / "runs/a/mine").write_text("kept")
    result = run(tmp_path, "auto", **stored(tmp_path))
    assert right(result, tmp_path, whole, "sync")
    assert (tmp_path / "runs/a/mine").read_text() == "kept"


@pytest.mark.parametrize("mode", MODES)
def test_whoever_is_lost_and_whenever(tmp_path: Path, whole: Result, mode: str) -> None:
    happened = 0
    for seed in range(3):
        path = tmp_path / str(seed)
        cluster = Chaos(seed, 30.0, ("worker", "server"))
        given = config(path, mode, **stored(path))
        result = launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster)
        happened += len(cluster.killed)
        assert right(result, path, whole, mode)
    assert happened > 3


def damage(path: Path) -> None:
    newest = max((path / "store/a/checkpoints").iterdir(), key=lambda folder: int(folder.name[1:].split("-")[0]))
    file = next(newest.glob("shard-1-*"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def test_a_damaged_one_is_passed_over(tmp_path: Path, whole: Result) -> None:
    interrupted(tmp_path, 14, **stored(tmp_path))
    damage(tmp_path)
    move(tmp_path)
    result = run(tmp_path, "auto", **stored(tmp_path))
    assert right(result, tmp_path, whole, "sync")
    (told,) = [event["message"] for event in events(tmp_path) if "damaged" in (event.get("message") or "")]
    assert "shard-1" in told


def test_without_a_look_at_its_bytes_a_shard_still_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the driver's check; what is fetched is compared once more."""
    interrupted(tmp_path, 14, **stored(tmp_path))
    damage(tmp_path)
    monkeypatch.setattr(Checkpoints, "check", lambda *args: None)
    with pytest.raises(RunFailed, match="its bytes are not those that were written"):
        run(tmp_path, "auto", **stored(tmp_path))


def test_a_checkpoint_by_its_uri(tmp_path: Path, whole: Result) -> None:
    run(tmp_path, **stored(tmp_path, keep=100))
    uri = f"file://{tmp_path}/store/a/checkpoints/v9-t1"
    result = run(tmp_path, uri, **stored(tmp_path, keep=100))
    assert (result.weights_sha256, result.steps, clean(tmp_path)) == (whole.weights_sha256, STEPS, True)
    with pytest.raises(
        BadInput, match=r"--resume: expected auto, or a checkpoint under checkpoint.storage, found file"
    ):
        run(tmp_path, "file:///elsewhere/a/checkpoints/v9-t1", **stored(tmp_path))


def test_export_reads_it(tmp_path: Path) -> None:
    interrupted(tmp_path, 14, **stored(tmp_path))
    config_file = tmp_path / "runs/a/config.yaml"
    config_file.write_text(config_file.read_text().replace("given:object", "test_resume:Ragged"))
    assert export(tmp_path / "runs/a", tmp_path / "out.safetensors") == "of step 14, by checkpoint v14-t1"


@pytest.mark.parametrize("timeline", [1, 2])
def test_a_driver_that_has_been_followed_by_another_ends(tmp_path: Path, timeline: int) -> None:
    def follow(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 10:
            (tmp_path / "store/a/run.json").write_text(json.dumps({"run": "x", "timeline": timeline, "driver": "b"}))

    with pytest.raises(RunFailed, match=f"expected this driver's timeline 1, found timeline {timeline} of another one"):
        run(tmp_path, watch=follow, **stored(tmp_path))
    assert max(steps(tmp_path)) < STEPS


def test_two_drivers_that_reach_one_timeline_are_told_apart(tmp_path: Path) -> None:
    """One goes back in the moment in which another one goes on from the store."""

    class Followed(Chaos):
        def _strike(self) -> None:
            (tmp_path / "store/a/run.json").write_text(json.dumps({"run": "x", "timeline": 2, "driver": "b"}))
            super()._strike()

    given = config(tmp_path, **stored(tmp_path))
    with pytest.raises(RunFailed, match="expected this driver's timeline 2, found timeline 2 of another one"):
        launch(given, "x", lambda event: None, task=Ragged(), cluster=Followed(1, 60.0, ("server",), most=1))
    assert not [name for name in in_store(tmp_path) if "-t2" in name], "nothing of its second timeline is written"


def test_a_run_of_that_name_is_not_begun_again(tmp_path: Path) -> None:
    run(tmp_path, **stored(tmp_path))
    move(tmp_path)
    with pytest.raises(BadInput, match=r"run.name: expected a new run, found 'file://.*/store/a'; choose another"):
        run(tmp_path, **stored(tmp_path))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nowhere://bucket/x", "expected an object store, found nowhere://bucket/x"),
        ("s3:/bucket", "expected a URI, such as s3://bucket/folder, found 's3:/bucket'"),
        ("/a/folder", "expected a URI, such as s3://bucket/folder, found '/a/folder'"),
    ],
)
def test_what_is_no_store_is_bad_input(tmp_path: Path, uri: str, said: str) -> None:
    with pytest.raises(BadInput, match=f"checkpoint.storage: {said}"):
        run(tmp_path, checkpoint={"every": {"steps": 3}, "storage": uri})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("call", ["names", "read"])
def test_a_store_that_cannot_be_asked_costs_checkpoints_and_not_the_run(
    tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    asked, out = getattr(Objects, call), []

    def ask(self: Objects, *args: Any) -> Any:
        if out and len(out) < 4:
            out.append(0)
            raise OSError("When listing: timed out")
        return asked(self, *args)

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5 and not out:
            out.append(0)

    monkeypatch.setattr(Objects, call, ask)
    result = run(tmp_path, watch=watch, **stored(tmp_path))
    assert len(out) == 4
    assert right(result, tmp_path, whole, "sync")
    assert [event for event in events(tmp_path) if "timed out" in (event.get("message") or "")]


def test_an_outage_costs_checkpoints_and_not_the_run(
    tmp_path: Path, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failed = Objects.put, []

    def out(self: Objects, path: Path, name: str) -> None:
        if "v6-" in name or "v9-" in name:
            failed.append(name)
            raise OSError("When writing: timed out")
        put(self, path, name)

    monkeypatch.setattr(Objects, "put", out)
    result = launch(
        config(tmp_path, **stored(tmp_path)), "x", lambda event: None, task=Ragged(), cluster=InProcessCluster(0)
    )
    assert failed
    assert right(result, tmp_path, whole, "sync")
    assert [event for event in events(tmp_path) if "timed out" in (event.get("message") or "")]
