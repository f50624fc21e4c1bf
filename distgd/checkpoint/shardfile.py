"""One shard of a version as a file: safetensors, so that any tool opens it and nothing in it is ever run.

    weights                the shard's elements of the flat vector
    buffers                the model's buffers as bytes (shard 0)
    elementwise/N/ENTRY    the optimizer's state of the layout's N-th tensor, for the elements that are in this shard
    scalar/N/ENTRY         what is one number for all of that tensor's elements

Which elements these are is said by the manifest alone. A file is written once: its name is never used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from distgd.layout import Layout, Slice
from distgd.optim import State, StateParts

Array = np.ndarray[Any, Any]

_NAMES = {"float64": "F64", "float32": "F32", "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}
_READ = 1 << 20  # bytes that are hashed at a time


class Damaged(Exception):
    """A file of a checkpoint is not what the manifest says; the message names it. Nothing of it was used."""


Parts = Mapping[str, Sequence[Array]]
"""Name in the file -> one vector as consecutive pieces of memory; a single number as one array without dimensions."""


@dataclass(frozen=True)
class ShardState:
    """All of one shard that the steps to come depend on; `buffers` is shard 0's alone."""

    weights: Array
    optimizer: State
    buffers: Array | None


def name_parts(weights: Array, optimizer: StateParts, buffers: Array | None, layout: Layout) -> dict[str, list[Array]]:
    """A shard's state under the names of its file, as it lies in memory."""
    numbers = {entry.name: number for number, entry in enumerate(layout.entries)}
    parts = {"weights": [weights]} | ({} if buffers is None else {"buffers": [buffers]})
    for label, tensors in optimizer.items():
        for name, entries in tensors.items():
            for kind, pieces in entries.items():
                parts[f"{label}/{numbers[name]}/{kind}"] = [piece.detach().numpy() for piece in pieces]
    return parts


def write(path: Path, parts: Parts) -> None:
    """Write a new file; `seal` makes it durable.

    Raises:
        OSError: the disk refuses it, or the file exists; what was written of it is removed.
    """
    header, at = {}, 0
    for name, pieces in parts.items():
        size = sum(piece.nbytes for piece in pieces)
        shape = [sum(map(len, pieces))] if pieces[0].ndim else []
        header[name] = {"dtype": _NAMES[str(pieces[0].dtype)], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        with open(number, "wb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(struct.pack("<Q", len(text)) + text))
            for piece in (piece for pieces in parts.values() for piece in pieces):
                _write_all(file.fileno(), np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def seal(path: Path) -> tuple[str, int]:
    """Make a file that was written durable; its SHA-256 in hexadecimal and its bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.sha256()
        while piece := file.read(_READ):
            digest.update(piece)
        size = file.tell()
    sync_folder(path.parent)
    return digest.hexdigest(), size


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check(path: Path, digest: str, size: int) -> None:
    """Compare a file with its description.

    Raises:
        Damaged: it is missing, no plain file, or holds other bytes.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(number, "rb", buffering=0) as file:
            found = os.fstat(number).st_size
            if found != size:
                raise Damaged(f"{path}: expected {size:,} bytes, found {found:,}")
            hashed = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{path}: expected a file, found {error.strerror}") from error
    if hashed != digest:
        raise Damaged(f"{path}: its bytes are not those that were written (SHA-256 differs)")


def read(part: Slice, layout: Layout, files: Sequence[tuple[Path, int, int]]) -> ShardState:
    """The state of `part`, put together from the files of any number of shards.

    Args:
        files: each with the first and one-past-last element of the flat vector that is in it; without gaps.

    Raises:
        Damaged: a file does not hold what its place in the layout asks for.
    """
    weights = np.empty(part.size, dtype=layout.dtype)
    state: State = {"elementwise": {}, "scalar": {}}
    buffers: Array | None = None
    for path, start, stop in files:
        try:
            with safe_open(path, framework="numpy") as file:
                names = set(file.keys())
                if part.index == 0 and "buffers" in names:
                    buffers = file.get_tensor("buffers")
                lo, hi = max(start, part.start), min(stop, part.stop)
                if lo >= hi:
                    continue
                weights[lo - part.start : hi - part.start] = file.get_slice("weights")[lo - start : hi - start]
                _read_state(file, names, state, layout, part, (start, stop))
        except (SafetensorError, KeyError, IndexError, ValueError, TypeError, OSError) as error:
            raise Damaged(f"{path}: expected the shard [{start}, {stop}) of this layout, found {error}") from error
    return ShardState(weights, state, buffers)


def _read_state(file: Any, names: set[str], state: State, layout: Layout, part: Slice, there: tuple[int, int]) -> None:
    """Add what a file holds of a part's pieces to `state`."""
    entries = {entry.name: (number, entry) for number, entry in enumerate(layout.entries)}
    for piece in part.pieces:
        number, entry = entries[piece.name]
        first = part.start + piece.start
        lo, hi = max(first, there[0]), min(first + piece.size, there[1])
        if lo >= hi:
            continue
        begins = max(entry.start, there[0])  # of the tensor's elements in the file
        for name in (name for name in names if name.split("/", 2)[1:2] == [str(number)]):
            label, _, kind = name.split("/", 2)
            if label == "scalar":
                state["scalar"].setdefault(piece.name, {})[kind] = torch.from_numpy(np.array(file.get_tensor(name)))
            else:
                values = torch.from_numpy(file.get_slice(name)[lo - begins : hi - begins])
                if len(values) != hi - lo:
                    raise ValueError(f"{len(values)} elements of {name} where {hi - lo} belong")
                into = state["elementwise"].setdefault(piece.name, {})
                if kind not in into:
                    into[kind] = torch.empty(piece.size, dtype=values.dtype)
                into[kind][lo - first : hi - first] = values


def _write_all(number: int, data: memoryview) -> None:
    while data:
        data = data[os.write(number, data) :]
