"""Messages among processes of one machine: a socket carries the header and rings the bell, arrays stay where they are.

Sockets are of the kind that keeps messages whole and in order (unix(7), SOCK_SEQPACKET), with names in the kernel and
no file. There is no thread between two processes: one system call sends, and one wakes the receiver.

An array travels in one of three ways: as a place in a segment, where its memory was taken by `allocate`; in the
message, where it is small; else in a segment of its own, which then belongs to the receiver. A segment's descriptor
goes along with the first message that names it, over the connection that has proved itself.
"""

from __future__ import annotations

import array as arrays
import logging
import mmap
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distgd.errors import RunFailed
from distgd.transport.channel import INTRODUCTION, MESSAGE, Record
from distgd.transport.segments import SUPPORTED, Array, Segment, address_of, reserve

log = logging.getLogger("distgd.transport")

INLINE = 4096  # bytes of an array that are rather copied than named
LARGEST = 1 << 16  # bytes of a message; the kernel takes about 200 KiB
DESCRIPTORS = 64  # that may come along with a message
AVAILABLE = SUPPORTED and hasattr(socket, "SOCK_SEQPACKET")

_COUNT = struct.Struct("<cB")
_FRAME = struct.Struct("<BQQQ")  # how it travels, bytes, segment, first byte in it
_ALONE = struct.Struct("<cBBQQQ")  # both, where a message is a header and nothing else
_MOST_ALONE = LARGEST - _ALONE.size
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_HERE, _NAMED, _NEW, _PARCEL = range(4)


def listen() -> tuple[socket.socket, str]:
    """A socket that listens, and its address."""
    address = f"distgd-{secrets.token_hex(16)}"
    listener = _socket()
    listener.bind("\0" + address)
    listener.listen(socket.SOMAXCONN)
    return listener, address


def dial(address: str) -> tuple[socket.socket, bool]:
    """A socket that is connected to an address; always, hence True.

    Raises:
        OSError: nobody listens there.
    """
    dialed = _socket()
    try:
        dialed.connect("\0" + address)
    except BaseException:
        dialed.close()
        raise
    return dialed, True


def _socket() -> socket.socket:
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    opened.setblocking(False)
    return opened


class Shared:
    """The segments that this process has made for others to see."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._scarce = False

    def allocate(self, size: int, dtype: str) -> Array:
        """Zeros, [size], that others are shown without a copy; memory of this process alone where that is scarce."""
        try:
            segment = Segment.allocate(size * np.dtype(dtype).itemsize)
        except OSError as error:
            if not self._scarce:
                self._scarce = True
                log.warning("no shared memory for %d numbers (%s): gradients are copied into messages", size, error)
            return np.zeros(size, dtype)
        self._segments[len(self._segments)] = segment
        return segment.memory[: size * np.dtype(dtype).itemsize].view(dtype)

    def place(self, frame: Any) -> tuple[int, int]:
        """In which segment an array lies, and where; (-1, 0) where in none."""
        if not isinstance(frame, np.ndarray):
            return -1, 0
        address = address_of(frame)
        for number, segment in self._segments.items():
            if segment.holds(address, len(frame)):
                return number, address - segment.address
        return -1, 0

    def descriptor(self, number: int) -> int:
        """Of a segment, for reading."""
        return self._segments[number].descriptor

    def close(self) -> None:
        """Nobody is shown any more; those who see a segment already go on seeing it."""
        for segment in self._segments.values():
            os.close(segment.descriptor)
        self._segments.clear()


@dataclass(frozen=True)
class _Packet:
    """A record on its way; `parcels` are descriptors that are this packet's alone."""

    data: bytes
    descriptors: Sequence[int] = ()
    parcels: Sequence[int] = ()

    def drop(self) -> None:
        """It has left, or never will."""
        for descriptor in self.parcels:
            os.close(descriptor)


class NodeChannel:
    """A connection within a machine; Linux only."""

    def __init__(self, connection: socket.socket, shared: Shared) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.trusted = False
        self._shared = shared
        self._outbox: deque[_Packet] = deque()  # the kernel's buffer is full
        self._told: set[int] = set()  # our segments that the other end has
        self._theirs: dict[int, Segment] = {}

    # Sending.

    def send(self, kind: bytes = MESSAGE, frames: Sequence[Any] = ()) -> bool:
        """See `Channel`.

        Raises:
            RunFailed: there is no memory for an array that is in no segment.
        """
        if frames:
            if len(frames) == 1 and len(frames[0]) <= _MOST_ALONE:
                packet = _Packet(_ALONE.pack(kind, 1, _HERE, len(frames[0]), 0, 0) + frames[0])
            else:
                packet = self._packet(kind, frames)
            self._outbox.append(packet)
        while self._outbox and self._transmit(self._outbox[0]):
            self._outbox.popleft().drop()
        return bool(self._outbox)

    def _packet(self, kind: bytes, frames: Sequence[Any]) -> _Packet:
        head: list[bytes] = [_COUNT.pack(kind, len(frames))]
        body: list[Any] = []
        descriptors: list[int] = []
        parcels: list[int] = []
        room = LARGEST - _COUNT.size - _FRAME.size * len(frames)
        most = LARGEST  # the header is copied as long as it fits, an array only where it is small
        for frame in frames:
            size = len(frame)
            number, offset = self._shared.place(frame) if size > INLINE else (-1, 0)
            if number >= 0:
                new = number not in self._told
                head.append(_FRAME.pack(_NEW if new else _NAMED, size, number, offset))
                if new:
                    self._told.add(number)
                    descriptors.append(self._shared.descriptor(number))
            elif size <= min(room, most):
                head.append(_FRAME.pack(_HERE, size, 0, 0))
                body.append(frame)
                room -= size
            else:
                head.append(_FRAME.pack(_PARCEL, size, 0, 0))
                parcels.append(_parcel(frame))
                descriptors.append(parcels[-1])
            most = INLINE
        return _Packet(b"".join([*head, *body]), descriptors, parcels)

    def _transmit(self, packet: _Packet) -> bool:
        """False where the kernel's buffer is full; to somebody who is gone, in vain."""
        try:
            if packet.descriptors:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, arrays.array("i", packet.descriptors))]
                self.socket.sendmsg([packet.data], rights)
            else:
                self.socket.send(packet.data)
        except BlockingIOError:
            return False
        except OSError:
            pass  # the other end is gone, and the cluster will say so
        return True

    # Receiving.

    def receive(self) -> Iterator[Record]:
        """See `Channel`; one record."""
        try:
            data, rights, flags, _ = self.socket.recvmsg(LARGEST, socket.CMSG_SPACE(4 * DESCRIPTORS))
        except (BlockingIOError, ConnectionResetError):
            return  # reset: the other end closed with something unread; what it sent before is still to be had
        except OSError as error:
            raise EOFError from error
        descriptors = _descriptors(rights) if rights else []
        try:
            if not data:
                raise EOFError
            if flags & _CUT:
                raise ValueError("longer than any that is sent here")
            if data[:1] != INTRODUCTION and not (self.trusted and data[:1] == MESSAGE):
                raise ValueError(f"a record that begins with {data[:1]!r}")
            frames = self._frames(data, descriptors)
        except (struct.error, IndexError, KeyError, OSError) as error:
            raise ValueError(repr(error)) from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        yield data[:1], frames

    def _frames(self, data: bytes, descriptors: list[int]) -> list[Any]:
        count, place = data[1], _COUNT.size
        frames: list[Any] = []
        at = place + count * _FRAME.size
        for _ in range(count):
            how, size, number, offset = _FRAME.unpack_from(data, place)
            place += _FRAME.size
            if how == _HERE:
                inside = data[at : at + size]
                frames.append(memoryview(bytearray(inside)) if frames else inside)
                at += size
            elif not self.trusted:
                raise ValueError("memory from a stranger")
            elif how == _PARCEL:
                frames.append(_unpack(descriptors.pop(0), size))
            else:
                if how == _NEW:
                    self._theirs[number] = Segment.adopt(descriptors.pop(0))
                frames.append(self._theirs[number].memory[offset : offset + size])
        return frames

    def close(self, *, force: bool) -> bool:
        """See `Channel`. What was sent is the other end's, and the memory it came with where somebody still reads."""
        if not force and self.send():
            return False
        for packet in self._outbox:
            packet.drop()
        self._outbox.clear()
        self._theirs.clear()
        self.socket.close()
        return True


def _descriptors(rights: Any) -> list[int]:
    found = arrays.array("i")
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _parcel(frame: Any) -> int:
    """A segment that holds a copy of `frame`, for one receiver."""
    try:
        descriptor = reserve(len(frame))
    except OSError as error:
        do = "lower cluster.workers or the model, or add memory"
        raise RunFailed(f"expected {len(frame)} bytes of memory for a message ({error}); {do}") from error
    rest = memoryview(frame)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]
    return descriptor


def _unpack(descriptor: int, size: int) -> Any:
    try:
        return memoryview(mmap.mmap(descriptor, size))
    finally:
        os.close(descriptor)
