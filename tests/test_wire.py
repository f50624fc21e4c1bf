"""Bytes to messages and back: nothing is lost, and what is no message is refused."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgd import events as ev
from distgd.wire import Codec, MalformedMessage


@dataclass(frozen=True, slots=True)
class Part:
    slot: int
    loss: float


@dataclass(frozen=True, slots=True)
class Note:
    number: int
    values: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True, slots=True)
class Everything:
    whole: int
    real: float
    text: str
    flag: bool
    perhaps: float | None
    several: tuple[int, ...]
    chosen: frozenset[int]
    nested: dict[int, dict[str, float]]
    part: Part
    parts: tuple[Part, ...]
    array: np.ndarray[Any, Any]
    maybe: np.ndarray[Any, Any] | None
    defaulted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Foreign:
    number: int


CODEC = Codec((Part, Note, Everything))
WHOLE = st.integers(-(2**63), 2**63 - 1)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
ARRAYS = hnp.arrays(
    st.sampled_from([np.dtype(name) for name in ("float32", "float64", "int64", "uint8", "bool")]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)
PARTS = st.builds(Part, WHOLE, NUMBERS)
MESSAGES = st.builds(
    Everything,
    whole=WHOLE,
    real=NUMBERS,
    text=st.text(),
    flag=st.booleans(),
    perhaps=st.none() | NUMBERS,
    several=st.lists(WHOLE).map(tuple),
    chosen=st.frozensets(WHOLE),
    nested=st.dictionaries(WHOLE, st.dictionaries(st.text(), NUMBERS)),
    part=PARTS,
    parts=st.lists(PARTS).map(tuple),
    array=ARRAYS,
    maybe=st.none() | ARRAYS,
)


def frozen(message: Everything) -> str:
    """A text that two messages share when types, values and bits agree (NaN equals itself here)."""
    described = [(a.dtype.str, a.shape, a.tobytes()) for a in (message.array, message.maybe) if a is not None]
    names = [name for name in Everything.__slots__ if name not in ("array", "maybe", "chosen")]
    return repr([*(getattr(message, name) for name in names), sorted(message.chosen), type(message.chosen), described])


@given(MESSAGES)
def test_a_message_comes_back_from_its_bytes_with_its_types_and_bits(message: Everything) -> None:
    frames = [bytes(frame) for frame in CODEC.encode(message)]
    assert frozen(CODEC.decode(frames)) == frozen(message)


def test_contiguous_arrays_are_neither_copied_out_nor_in() -> None:
    values = np.arange(6.0).reshape(2, 3)
    header, raw = CODEC.encode(Note(1, values))
    assert np.shares_memory(np.frombuffer(raw), values)
    memory = bytearray(raw)
    assert np.shares_memory(CODEC.decode([header, memory]).values, np.frombuffer(memory))


def test_an_array_in_any_order_of_memory_keeps_its_values() -> None:
    values = np.arange(12.0).reshape(3, 4).T[::2]
    assert np.array_equal(CODEC.decode(CODEC.encode(Note(1, values))).values, values)


def test_an_outline_is_the_message_without_its_arrays() -> None:
    head, _ = CODEC.encode(Note(7, np.zeros(3)))
    assert CODEC.outline(head) == Note(7, None)
    with pytest.raises(MalformedMessage):
        CODEC.outline(b"nonsense")


def head(number: int = 1, values: bytes = b"", kind: type = Note, codec: Codec = CODEC) -> bytes:
    """A header whose array is described by `values`."""
    blank = bytes(codec.encode(Note(number) if kind is Note else Foreign(number))[0])
    return blank[:-4] + len(values).to_bytes(4, "little") + values if kind is Note else blank


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xff\xfe"],
        [b"cos\nsystem\n(S'true'\ntR."],  # a pickle
        [b'["Note",[1,null]]'],
        [head(kind=Foreign, codec=Codec((Part, Note, Everything, Foreign)))],  # another version
        [head(codec=Codec((Note, Part, Everything)))],  # another version, which has the same kinds
        [head()[:4] + b"\x77" + head()[5:]],  # a kind that there is not
        [head()[:-1]],
        [head() + b"1"],
        [head(), b"1234"],  # an array where none is named
        [head(values=b"<f4 2")],  # no array
        [head(values=b"<f4 2"), b"1234"],  # too short
        [head(values=b"<f4 2"), b"12", b"34", b"56"],
        [head(values=b"<f4 2"), b"123456", b"789"],  # frames that do not end with the array
        [head(values=b"<f4 999999999999"), b"12", b"34"],
        [head(values=b"<f4 1"), b"1234", b"1234"],  # one too many
        [head(values=b"<f4 -1"), b"1234"],
        [head(values=b"<f4 -1 -1"), b"1234"],
        [head(values=b"<f4 " + b"9" * 30), b"1234"],
        [head(values=b"object 1"), b"12345678"],
        [head(values=b"no-such-type 1"), b"1234"],
        [head(values=b"<f4 1 "), b"1234"],
        [head(values=b"\xff"), b"1234"],
    ],
)
def test_what_is_no_message_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage, match="same version"):
        CODEC.decode(frames)


@given(MESSAGES, st.data())
def test_a_damaged_header_is_refused_or_is_another_message(message: Everything, data: st.DataObject) -> None:
    """Nothing but `MalformedMessage` comes out, whatever bytes are cut, added or changed."""
    first, *rest = (bytes(frame) for frame in CODEC.encode(message))
    at = data.draw(st.integers(5, len(first)))
    damaged = first[:at] + data.draw(st.binary(max_size=9)) + first[data.draw(st.integers(at, len(first))) :]
    with suppress(MalformedMessage):
        assert type(CODEC.decode([damaged, *rest])) is Everything


def test_a_number_that_its_field_cannot_hold_is_refused_by_the_sender() -> None:
    with pytest.raises(struct.error):
        CODEC.encode(Note(2**63))


def test_every_message_of_a_run_can_be_written_and_read() -> None:
    """An annotation that the codec cannot read back would show here, with empty fields of each type."""
    codec = Codec(ev.MESSAGES)
    blank: dict[str, Any] = {
        "int": 1,
        "float": 0.5,
        "str": "x",
        "bool": True,
        "dict": {},
        "tuple": (),
        "frozenset": frozenset(),
    }
    for kind in ev.MESSAGES:
        values = {}
        for each in fields(kind):
            text = str(each.type)
            array = np.arange(3.0) if text.startswith("np.ndarray") else None
            name = text.split("[")[0].split(" ")[0]
            values[each.name] = array if array is not None else blank.get(name, ev.SlotStats(0, 1, 1.0, 0.5, 0.1, 0.0))
        message = kind(**values)
        back = codec.decode([bytes(frame) for frame in codec.encode(message)])
        assert repr(back) == repr(message)


def test_byte_order_survives_and_arrays_are_aligned() -> None:
    values = np.arange(5, dtype=">f8")
    header, raw = CODEC.encode(Note(1, values))
    memory = bytearray(b"?" + bytes(raw))
    back = CODEC.decode([header, memoryview(memory)[1:]]).values
    assert back.flags.aligned
    assert np.array_equal(back, values)
