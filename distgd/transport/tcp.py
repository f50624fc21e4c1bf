"""Messages between machines: one TCP connection for each pair, both ways, and no thread.

A message is a record: its kind, the number and sizes of its frames, and the frames. It is written straight from where
its arrays lie and read into memory that was used before: taking fresh memory from the system for every array, as
general libraries have to, costs more than the copy itself. What the kernel does not take now goes out whenever this
process sends or receives next.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import sys
import termios
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from distgd.errors import RunFailed
from distgd.transport.channel import CONFIRMED, INTRODUCTION, MESSAGE, RESUMED, Record

SCRATCH = 1 << 14  # bytes that are read at once where it is not known what comes
LARGE = 1 << 13  # bytes of a frame that is read into memory of its own; less than SCRATCH, so that any other fits
KEPT = 64 << 20  # bytes of memory that is kept to be used again
STRANGERS_MOST = 1 << 10  # bytes of a frame of somebody who has proved nothing
TURNS = 64  # reads from one connection before another gets its turn
KINDS = INTRODUCTION, MESSAGE, RESUMED, CONFIRMED
_VECTORS = 64  # of one system call; the least that every system takes is 16, Linux takes 1024
_HEAD = struct.Struct("<cB")
_SIZE = 8


Place = Callable[[Any, int], memoryview | None]


def _nowhere(head: Any, size: int) -> None:
    """No frame has a place of its own."""


class Pool:
    """Memory of the sizes that were asked for before, used again once nobody sees any of it."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._free: dict[int, list[Any]] = {}
        self.kept = 0
        self._lent: dict[int, tuple[weakref.ref[Any], Any]] = {}  # by the reference's id

    def take(self, size: int) -> memoryview:
        """`size` bytes of any content. They are taken back when the last array or view of them is gone."""
        free = self._free.get(size)
        if free:
            memory = free.pop()
            self.kept -= size
        else:
            memory = np.empty(size, np.uint8)
        # numpy hands on the reference to what owns the memory, so the owner has to be something that is made anew.
        owner = (ctypes.c_uint8 * size).from_buffer(memory)
        lease = weakref.ref(owner, self._returned)
        self._lent[id(lease)] = lease, memory
        return memoryview(owner).cast("B")

    def _returned(self, lease: weakref.ref[Any]) -> None:
        _, memory = self._lent.pop(id(lease))
        if self.kept + memory.nbytes <= self._most:
            self.kept += memory.nbytes
            self._free.setdefault(memory.nbytes, []).append(memory)


class Incoming:
    """Cuts a stream of bytes into records: `room` says where the next bytes belong, `took` how many have come.

    Args:
        max_bytes: the largest frame that is taken from somebody who has proved himself.
        place: says where a large frame belongs, from the record's first frame and the size.
    """

    def __init__(self, pool: Pool, max_bytes: int, place: Place = _nowhere) -> None:
        self._pool, self._max_bytes, self._place = pool, max_bytes, place
        self._scratch = memoryview(bytearray(SCRATCH))
        self._start = self._stop = 0  # of what lies in it
        self._kind = b""
        self._left: deque[int] | None = None  # sizes of a record's frames that are still to come
        self._frames: list[Any] = []
        self._rest: memoryview | None = None  # of a large frame
        self.trusted = False

    def room(self) -> memoryview:
        """Where to read to."""
        return self._rest if self._rest is not None else self._scratch[self._stop :]

    def took(self, count: int) -> Iterator[Record]:
        """The records that `count` more bytes make whole.

        Raises:
            ValueError: no record, or one that is not for strangers to send.
        """
        if self._rest is None:
            self._stop += count
        else:
            self._rest = self._rest[count:] if count < len(self._rest) else None
        while self._rest is None and (self._left is not None or self._begin()):
            while self._left and self._rest is None and self._next(self._left[0]):
                self._left.popleft()
            if self._left or self._rest is not None:
                break
            self._left = None
            yield self._kind, self._frames
        if self._start == self._stop:
            self._start = self._stop = 0
        elif self._start:
            kept = bytes(self._scratch[self._start : self._stop])
            self._scratch[: len(kept)] = kept
            self._start, self._stop = 0, len(kept)

    def _begin(self) -> bool:
        """Read what a record begins with; False where that is not there yet."""
        if self._stop - self._start < _HEAD.size:
            return False
        kind, count = _HEAD.unpack_from(self._scratch, self._start)
        if kind not in (KINDS if self.trusted else (INTRODUCTION,)) or not count:
            raise ValueError(f"no record here begins with {kind + bytes([count])!r}")
        at = self._start + _HEAD.size
        if self._stop - at < _SIZE * count:
            return False
        sizes = struct.unpack_from(f"<{count}Q", self._scratch, at)
        if max(sizes) > (most := self._max_bytes if self.trusted else STRANGERS_MOST):
            raise ValueError(f"{max(sizes)} bytes where {most} are allowed")
        self._start = at + _SIZE * count
        self._kind, self._left, self._frames = kind, deque(sizes), []
        return True

    def _next(self, size: int) -> bool:
        """Take a frame, or the memory where it is read to; False where more has to be read first."""
        here = self._scratch[self._start : self._stop]
        if len(here) >= size:
            self._frames.append(memoryview(bytearray(here[:size])) if self._frames else bytes(here[:size]))
            self._start += size
            return True
        if size < LARGE:
            return False
        whole = self._place(self._frames[0], size) if self._frames and self.trusted else None
        if whole is None:
            whole = self._pool.take(size)
        whole[: len(here)] = here
        self._start = self._stop
        self._frames.append(whole)
        self._rest = whole[len(here) :]
        return True


def listen(host: str) -> tuple[socket.socket, str]:
    """A socket that listens on a free port of `host`, and its address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
    listener.setblocking(False)
    return listener, f"{host}:{listener.getsockname()[1]}"


def dial(address: str) -> tuple[socket.socket, bool]:
    """A socket that is connecting to an address, and whether it is connected already.

    Raises:
        OSError: nobody listens there, as far as is known at once.
    """
    host, _, port = address.rpartition(":")
    dialed = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    dialed.setblocking(False)
    try:
        dialed.connect((host, int(port)))
    except BlockingIOError:
        return dialed, False
    except BaseException:
        dialed.close()
        raise
    return dialed, True


class TcpChannel:
    """A connection between machines."""

    def __init__(self, connection: socket.socket, pool: Pool, max_bytes: int, place: Place = _nowhere) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._incoming, self._max_bytes = Incoming(pool, max_bytes, place), max_bytes
        self._outbox: deque[Any] = deque()

    @property
    def trusted(self) -> bool:
        """Whether the other end has proved itself."""
        return self._incoming.trusted

    @trusted.setter
    def trusted(self, value: bool) -> None:
        self._incoming.trusted = value

    def send(self, kind: bytes = MESSAGE, frames: Sequence[Any] = ()) -> bool:
        """See `Channel`."""
        if frames:
            sizes = list(map(len, frames))
            if max(sizes) > self._max_bytes:
                raise RunFailed(f"a message: expected at most {self._max_bytes} bytes in an array, found {max(sizes)}")
            head = _HEAD.pack(kind, len(frames)) + struct.pack(f"<{len(frames)}Q", *sizes)
            small = next((place for place, size in enumerate(sizes) if size >= LARGE), len(sizes))
            self._outbox.append(b"".join([head, *frames[:small]]))
            self._outbox.extend(memoryview(frame) for frame in frames[small:] if len(frame))
        while self._outbox:
            try:
                sent = self.socket.sendmsg(islice(self._outbox, _VECTORS))
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                self._outbox.clear()
                return False
            self._sent(sent)
        return False

    def _sent(self, count: int) -> None:
        while count:
            first = self._outbox[0]
            if count < len(first):
                self._outbox[0] = memoryview(first)[count:]
                return
            count -= len(first)
            self._outbox.popleft()

    def receive(self) -> Iterator[Record]:
        """See `Channel`."""
        for _ in range(TURNS):
            room = self._incoming.room()
            try:
                count = self.socket.recv_into(room)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise EOFError from error
            if not count:
                raise EOFError
            yield from self._incoming.took(count)
            if count < len(room):
                return

    def close(self, *, force: bool) -> bool:
        """See `Channel`. The kernel goes on sending what it has, but not to a peer whose messages were left unread."""
        if not force and (self.send() or _unsent(self.socket)):
            return False
        self._outbox.clear()
        self.socket.close()
        return True


def _unsent(connection: socket.socket) -> bool:
    """Whether the other machine has yet to confirm what was sent."""
    if sys.platform != "linux":
        return False
    count = array("i", [0])
    fcntl.ioctl(connection, termios.TIOCOUTQ, count)
    return count[0] > 0
