"""Messages as bytes: one JSON header, and one raw frame per array. Nothing is ever unpickled.

A message is a frozen dataclass; its annotations say how its fields come back.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import numpy as np

from distgd.errors import RunFailed


class MalformedMessage(RunFailed):
    """Bytes that are no message of this run's version. Nothing of it was used."""


Coder = Callable[[Any], Any]

# What parsing, looking up and numpy raise on bytes that are no message; SyntaxError comes from numpy's dtype strings.
MALFORMED = (
    *(ValueError, TypeError, KeyError, IndexError, StopIteration, AttributeError),
    *(OverflowError, RecursionError, SyntaxError),
)


class Codec:
    """Frozen dataclasses to frames and back.

    Fields are scalars, strings, None, dataclasses of `kinds`, tuples, frozen sets and dicts of them, or numpy arrays;
    their annotations decide how they come back.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self._fields: dict[str, tuple[type, list[tuple[str, Coder | None, Coder | None, bool]]]] = {}
        kinds = list(kinds)
        for kind in kinds:
            hints = typing.get_type_hints(kind)
            entries = []
            for each in fields(kind):
                hint = hints[each.name]
                encode, decode = _coders(hint, kinds)
                entries.append((each.name, encode, decode, _is_array(hint)))
            self._fields[kind.__name__] = (kind, entries)

    def encode(self, message: Any) -> list[Any]:
        """The header, then every array as contiguous memory, without a copy where it is contiguous already."""
        name = type(message).__name__
        values: list[Any] = []
        arrays: list[Any] = []
        for attribute, encode, _, is_array in self._fields[name][1]:
            value = getattr(message, attribute)
            if is_array and value is not None:
                values.append([value.dtype.str, list(value.shape)])
                arrays.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            else:
                values.append(encode(value) if encode and value is not None else value)
        return [json.dumps([name, values], separators=(",", ":")).encode(), *arrays]

    def decode(self, frames: Sequence[Any]) -> Any:
        """The message; its arrays are views of the frames' memory.

        Raises:
            MalformedMessage: no header, an unknown kind, or fields and arrays that do not fit it.
        """
        try:
            name, values = json.loads(bytes(frames[0]))
            kind, entries = self._fields[name]
            arrays = iter(frames[1:])
            found = [
                _array(value, next(arrays)) if is_array and value is not None else _coded(decode, value)
                for value, (_, _, decode, is_array) in zip(values, entries, strict=True)
            ]
            if next(arrays, None) is not None:
                raise ValueError("more arrays than the header names")
            return kind(*found)
        except MALFORMED as error:
            head = bytes(frames[0])[:60] if frames else b""
            raise MalformedMessage(
                f"message: expected one of this version's kinds, found {head!r} ({error}); "
                "every machine must run the same version of distgd"
            ) from error


def _is_array(hint: Any) -> bool:
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    return any((typing.get_origin(option) or option) is np.ndarray for option in options)


def _array(described: Any, frame: Any) -> np.ndarray[Any, Any]:
    dtype, shape = np.dtype(described[0]), tuple(int(n) for n in described[1])
    memory = frame if isinstance(frame, np.ndarray) else np.frombuffer(memoryview(frame), dtype=np.uint8)
    if dtype.hasobject or memory.nbytes != prod(shape) * dtype.itemsize:
        raise ValueError(f"{memory.nbytes} bytes for {dtype} {shape}")
    array: np.ndarray[Any, Any] = memory.view(dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()  # small frames lie anywhere in ZeroMQ's buffer


def _coded(code: Coder | None, value: Any) -> Any:
    return code(value) if code and value is not None else value


def _coders(hint: Any, kinds: list[type]) -> tuple[Coder | None, Coder | None]:
    """How values of a type are written and read, None for as they are."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and len(inner) == 2 and type(None) in inner:
        encode, decode = _coders(next(option for option in inner if option is not type(None)), kinds)
        return (lambda v: _coded(encode, v)), (lambda v: _coded(decode, v))
    if hint in kinds:
        return _dataclass_coders(hint, kinds)
    if origin in (tuple, frozenset):
        encode, decode = _coders(inner[0], kinds) if inner else (None, None)
        return (lambda v: [encode(i) for i in v] if encode else list(v)), (
            lambda v: origin(decode(i) for i in v) if decode else origin(v)
        )
    if origin is dict:
        encode, decode = _coders(inner[1], kinds)
        key = int if inner[0] is int else str
        return (lambda v: {str(k): encode(i) if encode else i for k, i in v.items()}), (
            lambda v: {key(k): decode(i) if decode else i for k, i in v.items()}
        )
    return None, None


def _dataclass_coders(kind: type, kinds: list[type]) -> tuple[Coder, Coder]:
    assert is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    inner = [(each.name, *_coders(hints[each.name], kinds)) for each in fields(kind)]

    def encode(value: Any) -> list[Any]:
        return [code(getattr(value, name)) if code else getattr(value, name) for name, code, _ in inner]

    def decode(values: list[Any]) -> Any:
        return kind(*(_coded(code, value) for value, (_, _, code) in zip(values, inner, strict=True)))

    return encode, decode
