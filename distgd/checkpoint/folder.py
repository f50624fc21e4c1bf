"""The checkpoints of one run, a folder each: `checkpoints/v7-t1/{shard-0-i1.safetensors, ..., manifest.json}`.

Names tell the version and the timeline, and are never used twice: what was cut off by a kill is not in anybody's way.
A folder without a manifest is no checkpoint. Read and checked here, before anything of it is used.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distgd.checkpoint.manifest import NAME, Manifest
from distgd.checkpoint.shardfile import Damaged, ShardState, check, read, sync_folder
from distgd.layout import Layout, Slice

PATTERN = re.compile(r"v(\d{1,18})-t(\d{1,9})")


def folder_name(version: int, timeline: int) -> str:
    """The folder of a version in a timeline.

    >>> folder_name(7, 1)
    'v7-t1'
    """
    return f"v{version}-t{timeline}"


def version_of(name: str) -> int:
    """The version that a folder's name tells.

    >>> version_of("v7-t1")
    7
    """
    named = PATTERN.fullmatch(name)
    assert named is not None, name
    return int(named[1])


def file_name(shard: int, incarnation: int) -> str:
    """The file that an incarnation writes of a shard.

    >>> file_name(0, 3)
    'shard-0-i3.safetensors'
    """
    return f"shard-{shard}-i{incarnation}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A whole one: every file of it is what its manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def version(self) -> int:
        """What it is called by."""
        return version_of(self.folder.name)

    @property
    def files(self) -> list[tuple[Path, int, int]]:
        """Each shard's file with its elements of the flat vector."""
        return [(self.folder / shard.file, shard.start, shard.stop) for shard in self.manifest.shards]


def commit(folder: Path, manifest: Manifest) -> Checkpoint:
    """Make a checkpoint of files that are there: write the manifest, so that a kill leaves all of it or nothing.

    Raises:
        OSError: the disk refuses it; there is no checkpoint then.
    """
    data, part = manifest.dump(), folder / f"{NAME}.part"
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / NAME)
    sync_folder(folder)
    sync_folder(folder.parent)
    return Checkpoint(folder, manifest)


def open_checkpoint(folder: Path, run: str | None, *, hashed: bool = True) -> Checkpoint:
    """Read and check one.

    Args:
        run: the identity of the run that it must be of, None for any.
        hashed: whether to read every file and compare its bytes.

    Raises:
        Damaged: it is not whole, of another run, or its files lead elsewhere; the message names the file.
    """
    path = folder / NAME
    try:
        if folder.is_symlink():
            raise Damaged(f"{folder}: expected a folder, found a link")
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(number, "rb") as file:
            data = file.read()
    except OSError as error:
        raise Damaged(f"{path}: expected a manifest, found {error.strerror}") from error
    manifest = Manifest.parse(data, str(path))
    if run is not None and manifest.run != run:
        raise Damaged(f"{path}: expected a checkpoint of run {run}, found one of {manifest.run}")
    if (named := PATTERN.fullmatch(folder.name)) and int(named[2]) != manifest.timeline:
        raise Damaged(f"{path}: expected timeline {named[2]}, found {manifest.timeline}")
    for shard in manifest.shards if hashed else ():
        check(folder / shard.file, shard.sha256, shard.bytes)
    return Checkpoint(folder, manifest)


@dataclass(frozen=True)
class Restored:
    """One shard's part of a checkpoint; `applied` is JSON, empty in sync mode."""

    state: ShardState
    version: int
    buffers_version: int
    applied: str


def restore(folder: Path, part: Slice, layout: Layout, files: Collection[str] | None = None) -> Restored:
    """Read a part of a checkpoint that has been checked: by the driver, or by whoever copied it.

    A checkpoint whose shards had applied different slots has parts of the same cut alone.

    Args:
        files: those that are there, among them all that the part needs; None for every one.

    Raises:
        Damaged: it is not whole, or its shards are of other versions and cut otherwise.
    """
    whole = open_checkpoint(folder, None, hashed=False)
    touched = [shard for shard in whole.manifest.shards if shard.start < part.stop and part.start < shard.stop]
    first = whole.manifest.shards[0]
    of = {(shard.version, shard.applied) for shard in touched or [first]}
    if len(of) != 1:
        raise Damaged(f"{folder}: its shards had applied different slots, so that they cannot be cut anew")
    ((version, applied),) = of
    there = [each for each in whole.files if files is None or each[0].name in files]
    return Restored(read(part, layout, there), version, first.buffers_version, applied)


def newest(checkpoints: Path, run: str, damaged: list[str]) -> Checkpoint | None:
    """The newest whole checkpoint, None where there is none; what was passed over for damage is added to `damaged`."""
    for folder in candidates(checkpoints):
        try:
            return open_checkpoint(folder, run)
        except Damaged as error:
            damaged.append(str(error))
    return None


def candidates(checkpoints: Path) -> list[Path]:
    """Folders that have a manifest, the newest first: the highest timeline that wrote one, then the version."""
    found = [(named, folder) for folder in _entries(checkpoints) if (named := PATTERN.fullmatch(folder.name))]
    ordered = sorted(found, key=lambda each: (int(each[0][2]), int(each[0][1])), reverse=True)
    return [folder for _, folder in ordered if os.path.lexists(folder / NAME)]


def prune(checkpoints: Path, kept: Collection[Path]) -> None:
    """Remove every checkpoint, and what is left of any, but for `kept`. The manifest goes first."""
    for folder in _entries(checkpoints):
        if PATTERN.fullmatch(folder.name) and folder not in kept and not folder.is_symlink():
            with suppress(OSError):
                (folder / NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _entries(checkpoints: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(checkpoints.iterdir())
