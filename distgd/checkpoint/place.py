"""Where a run's checkpoints are: a folder that all machines share, or an object store.

In both a manifest is what makes files a checkpoint, and it is written last.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import distgd.checkpoint.folder as on_disk
from distgd.checkpoint.folder import PATTERN, Checkpoint, Restored
from distgd.checkpoint.manifest import NAME, Manifest
from distgd.checkpoint.objects import Objects, is_uri
from distgd.checkpoint.shardfile import Damaged, check
from distgd.layout import Layout, Slice


class Checkpoints:
    """The checkpoints of one run, by the names of their folders.

    Args:
        where: a folder, or a URI.
    """

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/")
        self._objects = Objects(where) if is_uri(where) else None

    def at(self, name: str) -> str:
        """The whole name of one, for `Checkpoints.of`."""
        return f"{self.where}/{name}"

    @classmethod
    def of(cls, whole: str) -> tuple[Checkpoints, str]:
        """Where a checkpoint is, and its name there; from what `at` gave."""
        where, _, name = whole.rpartition("/")
        return cls(where), name

    def commit(self, name: str, manifest: Manifest) -> Checkpoint:
        """Make a checkpoint of files that are there.

        Raises:
            OSError: the disk or the store refuses it; there is no checkpoint then.
        """
        if self._objects is None:
            return on_disk.commit(Path(self.where, name), manifest)
        self._objects.write(manifest.dump(), f"{name}/{NAME}")
        return Checkpoint(Path(name), manifest)

    def open(self, name: str, run: str | None, *, hashed: bool = True) -> Checkpoint:
        """Read and check one; in a store its files are read once for it, and not kept.

        Raises:
            Damaged: it is not whole, or of another run; the message names the file.
        """
        if self._objects is None:
            return on_disk.open_checkpoint(Path(self.where, name), run, hashed=hashed)
        with self._here(name, []) as folder:
            found = Checkpoint(Path(name), on_disk.open_checkpoint(folder, run, hashed=False).manifest)
        for shard in found.manifest.shards if hashed else ():
            self.check(name, shard.file, shard.sha256, shard.bytes)
        return found

    def check(self, name: str, file: str, digest: str, size: int) -> None:
        """Compare a file with its description.

        Raises:
            Damaged: it is missing, or holds other bytes.
        """
        if self._objects is None:
            check(Path(self.where, name, file), digest, size)
            return
        whole = f"{self.at(name)}/{file}"
        try:
            found = self._objects.digest(f"{name}/{file}")
        except OSError as error:
            raise Damaged(f"{whole}: expected a file, found {_words(error)}") from error
        if found != (digest, size):
            raise Damaged(f"{whole}: its bytes are not those that were written (SHA-256 or size differs)")

    def restore(self, name: str, part: Slice, layout: Layout) -> Restored:
        """Read a part of a checkpoint.

        Raises:
            Damaged: it is not whole, or its shards are of other versions and cut otherwise.
        """
        if self._objects is None:
            return on_disk.restore(Path(self.where, name), part, layout)
        manifest = self.open(name, None, hashed=False).manifest
        touched = [s for s in manifest.shards if part.index == 0 or (s.start < part.stop and part.start < s.stop)]
        with self._here(name, [shard.file for shard in touched]) as folder:
            for shard in touched:
                check(folder / shard.file, shard.sha256, shard.bytes)
            return on_disk.restore(folder, part, layout, [shard.file for shard in touched])

    def newest(self, run: str, damaged: list[str]) -> Checkpoint | None:
        """The newest whole one, None where there is none; what was passed over is added to `damaged`."""
        for name in self.names():
            try:
                return self.open(name, run)
            except Damaged as error:
                damaged.append(str(error))
        return None

    def names(self) -> list[str]:
        """Those that have a manifest, the newest first.

        Raises:
            OSError: the store cannot be reached.
        """
        if self._objects is None:
            return [folder.name for folder in on_disk.candidates(Path(self.where))]
        found = [name.rpartition("/")[0] for name in self._objects.names() if name.endswith(f"/{NAME}")]
        named = [(match, name) for name in found if (match := PATTERN.fullmatch(name))]
        ordered = sorted(named, key=lambda each: (int(each[0][2]), int(each[0][1])), reverse=True)
        return [name for _, name in ordered]

    def prune(self, kept: Collection[str]) -> None:
        """Remove every checkpoint, and what is left of any, but for `kept`. The manifest goes first."""
        if self._objects is None:
            on_disk.prune(Path(self.where), {Path(self.where, name) for name in kept})
            return
        there = [name for name in self._objects.names() if PATTERN.fullmatch(name.partition("/")[0])]
        gone = [name for name in there if name.partition("/")[0] not in kept]
        self._objects.remove(sorted(gone, key=lambda name: not name.endswith(f"/{NAME}")))

    @contextmanager
    def _here(self, name: str, files: list[str]) -> Iterator[Path]:
        """A folder with the manifest and some files of one in a store, for as long as it is looked at."""
        assert self._objects is not None
        held = Path(tempfile.mkdtemp(prefix="distgd-"))
        try:
            for file in (NAME, *files):
                try:
                    self._objects.get(f"{name}/{file}", held / name / file)
                except OSError as error:
                    raise Damaged(f"{self.at(name)}/{file}: expected a file, found {_words(error)}") from error
            yield held / name
        finally:
            shutil.rmtree(held, ignore_errors=True)


def _words(error: OSError) -> str:
    return str(error.strerror or error).splitlines()[0]
