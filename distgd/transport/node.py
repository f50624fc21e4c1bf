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
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distgd.errors import RunFailed
from distgd.transport.proof import STRANGERS, Challenge, Identity
from distgd.transport.segments import SUPPORTED, Array, Segment, address_of, reserve
from distgd.wire import Codec

log = logging.getLogger("distgd.transport")

LINGER = 1.0  # seconds that what was sent last may take to leave at close
INLINE = 4096  # bytes of an array that are rather copied than named
LARGEST = 1 << 16  # bytes of a message; the kernel takes about 200 KiB
DESCRIPTORS = 64  # that may come along with a message
HELLO, CHALLENGE, PROOF, DATA = b"H", b"C", b"P", b"D"
AVAILABLE = SUPPORTED and hasattr(socket, "SOCK_SEQPACKET")

_COUNT = struct.Struct("<cB")
_FRAME = struct.Struct("<BQQQ")  # how it travels, bytes, segment, first byte in it
_ALONE = struct.Struct("<cBBQQQ")  # both, where a message is a header and nothing else
_MOST_ALONE = LARGEST - _ALONE.size
_HERE, _NAMED, _NEW, _PARCEL = range(4)


@dataclass
class _Link:
    """A connection. `peer` is who has proved himself to be at its other end, -1 before."""

    socket: socket.socket
    dials: int = -1  # whom this process dialed; -1 where it was dialed
    nonce: bytes = b""
    challenge: Challenge | None = None
    peer: int = -1
    outbox: deque[tuple[bytes, Sequence[int]]] = field(default_factory=deque)  # the kernel's buffer is full
    unsent: deque[list[Any]] = field(default_factory=deque)  # nobody has proved himself yet
    told: set[int] = field(default_factory=set)  # our segments that the other end has
    theirs: dict[int, Segment] = field(default_factory=dict)


class NodeEndpoint:
    """An endpoint among processes of one machine; Linux only.

    Args:
        me, role: who this is; part of what is proved.
        secret: the run's, at least 16 bytes.
        listen: whether others may dial; they find this process at `address`.
    """

    def __init__(self, me: int, role: str, secret: bytes, codec: Codec, *, listen: bool = False) -> None:
        self._identity, self._codec = Identity(me, role, secret), codec
        self._epoll = select.epoll()
        self._links: dict[int, _Link] = {}  # by file descriptor
        self._link_to: dict[int, _Link] = {}  # by peer: dialed, or proved
        self._waiting: dict[int, deque[list[Any]]] = {}  # for peers that have not dialed yet
        self._inbox: deque[tuple[int, list[Any]]] = deque()
        self._segments: dict[int, Segment] = {}  # ours
        self._scarce = False
        self._warned: set[str] = set()
        self.refused = 0  # connections and messages so far
        self.address = ""
        self._listener: socket.socket | None = None
        if listen:
            self.address = f"distgd-{secrets.token_hex(16)}"
            self._listener = self._open()
            self._listener.bind("\0" + self.address)
            self._listener.listen(socket.SOMAXCONN)
            self._epoll.register(self._listener, select.EPOLLIN)

    @staticmethod
    def _open() -> socket.socket:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        opened.setblocking(False)
        return opened

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

    def connect(self, peer: int, address: str) -> None:
        """Dial `peer`, which listens."""
        dialed = self._open()
        dialed.connect("\0" + address)
        link = self._watch(_Link(dialed, dials=peer))
        self._link_to[peer] = link
        who, link.nonce = self._identity.greet()
        self._transmit(link, _pack(HELLO, [who, link.nonce]), ())

    def _watch(self, link: _Link) -> _Link:
        self._links[link.socket.fileno()] = link
        self._epoll.register(link.socket, select.EPOLLIN)
        return link

    def fileno(self) -> int:
        """Readable when something has arrived."""
        return self._epoll.fileno()

    # Sending.

    def send(self, to: int, message: Any) -> None:
        """Send, or queue until `to` has proved itself. Arrays may not be rewritten before the receiver has answered.

        Raises:
            RunFailed: there is no memory for an array that is in no segment.
        """
        frames = self._codec.encode(message)
        link = self._link_to.get(to)
        if link is None:
            self._waiting.setdefault(to, deque()).append(frames)
        elif link.peer < 0:
            link.unsent.append(frames)
        else:
            self._deliver(link, frames)

    def _deliver(self, link: _Link, frames: list[Any]) -> None:
        if len(frames) == 1 and len(frames[0]) <= _MOST_ALONE:
            self._transmit(link, _ALONE.pack(DATA, 1, _HERE, len(frames[0]), 0, 0) + frames[0], ())
            return
        head: list[bytes] = [_COUNT.pack(DATA, len(frames))]
        body: list[Any] = []
        descriptors: list[int] = []
        parcels: list[int] = []
        room = LARGEST - _COUNT.size - _FRAME.size * len(frames)
        most = LARGEST  # the header is copied as long as it fits, an array only where it is small
        for frame in frames:
            size = len(frame)
            number, offset = self._place(frame, size) if size > INLINE else (-1, 0)
            if number >= 0:
                new = number not in link.told
                head.append(_FRAME.pack(_NEW if new else _NAMED, size, number, offset))
                if new:
                    link.told.add(number)
                    descriptors.append(self._segments[number].descriptor)
            elif size <= min(room, most):
                head.append(_FRAME.pack(_HERE, size, 0, 0))
                body.append(frame)
                room -= size
            else:
                head.append(_FRAME.pack(_PARCEL, size, 0, 0))
                parcels.append(_parcel(frame))
                descriptors.append(parcels[-1])
            most = INLINE
        self._transmit(link, b"".join([*head, *body]), descriptors)
        if parcels and not link.outbox:
            for parcel in parcels:
                os.close(parcel)

    def _place(self, frame: Any, size: int) -> tuple[int, int]:
        """In which segment of ours the memory lies, and where; (-1, 0) where in none."""
        if not isinstance(frame, np.ndarray):
            return -1, 0
        address = address_of(frame)
        for number, segment in self._segments.items():
            if segment.holds(address, size):
                return number, address - segment.address
        return -1, 0

    def _transmit(self, link: _Link, data: bytes, descriptors: Sequence[int]) -> None:
        """Send now, or when the other end has read; to somebody who is gone, in vain."""
        if link.outbox or not self._sent(link, data, descriptors):
            if not link.outbox:
                with suppress(OSError, ValueError):
                    self._epoll.modify(link.socket, select.EPOLLIN | select.EPOLLOUT)
            link.outbox.append((data, descriptors))

    @staticmethod
    def _sent(link: _Link, data: bytes, descriptors: Sequence[int]) -> bool:
        try:
            if descriptors:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, arrays.array("i", descriptors))]
                link.socket.sendmsg([data], rights)
            else:
                link.socket.send(data)
        except BlockingIOError:
            return False
        except OSError:
            pass  # the other end is gone, and the cluster will say so
        return True

    def _flush(self, link: _Link) -> None:
        while link.outbox:
            data, descriptors = link.outbox[0]
            if not self._sent(link, data, descriptors):
                return
            link.outbox.popleft()
            self._close_parcels(descriptors)
        self._epoll.modify(link.socket, select.EPOLLIN)

    def _close_parcels(self, descriptors: Sequence[int]) -> None:
        ours = {segment.descriptor for segment in self._segments.values()}
        for descriptor in descriptors:
            if descriptor not in ours:
                os.close(descriptor)

    # Receiving.

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """The next message and its sender; None after `timeout` seconds.

        Raises:
            MalformedMessage: a peer that knows the secret sent what is no message here. It is lost, nothing else is.
        """
        until = time.monotonic() + timeout
        while not self._inbox and self._take_in(until):
            pass
        if not self._inbox:
            return None
        source, frames = self._inbox.popleft()
        return source, self._codec.decode(frames)

    def _take_in(self, until: float) -> bool:
        """Wait for something to arrive and sort it; False once `until` is over."""
        left = until - time.monotonic()
        for number, what in self._epoll.poll(max(0.0, left)):
            link = self._links.get(number)
            if link is None:
                if self._listener is not None:
                    self._accept(self._listener)
                continue
            if what & select.EPOLLOUT:
                self._flush(link)
            if what & ~select.EPOLLOUT:
                self._read(link)
        return left > 0

    def _accept(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError):
            link = _Link(listener.accept()[0])
            link.socket.setblocking(False)
            strangers = [each for each in self._links.values() if each.peer < 0 and each.dials < 0]
            for oldest in strangers[: len(strangers) + 1 - STRANGERS]:
                self._forget(oldest)
            self._watch(link)

    def _read(self, link: _Link) -> None:
        try:
            data, rights, flags, _ = link.socket.recvmsg(LARGEST, socket.CMSG_SPACE(4 * DESCRIPTORS))
        except BlockingIOError:
            return
        except OSError:
            data, rights, flags = b"", [], 0
        descriptors = _descriptors(rights) if rights else []
        try:
            if not data:
                self._forget(link)
                return
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("longer than any that is sent here")
            if link.peer >= 0 and data[:1] == DATA:
                self._inbox.append((link.peer, self._frames(link, data, descriptors)))
            else:
                self._introduced(link, data)
        except (struct.error, ValueError, IndexError, KeyError, OSError, StopIteration) as error:
            self._refuse(link, f"incarnation {link.peer} sent what is no message ({error!r})")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _frames(self, link: _Link, data: bytes, descriptors: list[int]) -> list[Any]:
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
            elif how == _PARCEL:
                frames.append(_unpack(descriptors.pop(0), size))
            else:
                if how == _NEW:
                    link.theirs[number] = Segment.adopt(descriptors.pop(0))
                frames.append(link.theirs[number].memory[offset : offset + size])
        return frames

    def _forget(self, link: _Link) -> None:
        """The other end is gone. What it sent, and its memory where somebody still reads it, stays."""
        with suppress(OSError, ValueError):
            self._epoll.unregister(link.socket)
        self._links.pop(link.socket.fileno(), None)
        link.socket.close()
        for _, descriptors in link.outbox:
            self._close_parcels(descriptors)
        link.outbox.clear()
        link.theirs.clear()

    def _refuse(self, link: _Link, why: str) -> None:
        self.refused += 1
        if why not in self._warned and len(self._warned) < 100:
            self._warned.add(why)
            log.warning("refused: %s", why)
        if link.peer < 0:
            self._forget(link)

    # The proof.

    def _introduced(self, link: _Link, data: bytes) -> None:
        tag, frames = data[:1], _unpacked(data)
        if tag == HELLO and link.dials < 0 and link.challenge is None and len(frames) == 2:
            link.challenge = self._identity.challenge(*frames)
            if link.challenge is None:
                self._refuse(link, "a peer's greeting was not one")
            else:
                self._transmit(link, _pack(CHALLENGE, link.challenge.frames), ())
        elif tag == CHALLENGE and link.dials >= 0 and link.peer < 0 and len(frames) == 3:
            self._prove(link, frames)
        elif tag == PROOF and link.challenge is not None and link.peer < 0 and len(frames) == 1:
            self._judge(link, link.challenge, frames[0])
        else:
            self._refuse(link, f"a peer without a session sent {tag!r}")

    def _prove(self, link: _Link, frames: list[bytes]) -> None:
        proved = self._identity.prove(link.dials, link.nonce, tuple(frames))
        if proved is None:
            why = "does not know this run's secret, or is another"
            self._refuse(link, f"the listener at incarnation {link.dials}'s address {why}")
            return
        self._transmit(link, _pack(PROOF, [proved[0]]), ())
        self._opened(link, link.dials)

    def _judge(self, link: _Link, challenge: Challenge, proof: bytes) -> None:
        if self._identity.accepts(challenge, proof):
            self._opened(link, challenge.peer)
        else:
            who = f"{challenge.role!r} {challenge.peer}"
            self._refuse(link, f"a peer that calls itself {who} does not know this run's secret")

    def _opened(self, link: _Link, peer: int) -> None:
        """Both ends may have dialed: each goes on sending over its own connection, so that its order is kept."""
        link.peer = peer
        if peer not in self._link_to:
            self._link_to[peer] = link
        for frames in (*link.unsent, *self._waiting.pop(peer, ())):
            self._deliver(link, frames)
        link.unsent.clear()

    def close(self) -> None:
        """Close every connection. What was sent before gets a second to leave; arrays that others read stay theirs."""
        until = time.monotonic() + LINGER
        while any(link.outbox or link.unsent for link in self._links.values()) and self._take_in(until):
            pass
        for link in list(self._links.values()):
            self._forget(link)
        if self._listener is not None:
            self._listener.close()
        self._epoll.close()
        for segment in self._segments.values():
            os.close(segment.descriptor)
        self._segments.clear()


def _pack(tag: bytes, frames: Sequence[bytes]) -> bytes:
    return b"".join([tag, *(struct.pack("<H", len(frame)) + frame for frame in frames)])


def _unpacked(data: bytes) -> list[bytes]:
    frames, at = [], 1
    while at < len(data):
        (size,) = struct.unpack_from("<H", data, at)
        frames.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return frames


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
