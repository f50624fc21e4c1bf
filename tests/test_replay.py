"""A run made again from its records has its bits, whoever was lost; a record that was changed is found out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_recovery import Chaos
from test_resume import STEPS, Ragged, config, interrupted, killed, run, without_pictures

from distgd import events as ev
from distgd import inprocess
from distgd.cli import main
from distgd.errors import BadInput
from distgd.inprocess import InProcessCluster
from distgd.recording import Recording, checks, row
from distgd.replay import Replayed, replay
from distgd.trainer import launch

__all__ = ["without_pictures"]

SLOTS = 5 * STEPS  # each of them once, where nobody is lost
LEASED = ["bounded", "async"]


def again(path: Path) -> Replayed:
    return replay(path / "runs/a", Ragged())


def chaotic(path: Path, mode: str, seed: int, *roles: str, **more: Any) -> Chaos:
    cluster = Chaos(seed, (30.0, 60.0, 100.0)[seed % 3], roles, most=20)
    given = {"cluster": {"workers": 5, "servers": 3}, "checkpoint": {"every": {"steps": (1, 2, 5)[seed % 3]}}, **more}
    launch(config(path, mode, **given), "x", lambda event: None, task=Ragged(), cluster=cluster)
    return cluster


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"consistency": {"scale_lr": True}},
        {"optimizer": {"name": "sgd", "momentum": 0.9, "clip": {"norm": 0.5}}},
        {"checkpoint": {"every": None}, "cluster": {"servers": 1}},
    ],
    ids=["adam", "scale_lr", "momentum, clipped", "no checkpoints, one shard"],
)
@pytest.mark.parametrize("mode", ["sync", *LEASED])
def test_the_bits_of_a_run_in_which_nobody_is_lost(tmp_path: Path, mode: str, more: dict[str, Any]) -> None:
    if mode == "sync" and "consistency" in more:
        pytest.skip("the learning rate is scaled by staleness, and there is none")
    if "consistency" in more:
        more = {**more, "consistency": {**more["consistency"], "mode": mode}}
    result = run(tmp_path, mode=mode, **more)
    found = again(tmp_path)
    assert found.same
    assert found.weights_sha256 == result.weights_sha256
    assert found.gradients == SLOTS


@pytest.mark.parametrize("mode", ["sync", *LEASED])
def test_whoever_is_lost_and_whenever(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inprocess, "LATENCY", (50e-6, 2e-3))  # so that workers are lost between two pushes
    lost, gradients, timelines = 0, [], []
    for seed in range(8):
        path = tmp_path / str(seed)
        lost += len(chaotic(path, mode, seed, *(("worker",), ("worker", "server"))[seed % 2]).killed)
        found = again(path)
        assert found.same, found.differs
        gradients.append(found.gradients)
        timelines.append(found.timelines)
    assert lost >= 20
    if mode != "sync":
        assert max(gradients) > SLOTS, "a slot was computed twice, and shards applied one and the other"
        assert max(timelines) > 1


@pytest.mark.parametrize("mode", LEASED)
def test_a_run_that_was_stopped_and_killed_goes_on_with_other_servers(tmp_path: Path, mode: str) -> None:
    killed(tmp_path, 9, mode)
    interrupted(tmp_path, 14, mode=mode)
    interrupted(tmp_path, 19, mode=mode, cluster={"servers": 3, "workers": 2})
    run(tmp_path, "auto", mode=mode, cluster={"servers": 1})
    found = again(tmp_path)
    assert found.same, found.differs
    assert found.timelines == 4


def test_back_to_an_earlier_checkpoint(tmp_path: Path) -> None:
    """What lies beyond it is void, in every timeline in between."""
    interrupted(tmp_path, 6, mode="async")
    early = next((tmp_path / "runs/a/checkpoints").glob("v*-t1"))
    shutil.copytree(early, tmp_path / early.name)
    run(tmp_path, "auto", mode="async", stop={"steps": 12})
    shutil.copytree(tmp_path / early.name, early, dirs_exist_ok=True)
    run(tmp_path, str(early), mode="async")
    found = again(tmp_path)
    assert found.same, found.differs
    assert found.timelines == 2, "the first one and the last"


class Late(InProcessCluster):
    """Shard 0 is told of a checkpoint long after shard 1, which goes on meanwhile; then it is lost."""

    def __init__(self) -> None:
        super().__init__(0)
        self.lost = False

    def _sent(self, envelope: Any) -> None:
        message = envelope.message
        if isinstance(message, ev.TakeSnapshot) and envelope.destination == 1 and message.number == -2:
            self._last_delivery[envelope.source, 1] = self._now + 0.02
        super()._sent(envelope)

    def tell(self, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["version"] > 40 and not self.lost:
            self.lost = True
            self._at(self._now + 1e-4, lambda: self._die(1))


def late(path: Path) -> None:
    cluster = Late()
    launch(config(path, "async"), "x", cluster.tell, task=Ragged(), cluster=cluster)
    assert cluster.lost


def test_a_checkpoint_whose_parts_are_of_different_moments(tmp_path: Path) -> None:
    """A shard's part holds gradients from versions of another shard that are not in that one's part."""
    late(tmp_path)
    found = again(tmp_path)
    assert found.same, found.differs
    assert found.timelines == 2
    assert found.updates > 2 * SLOTS, "shard 1 was taken beyond its part, as it had been read there"


def test_records_that_are_not_waited_for_would_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: shards tell what they have when they write their file, and nobody asks once all are written."""
    from distgd import driver, shard

    stored = shard.Shard._take_due

    def telling(self: shard.Shard) -> Any:
        due = any(number < 0 and at <= self.version for number, at in self._snapshots.due.items())
        record = self._told() if due else []
        sent, files = stored(self)
        return [*record, *sent], files

    def unasked(self: driver.Driver, part: ev.ShardWritten, now: float) -> Any:
        whole = self.saving.written(part, self.progress)
        return [] if whole is None else [driver.Save(whole)]

    monkeypatch.setattr(shard.Shard, "_take_due", telling)
    monkeypatch.setattr(driver.Driver, "_written", unasked)
    late(tmp_path)
    with pytest.raises(BadInput, match="shard 1's updates up to version"):
        again(tmp_path)


def test_buffers_of_another_version_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a replay that takes the newest buffers for those that a lease read."""
    from distgd.replay import leased

    run(tmp_path, mode="async", cluster={"workers": 12})
    assert again(tmp_path).same
    read = leased.Part.read
    monkeypatch.setattr(leased.Part, "read", lambda self, version: (read(self, version)[0], self.buffers))
    assert "the last weights" in str(again(tmp_path).differs), (
        "where training starts from shows in running values alone"
    )


def test_one_version_for_all_shards_would_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the vector of versions: each shard records its own alone."""
    add = Recording.add

    def narrow(self: Recording, version: int, source: int, push: Any, *rest: Any, applied: bool) -> None:
        from dataclasses import replace

        versions = (push.versions[0],) * len(push.versions)
        add(self, version, source, replace(push, versions=versions), *rest, applied=applied)

    monkeypatch.setattr(Recording, "add", narrow)
    chaotic(tmp_path, "async", 1, "worker")
    try:
        assert not again(tmp_path).same
    except BadInput as error:
        assert "updates of timeline" in str(error)  # noqa: PT017 - either will do


def changed(path: Path, change: Callable[[Any], None], *, sealed: bool = True, shard: int = 1) -> None:
    """Change the rows of a shard; `sealed` if their checks are made to fit."""
    file = path / f"runs/a/updates/t1-shard-{shard}.rows"
    rows = np.frombuffer(file.read_bytes(), row(2)).copy()
    change(rows)
    if sealed:
        rows["check"] = checks(rows)
    file.write_bytes(rows.tobytes())


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaled")
    run(path, mode="async", consistency={"mode": "async", "scale_lr": True})
    return path


@pytest.fixture
def copy(scaled: Path, tmp_path: Path) -> Path:
    shutil.copytree(scaled / "runs/a", tmp_path / "runs/a")
    return tmp_path


@pytest.mark.parametrize("name", ["version", "step", "slot", "staleness", "applied", "scale", "square", "reads"])
@pytest.mark.parametrize("both", [False, True], ids=["one shard's record", "every shard's record"])
def test_a_row_that_was_changed_is_found_out(copy: Path, name: str, both: bool) -> None:
    """Also where it was changed in the records of all shards alike; a lease's number is a name, and decides nothing."""

    def change(rows: Any) -> None:
        place = next(i for i in range(50, 99) if rows["staleness"][i] > 1 and rows["slot"][i] < 4)
        if name == "reads":
            rows[name][place][0] -= 1
        elif name == "applied":
            rows[name][place] = 0
        else:
            rows[name][place] += 1

    for shard in (0, 1)[not both :]:
        changed(copy, change, shard=shard)
    try:
        found = again(copy)
        assert not found.same
        assert found.as_dict()["status"] == "failed"
    except BadInput as error:
        assert "updates of timeline 1" in str(error)  # noqa: PT017 - either will do


def test_the_first_thing_that_differs_is_named(copy: Path) -> None:
    def change(rows: Any) -> None:
        rows["square"][rows["lease"] == 61] *= 1 + 1e-15

    for shard in (0, 1):
        changed(copy, change, shard=shard)
    found = again(copy)
    assert str(found.differs).startswith("timeline 1, shard ")
    assert "squared gradient norm" in str(found.differs)


def test_a_bit_that_fell_over_is_damage(copy: Path) -> None:
    def change(rows: Any) -> None:
        rows["staleness"][7] ^= 1

    changed(copy, change, sealed=False)
    with pytest.raises(BadInput, match=r"t1-shard-1\.rows.*a damaged row 7"):
        again(copy)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "t1.json").unlink(), "checkpoint.record=true"),
        (lambda folder: (folder / "t1.json").write_text("{}"), "where a timeline began"),
        (lambda folder: (folder / "t1-shard-1.rows").unlink(), "a shard's record"),
        (lambda folder: (folder / "t1-shard-1.rows").write_bytes(b""), "shard 1's updates up to version 120"),
        (lambda folder: os.truncate(folder / "t1-shard-0.rows", 100 * row(2).itemsize + 9), "found up to 100"),
    ],
    ids=["no timeline", "empty timeline", "no shard", "empty shard", "cut off"],
)
def test_what_is_missing_is_named(copy: Path, harm: Callable[[Path], Any], said: str) -> None:
    harm(copy / "runs/a/updates")
    with pytest.raises(BadInput, match=said.replace(".", r"\.")):
        again(copy)


def test_a_message_that_came_twice_makes_no_difference(copy: Path) -> None:
    file = copy / "runs/a/updates/t1-shard-0.rows"
    data = file.read_bytes()
    file.write_bytes(data + data[: 40 * row(2).itemsize] + b"cut off")
    assert again(copy).same


def test_without_a_record_there_is_no_replay(tmp_path: Path) -> None:
    run(tmp_path, mode="async", checkpoint={"record": False})
    assert not (tmp_path / "runs/a/updates").exists()
    with pytest.raises(BadInput, match="a record of every update, found none"):
        again(tmp_path)


@pytest.mark.parametrize("mode", ["sync", *LEASED])
def test_a_run_that_was_cut_off_is_compared_with_its_newest_checkpoint(tmp_path: Path, mode: str) -> None:
    killed(tmp_path, 14, mode)
    found = again(tmp_path)
    assert found.same, found.differs
    assert found.compared.startswith("checkpoint v")
    assert found.weights_sha256 is None


def test_a_checkpoint_of_other_weights_is_not_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distgd.replay import leased

    interrupted(tmp_path, 9, mode="async")
    step = leased.Part.step
    monkeypatch.setattr(leased.Part, "step", lambda self, mean, scale: step(self, mean, scale * (1 + 1e-6)))
    monkeypatch.setattr(leased.Leased, "_check", lambda *rest: None)
    found = again(tmp_path)
    assert "weights of v" in str(found.differs)


def slow(incarnation: int) -> float:
    return 1e-3 if incarnation % 2 else 3e-3


@pytest.mark.parametrize("clip", [None, 0.3])
def test_sync_with_a_quorum_is_made_again_from_the_ledger(tmp_path: Path, clip: float | None) -> None:
    given = config(
        tmp_path,
        consistency={"mode": "sync", "quorum": 3},
        cluster={"workers": 5},
        optimizer={"clip": {"norm": clip}} if clip else {},
    )
    cluster = InProcessCluster(0, slow, lose={3: 0.05})
    result = launch(given, "x", lambda event: None, task=Ragged(), cluster=cluster)
    assert result.dropped_samples
    found = again(tmp_path)
    assert found.same, found.differs
    assert found.gradients < SLOTS
    ledger = tmp_path / "runs/a/ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    first = next(line for line in lines if line["state"] == "dropped")
    first["state"] = "applied"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not again(tmp_path).same, "a slot more"


def test_a_ledger_with_a_hole_is_no_record(tmp_path: Path) -> None:
    run(tmp_path)
    ledger = tmp_path / "runs/a/ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(line for line in lines if '"step": 7, "slot": 2' not in line))
    with pytest.raises(BadInput, match=r"every slot of step 7, found nothing of slots \[2\]"):
        again(tmp_path)


def test_in_sync_the_first_step_with_another_loss_is_named(tmp_path: Path) -> None:
    run(tmp_path)

    class Other(Ragged):
        def train_data(self) -> Any:
            x, y = super().train_data()
            return x, y * (1 + 1e-6)

    found = replay(tmp_path / "runs/a", Other())
    assert str(found.differs).startswith("step 0: train/loss")


def test_the_command_says_so_and_ends_with_1_where_it_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builtin = {"path": None, "name": "digits", "args": {"hidden": 20}}
    run(tmp_path, mode="async", task=builtin, batch={"size": 8, "slots": 4}, eval={"best": None})
    folder = str(tmp_path / "runs/a")
    assert main(["replay", folder]) == 0
    assert "the same bits as the last weights" in capsys.readouterr().out

    def change(rows: Any) -> None:
        rows["reads"][60:, 0] -= rows["reads"][60:, 0] > 0

    for shard in (0, 1):
        changed(tmp_path, change, shard=shard)
    assert main(["replay", folder, "--json"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["status"] == "failed"
    assert "timeline 1" in told["differs"]
    shutil.rmtree(tmp_path / "runs/a/updates")
    assert main(["replay", folder]) == 2
