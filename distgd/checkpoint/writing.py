"""A shard's file under way: what it holds is copied into it at once, and made durable beside what comes next."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from distgd import events as ev
from distgd.checkpoint.folder import file_name, folder_name
from distgd.checkpoint.objects import Objects, is_uri
from distgd.checkpoint.shardfile import name_parts, seal, write
from distgd.layout import Layout


class Writing:
    """The file of one `Store`.

    Args:
        checkpoints: the run's folder of checkpoints, or the URI of it; then the file is on this disk until it is sent.
        shard, incarnation: who writes it.
    """

    def __init__(self, store: ev.Store, checkpoints: str, layout: Layout, shard: int, incarnation: int) -> None:
        self._store, self._layout, self._shard = store, layout, shard
        self._folder = folder_name(store.name, store.timeline)
        name = file_name(shard, incarnation)
        self._objects = Objects(checkpoints) if is_uri(checkpoints) else None
        self._held = None if self._objects is None else tempfile.mkdtemp(prefix="distgd-")
        self._path = Path(self._held or checkpoints, self._folder, name)
        self._error = ""

    def begin(self) -> None:
        """Copy the shard's state into the file; it may change from then on."""
        store = self._store
        try:
            write(self._path, name_parts(store.weights, store.optimizer, store.buffers, self._layout))
        except OSError as error:
            self._error = _words(error, self._path)
        store.release()

    def refuse(self, error: OSError) -> None:
        """In the place of `begin`: nothing is written, as the disk has given this error."""
        self._error = _words(error, self._path)
        self._store.release()

    def finish(self) -> ev.ShardWritten:
        """Make the file durable; what became of it."""
        digest, size = "", 0
        if not self._error:
            try:
                digest, size = seal(self._path)
                if self._objects is not None:
                    self._objects.put(self._path, f"{self._folder}/{self._path.name}")
            except OSError as error:
                self._error = _words(error, self._path)
                self._path.unlink(missing_ok=True)
        if self._held is not None:
            shutil.rmtree(self._held, ignore_errors=True)
        store = self._store
        return ev.ShardWritten(
            store.timeline,
            store.number,
            self._shard,
            self._folder,
            self._path.name,
            digest,
            size,
            store.version,
            store.buffers_version,
            store.applied,
            self._error,
        )


def _words(error: OSError, path: Path) -> str:
    return f"{path}: {error.strerror or error}"
