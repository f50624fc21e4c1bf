"""What makes files a checkpoint: a manifest, written last, that names each file and its bytes.

It is JSON in one canonical form with its own SHA-256 in front, so that no byte of it can change unseen. A checkpoint is
there once its manifest is, and not before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distgd.checkpoint.shardfile import Damaged

FORMAT = 1
NAME = "manifest.json"
FILE = re.compile(r"shard-\d{1,6}-i\d{1,12}\.safetensors")


@dataclass(frozen=True)
class ShardEntry:
    """One shard's file: its name, bytes and SHA-256; its elements of the flat vector; how many updates it had applied.

    `applied` says which slots these were, in bounded and async mode, as JSON; it is empty in sync mode.
    """

    file: str
    bytes: int
    sha256: str
    start: int
    stop: int
    version: int
    buffers_version: int
    applied: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint.

    Args:
        run: the identity of the run folder that it was written in.
        step: whole steps in it. In bounded and async mode some slots of later ones may be in it, too.
        shards: in the order of the layout.
        layout: name, shape and first element of each tensor, and the vector's size and dtype.
        facts: what has to be the same when the run goes on, beyond its config: how data is cut, sizes, the schedule.
        progress: the driver's counts; its own business.
        config: the resolved config.
        software: versions of what computed it, and of its first worker and shard the canary and the machine.
        bits: whether the weights are promised to be the same on any machines of that kind.
    """

    run: str
    timeline: int
    step: int
    shards: tuple[ShardEntry, ...]
    layout: dict[str, Any]
    facts: dict[str, Any]
    progress: dict[str, Any]
    config: dict[str, Any]
    software: dict[str, str]
    bits: str

    def dump(self) -> bytes:
        """The file's bytes."""
        text = _canonical({"format": FORMAT, **asdict(self)})
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f'{{"sha256":"{digest}","manifest":{text}}}\n'.encode()

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Read what `dump` wrote.

        Raises:
            Damaged: it is something else, was changed, or names files that no checkpoint has.
        """
        try:
            whole = json.loads(data)
            body = whole["manifest"]
            if body.pop("format") != FORMAT:
                raise ValueError(f"format {FORMAT} expected")
            shards = tuple(ShardEntry(**entry) for entry in body.pop("shards"))
            manifest = cls(shards=shards, **body)
            same = manifest.dump() == data
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{where}: expected a manifest of this version, found {_kind(error)}") from error
        if not same:
            raise Damaged(f"{where}: it was changed after it had been written")
        manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        at = 0
        for shard in self.shards:
            if not FILE.fullmatch(shard.file):
                raise Damaged(f"{where}: expected a file of this folder, found {shard.file!r}")
            if shard.start != at:
                raise Damaged(f"{where}: expected a shard that starts at element {at}, found {shard.start}")
            at = shard.stop
        if len({shard.file for shard in self.shards}) != len(self.shards) or at != self.layout["size"]:
            raise Damaged(f"{where}: its shards do not make up the layout")


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _kind(error: Exception) -> str:
    return f"something else ({type(error).__name__}: {str(error)[:80]})"
