"""Messages as bytes: one header, and one raw frame per array. Nothing is ever unpickled.

A message is a frozen dataclass; its annotations say how its fields are written and come back. That is worked out once,
when the codec is made. A header begins with a number that stands for every kind and its fields, so that another
version's message is refused, and not misread.
"""

from __future__ import annotations

import json
import struct
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod
from operator import attrgetter, itemgetter
from typing import Any
from zlib import crc32

import numpy as np

from distgd.errors import RunFailed


class MalformedMessage(RunFailed):
    """Bytes that are no message of this run's version. Nothing of it was used."""


# What parsing, looking up and numpy raise on bytes that are no message; SyntaxError comes from numpy's dtype strings.
MALFORMED = (
    *(ValueError, TypeError, KeyError, IndexError, StopIteration, AttributeError),
    *(OverflowError, RecursionError, SyntaxError, struct.error),
)

_SCALARS = {int: "q", float: "d", bool: "?"}  # in the words of struct; whole numbers have 64 bits
_SIZE = struct.Struct("<I")
_PREFIX = struct.Struct("<IB")  # what stands for the version, the kind's place among all


class Codec:
    """Frozen dataclasses to frames and back.

    Fields are scalars, strings, None, dataclasses of `kinds`, tuples, frozen sets and dicts of them, or numpy arrays;
    their annotations decide how they are written and come back. Arrays are fields of a message itself only.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        kinds = list(kinds)
        self._records = [_Record(kind, kinds) for kind in kinds]
        self._version = crc32(repr([record.described for record in self._records]).encode())
        self._writers = {
            record.kind: (_PREFIX.pack(self._version, place), record) for place, record in enumerate(self._records)
        }

    def encode(self, message: Any) -> list[Any]:
        """The header, then every array as contiguous bytes, without a copy where it is contiguous already.

        Raises:
            KeyError: no message of these kinds.
            struct.error: a number that its field does not hold.
        """
        prefix, record = self._writers[type(message)]
        frames: list[Any] = [prefix + record.write(message)]
        if record.arrays is not None:
            for value in record.arrays(message):
                if value is not None:
                    frames.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        return frames

    def outline(self, head: Any) -> Any:
        """The message that a header belongs to, with None for every array.

        Raises:
            MalformedMessage: no header.
        """
        return self._read(head, None)

    def decode(self, frames: Sequence[Any]) -> Any:
        """The message; its arrays are views of the frames' memory.

        Raises:
            MalformedMessage: no header, an unknown kind, or fields and arrays that do not fit it.
        """
        return self._read(frames[0] if frames else b"", frames[1:])

    def _read(self, head: Any, arrays: Sequence[Any] | None) -> Any:
        head = bytes(head)
        try:
            version, place = _PREFIX.unpack_from(head)
            if version != self._version:
                raise ValueError("the header of another version")
            return self._records[place].read(head[_PREFIX.size :], arrays)
        except MALFORMED as error:
            raise MalformedMessage(
                f"message: expected one of this version's kinds, found {head[:60]!r} ({error}); "
                "every machine must run the same version of distgd"
            ) from error


class _Record:
    """One dataclass: its scalars and the lengths of all other fields in one piece, then those fields."""

    def __init__(self, kind: type, kinds: list[type]) -> None:
        self.kind = kind
        hints = typing.get_type_hints(kind)
        names = [each.name for each in fields(kind)]
        self.described = (kind.__name__, [(name, str(hints[name])) for name in names])
        scalars = [name for name in names if hints[name] in _SCALARS]
        others = [name for name in names if hints[name] not in _SCALARS]
        arrays = [name for name in others if _is_array(hints[name])]
        rest = [*(name for name in others if name not in arrays), *arrays]
        self.arrays = _all_of(arrays, attrgetter) if arrays else None
        self._get = _all_of([*scalars, *rest], attrgetter)
        self._order = _all_of([[*scalars, *rest].index(name) for name in names], itemgetter)
        self._count, self._views = len(scalars), len(arrays)
        self._fixed = struct.Struct("<" + "".join(_SCALARS[hints[name]] for name in scalars) + "I" * len(rest))
        forms = [_ARRAY if name in arrays else _form(hints[name], kinds) for name in rest]
        self._write, self._read = [form.write for form in forms], [form.read for form in forms]

    def write(self, value: Any) -> bytes:
        """A value of the kind, without what is in its arrays."""
        values = self._get(value)
        if not self._write:
            return self._fixed.pack(*values)
        count = self._count
        rest = [write(each) for write, each in zip(self._write, values[count:], strict=True)]
        return b"".join((self._fixed.pack(*values[:count], *map(len, rest)), *rest))

    def read(self, data: bytes, frames: Sequence[Any] | None = ()) -> Any:
        """The value that `data` and the arrays in `frames` hold; None for every array without `frames`."""
        values = list(self._fixed.unpack_from(data))
        at, place = self._fixed.size, self._count
        for read in self._read:
            stop = at + values[place]
            values[place] = read(data[at:stop])
            at, place = stop, place + 1
        if at != len(data):
            raise ValueError(f"{len(data)} bytes where {at} belong")
        if frames is None:
            values[len(values) - self._views :] = [None] * self._views
        elif self._views:
            self._show(values, frames)
        elif frames:
            raise ValueError("arrays that the header does not name")
        return self.kind(*self._order(values))

    def _show(self, values: list[Any], frames: Sequence[Any]) -> None:
        """Put the arrays, which come last, in the place of their descriptions."""
        left = deque(frames)
        for place in range(len(values) - self._views, len(values)):
            if values[place] is not None:
                values[place] = _array(values[place], left.popleft())
        if left:
            raise ValueError("more arrays than the header names")


def _all_of(keys: Sequence[Any], getter: Callable[..., Any]) -> Callable[[Any], Sequence[Any]]:
    """`attrgetter` or `itemgetter` of several keys, which gives a tuple also where they are one or none."""
    get: Callable[[Any], Any] = getter(*keys) if keys else lambda value: ()
    return (lambda value: (get(value),)) if len(keys) == 1 else get


# Values that have no fixed length.


@dataclass(frozen=True)
class _Form:
    """How values of one type are written and read."""

    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]


def _form(hint: Any, kinds: list[type]) -> _Form:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and len(inner) == 2 and type(None) in inner:
        return _perhaps(_form(next(option for option in inner if option is not type(None)), kinds))
    if hint in _SCALARS:
        one = struct.Struct("<" + _SCALARS[hint])
        return _Form(one.pack, lambda data: one.unpack(data)[0])
    if hint is str:
        return _Form(lambda v: v.encode("utf-8", "surrogatepass"), lambda data: data.decode("utf-8", "surrogatepass"))
    if hint in kinds:
        record = _Record(hint, kinds)
        return _Form(record.write, record.read)
    if origin in (tuple, frozenset):
        several = _several(inner[0], kinds)
        return _Form(several.write, lambda data: origin(several.read(data)))
    if origin is dict:
        return _mapping(_several(inner[1], kinds))
    raise TypeError(f"a field of a message cannot be {hint}")


def _perhaps(form: _Form) -> _Form:
    """A value, or None."""
    return _Form(
        lambda v: b"" if v is None else b"\1" + form.write(v),
        lambda data: form.read(data[1:]) if data else None,
    )


def _several(item: Any, kinds: list[type]) -> _Form:
    """Any number of values of one type: scalars side by side, others behind their lengths."""
    if code := _SCALARS.get(item):
        size = struct.calcsize("<" + code)
        return _Form(
            lambda v: struct.pack(f"<{len(v)}{code}", *v),
            lambda data: struct.unpack(f"<{len(data) // size}{code}", data),
        )
    form = _form(item, kinds)
    return _Form(lambda v: _joined([form.write(each) for each in v]), lambda data: list(map(form.read, _parts(data))))


def _joined(parts: Sequence[bytes]) -> bytes:
    return struct.pack(f"<{len(parts) + 1}I", len(parts), *map(len, parts)) + b"".join(parts) if parts else b""


def _parts(data: bytes) -> list[bytes]:
    if not data:
        return []
    (count,) = _SIZE.unpack_from(data)
    at, parts = _SIZE.size * (count + 1), []
    for size in struct.unpack_from(f"<{count}I", data, _SIZE.size):
        parts.append(data[at : at + size])
        at += size
    if at != len(data):
        raise ValueError(f"{len(data)} bytes where {at} belong")
    return parts


def _mapping(values: _Form) -> _Form:
    """Keys as JSON, which are the same in most messages, then the values."""

    def write(value: dict[Any, Any]) -> bytes:
        if not value:
            return b""
        keys = _keys_written(tuple(value))
        return b"".join((_SIZE.pack(len(keys)), keys, values.write(tuple(value.values()))))

    def read(data: bytes) -> dict[Any, Any]:
        if not data:
            return {}
        at = _SIZE.size + _SIZE.unpack_from(data)[0]
        return dict(zip(_keys_read(data[_SIZE.size : at]), values.read(data[at:]), strict=True))

    return _Form(write, read)


@lru_cache(maxsize=256)
def _keys_written(keys: tuple[Any, ...]) -> bytes:
    return json.dumps(keys).encode()


@lru_cache(maxsize=256)
def _keys_read(data: bytes) -> tuple[Any, ...]:
    return tuple(json.loads(data))


# Arrays: their dtype and shape are in the header.

_Described = tuple[np.dtype[Any], tuple[int, ...], int]


def _is_array(hint: Any) -> bool:
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    return any((typing.get_origin(option) or option) is np.ndarray for option in options)


def _describe(value: np.ndarray[Any, Any] | None) -> bytes:
    return b"" if value is None else _description(value.dtype.str, value.shape)


@lru_cache(maxsize=256)
def _description(dtype: str, shape: tuple[int, ...]) -> bytes:
    return " ".join((dtype, *map(str, shape))).encode()


@lru_cache(maxsize=256)
def _described(data: bytes) -> _Described | None:
    """The dtype, the shape, and the bytes of such an array."""
    if not data:
        return None
    name, *numbers = data.decode().split(" ")
    dtype, shape = np.dtype(name), tuple(map(int, numbers))
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"no array of numbers is {dtype} {shape}")
    return dtype, shape, prod(shape) * dtype.itemsize


def _array(described: _Described, frame: Any) -> np.ndarray[Any, Any]:
    dtype, shape, size = described
    if len(frame) != size:
        raise ValueError(f"{len(frame)} bytes for {dtype} {shape}")
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, frame)
    return array if array.flags.aligned else array.copy()


_ARRAY = _Form(_describe, _described)
