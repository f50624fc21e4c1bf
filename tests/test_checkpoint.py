"""Checkpoints on disk: what is read is what was written, whatever the cuts; damage is found; a kill leaves one."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from distgd.checkpoint import (
    Checkpoint,
    Damaged,
    Manifest,
    ShardEntry,
    commit,
    folder_name,
    name_parts,
    newest,
    open_checkpoint,
    prune,
    read,
    restore,
    seal,
    write,
)
from distgd.checkpoint.shardfile import ShardState
from distgd.layout import Layout
from distgd.optim import OptimizerSpec, PieceOptimizer

RUN = "a1b2"


def stepped(layout: Layout, shards: int, name: str = "Adam", block: int | None = None) -> list[ShardState]:
    """Each shard's weights and optimizer after two steps with the same gradients for every cut."""
    chance = np.random.RandomState(0)
    flat = torch.from_numpy(chance.randn(layout.size).astype(layout.dtype))
    grads = [torch.from_numpy(chance.randn(layout.size).astype(layout.dtype)) for _ in range(2)]
    states = []
    for part in layout.slices(shards):
        weights = flat[part.start : part.stop].clone()
        pieces = [(p.name, weights[p.start : p.start + p.size]) for p in part.pieces]
        optimizer = PieceOptimizer(OptimizerSpec(name, {"lr": 0.1}), pieces, block=block)
        for grad in grads:
            own = grad[part.start : part.stop]
            optimizer.step([own[p.start : p.start + p.size] for p in part.pieces])
        buffers = np.arange(8, dtype=np.uint8) if part.index == 0 else None
        states.append(ShardState(weights.numpy(), optimizer.state_parts(), buffers))  # type: ignore[arg-type]
    return states


def make(
    checkpoints: Path, layout: Layout, shards: int = 2, version: int = 7, timeline: int = 1, run: str = RUN, **more: Any
) -> Checkpoint:
    folder = checkpoints / folder_name(version, timeline)
    entries = []
    states = stepped(layout, shards, more.get("name", "Adam"), more.get("block"))
    for part, state in zip(layout.slices(shards), states, strict=True):
        path = folder / f"shard-{part.index}-i{part.index + 1}.safetensors"
        write(path, name_parts(state.weights, state.optimizer, state.buffers, layout))  # type: ignore[arg-type]
        digest, size = seal(path)
        entries.append(ShardEntry(path.name, size, digest, part.start, part.stop, version, 3, ""))
    return commit(folder, manifest(layout, entries, version, timeline, run))


def manifest(layout: Layout, entries: list[ShardEntry], step: int, timeline: int, run: str) -> Manifest:
    described = {"size": layout.size}
    return Manifest(run, timeline, step, tuple(entries), described, {}, {"loss": 0.5}, {}, {}, "promised")


LAYOUT = Layout.of([("a/b", (5, 40)), ("c", (3,)), ("d.weight", (130,))], "float32")


def same(one: ShardState, other: ShardState) -> bool:
    def plain(state: Any) -> dict[tuple[str, ...], bytes]:
        return {
            (label, name, kind): b"".join(np.asarray(part).tobytes() for part in (v if isinstance(v, list) else [v]))
            for label, tensors in state.items()
            for name, entries in tensors.items()
            for kind, v in entries.items()
        }

    buffers = [None if s.buffers is None else s.buffers.tobytes() for s in (one, other)]
    equal = one.weights.tobytes() == other.weights.tobytes() and buffers[0] == buffers[1]
    return equal and plain(one.optimizer) == plain(other.optimizer)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["SGD", "Adam", "NAdam", "Rprop", "Adagrad"]),
    st.sampled_from([None, 64, 128]),
)
def test_any_number_of_shards_reads_what_any_other_wrote(
    sizes: list[int], wrote: int, reads: int, name: str, block: int | None
) -> None:
    layout = Layout.of([(f"p{i}", (size,)) for i, size in enumerate(sizes)], "float32")
    with folder() as checkpoints:
        files = make(checkpoints, layout, wrote, name=name, block=block).files
        for part, expected in zip(layout.slices(reads), stepped(layout, reads, name), strict=True):
            assert same(read(part, layout, files), expected)


@contextmanager
def folder() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def test_any_tool_reads_a_shard(tmp_path: Path) -> None:
    path, *_ = (file for file, _, _ in make(tmp_path, LAYOUT, 1).files)
    tensors = load_file(path)
    assert sorted(tensors)[:3] == ["buffers", "elementwise/0/exp_avg", "elementwise/0/exp_avg_sq"]
    assert np.array_equal(tensors["weights"], stepped(LAYOUT, 1)[0].weights)


def test_a_file_is_written_once(tmp_path: Path) -> None:
    write(tmp_path / "x", {"weights": [np.zeros(3)]})
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", {"weights": [np.ones(3)]})
    assert load_file(tmp_path / "x")["weights"].tolist() == [0, 0, 0]


def test_the_newest_is_of_the_newest_timeline(tmp_path: Path) -> None:
    for version, timeline in [(9, 1), (3, 2), (5, 2), (20, 1)]:
        make(tmp_path, LAYOUT, version=version, timeline=timeline)
    found = newest(tmp_path, RUN, [])
    assert found is not None
    assert found.folder.name == "v5-t2"


def test_what_is_not_kept_goes_and_nothing_else(tmp_path: Path) -> None:
    kept, gone = make(tmp_path, LAYOUT, version=9), make(tmp_path, LAYOUT, version=3)
    (tmp_path / "v11-t1").mkdir()  # of somebody who was killed
    (tmp_path / "notes").mkdir()
    (tmp_path / "v12-t1").symlink_to(kept.folder)
    prune(tmp_path, [kept.folder])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "v12-t1", "v9-t1"]
    assert not gone.folder.exists()
    assert open_checkpoint(kept.folder, RUN).manifest.step == 9


class Kill(BaseException):
    """Stands for a process that is not there any more."""


CHANGES = ("open", "write", "fsync", "unlink", "rmdir", "mkdir", "replace", "rename")


def killed_at(place: int, checkpoints: Path) -> tuple[bool, int]:
    """Make version 5 beside version 3, gone at one call that changes a file; whether it was, and what is found then."""
    calls, dies = 0, 10**9

    def mortal(do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == dies:
                raise Kill
            return do(*args, **named)

        return call

    killed = False
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, mortal(getattr(os, name)))
        before = make(checkpoints, LAYOUT, version=3)
        calls, dies = 0, place
        try:
            after = make(checkpoints, LAYOUT, version=5)
            prune(checkpoints, [after.folder])
        except Kill:
            killed = True
        dies = 10**9
        found = newest(checkpoints, RUN, [])
        assert found is not None
        again = make(checkpoints, LAYOUT, version=5, timeline=2)  # nothing is in the way of the next start
        prune(checkpoints, [again.folder, before.folder])
        assert newest(checkpoints, RUN, []) == again
    return killed, found.manifest.step


def test_a_kill_at_any_file_operation_leaves_the_one_before_or_the_new_one(tmp_path: Path) -> None:
    """Every call that changes a file is one more place to die at."""
    seen = set()
    for place in range(1, 200):
        killed, step = killed_at(place, tmp_path / str(place))
        seen.add(step)
        if not killed:
            break
    assert not killed
    assert place > 15, "there were places to die at"
    assert seen == {3, 5}


class Payload:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/distgd-was-here",)


def rewrite(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest whose own checksum is right."""
    body = json.loads((checkpoint.folder / "manifest.json").read_bytes())["manifest"]
    change(body)
    body.pop("format")
    shards = tuple(ShardEntry(**entry) for entry in body.pop("shards"))
    (checkpoint.folder / "manifest.json").write_bytes(Manifest(shards=shards, **body).dump())


def damages(good: Checkpoint, other: Checkpoint, foreign: Checkpoint, rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Ways to spoil a checkpoint, each a name and what does it to a copy."""
    names = [shard.file for shard in good.manifest.shards]
    everything = [*names, "manifest.json"]

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])

    def grow(path: Path) -> None:
        path.write_bytes(path.read_bytes() + rng.randbytes(9))

    for _ in range(190):
        yield "bit", lambda c: flip(c / rng.choice(everything))
    for _ in range(120):
        yield "cut", lambda c: cut(c / rng.choice(everything))
    for _ in range(40):
        yield "grown", lambda c: grow(c / rng.choice(everything))
    for name in everything:
        yield "missing", lambda c, name=name: (c / name).unlink()
        yield "a folder", lambda c, name=name: ((c / name).unlink(), (c / name).mkdir())
        yield "empty", lambda c, name=name: (c / name).write_bytes(b"")
        yield "zeros", lambda c, name=name: (c / name).write_bytes(bytes((c / name).stat().st_size))
        yield "a link", lambda c, name=name: ((c / name).rename(c / "x"), (c / name).symlink_to(c / "x"))
        yield "a pickle", lambda c, name=name: (c / name).write_bytes(pickle.dumps(Payload()))
        yield "of another version", lambda c, name=name: shutil.copy(other.folder / name, c / name)
    yield "swapped", lambda c: (
        (c / names[0]).rename(c / "x"), (c / names[1]).rename(c / names[0]), (c / "x").rename(c / names[1])
    )  # fmt: skip
    yield "of another run", lambda c: [shutil.copy(foreign.folder / name, c / name) for name in everything]
    outside = ["../v3-t1/" + names[0], "/etc/passwd", "shard-0-i1.safetensors/../x", "..", "", "shard-0-i1.pt"]
    for path in outside:
        yield (
            f"a path to {path}",
            lambda c, path=path: rewrite(
                Checkpoint(c, good.manifest), lambda body: body["shards"][0].update(file=path)
            ),
        )
    for key, value in [("start", 64), ("stop", 10**9), ("stop", 64), ("bytes", 3), ("sha256", "0" * 64)]:
        yield (
            f"{key} {value}",
            lambda c, key=key, value=value: rewrite(
                Checkpoint(c, good.manifest), lambda body: body["shards"][0].update({key: value})
            ),
        )
    yield (
        "a shard twice",
        lambda c: rewrite(Checkpoint(c, good.manifest), lambda body: body.update(shards=[body["shards"][0]] * 2)),
    )
    yield "no shards", lambda c: rewrite(Checkpoint(c, good.manifest), lambda body: body.update(shards=[]))
    yield "another timeline", lambda c: rewrite(Checkpoint(c, good.manifest), lambda body: body.update(timeline=9))
    for text in ("{}", "[]", "null", "7", '{"manifest": 1}', '{"sha256": "", "manifest": {}}', "[" * 5000):
        yield f"{text[:20]} as manifest", lambda c, text=text: (c / "manifest.json").write_text(text)
    for _ in range(110):
        yield "bits of a shard", lambda c: flip(c / rng.choice(names))


def test_damage_is_found_and_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    made = tmp_path / "made"
    good, other = make(made, LAYOUT, version=7), make(made, LAYOUT, version=5, name="NAdam")
    foreign = make(tmp_path / "foreign", LAYOUT, version=7, run="ffff")
    before = make(tmp_path / "before", LAYOUT, version=3)
    count = 0
    for what, spoil in damages(good, other, foreign, random.Random(0)):
        checkpoints = tmp_path / f"{count}"
        shutil.copytree(before.folder, checkpoints / "v3-t1")
        shutil.copytree(good.folder, checkpoints / "v7-t1")
        spoil(checkpoints / "v7-t1")
        damaged: list[str] = []
        found = newest(checkpoints, RUN, damaged)
        assert found is not None, what
        assert found.manifest.step == 3, what
        if (checkpoints / "v7-t1" / "manifest.json").exists():  # without one it never was a checkpoint
            assert len(damaged) == 1, what
            assert str(checkpoints / "v7-t1") in damaged[0], what
        shutil.rmtree(checkpoints)
        count += 1
    assert count >= 500
    assert not Path("/tmp/distgd-was-here").exists()


def test_a_linked_folder_is_no_checkpoint(tmp_path: Path) -> None:
    good = make(tmp_path / "elsewhere", LAYOUT)
    (tmp_path / "v7-t1").symlink_to(good.folder)
    with pytest.raises(Damaged, match="found a link"):
        open_checkpoint(tmp_path / "v7-t1", RUN)


def test_a_pickle_with_a_right_checksum_is_not_run_either(tmp_path: Path) -> None:
    good = make(tmp_path, LAYOUT, 1)
    path = good.folder / good.manifest.shards[0].file
    path.write_bytes(pickle.dumps(Payload()))
    digest, size = seal(path)
    commit(good.folder, replace(good.manifest, shards=(replace(good.manifest.shards[0], sha256=digest, bytes=size),)))
    with pytest.raises(Damaged):
        restore(good.folder, LAYOUT.slices(1)[0], LAYOUT)
    assert not Path("/tmp/distgd-was-here").exists()


def test_shards_that_had_applied_different_slots_are_not_cut_anew(tmp_path: Path) -> None:
    good = make(tmp_path, LAYOUT, 2)
    one, two = good.manifest.shards
    commit(
        good.folder, replace(good.manifest, shards=(replace(one, applied="x"), replace(two, applied="y", version=8)))
    )
    part = LAYOUT.slices(2)[1]
    found = restore(good.folder, part, LAYOUT)
    assert (found.version, found.applied, found.buffers_version) == (8, "y", 3)
    with pytest.raises(Damaged, match="different slots"):
        restore(good.folder, LAYOUT.slices(1)[0], LAYOUT)


@pytest.mark.parametrize("number", [28, 30, 122])
def test_a_disk_that_refuses_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        write(tmp_path / "c" / "x", {"weights": [np.zeros(3)]})
    assert list((tmp_path / "c").iterdir()) == []
