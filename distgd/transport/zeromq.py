"""Messages between machines: ZeroMQ over TCP; and over its own local sockets where `node` is not to be had.

From the transcript of the proof each side derives a ticket that begins all its messages on a connection: ZeroMQ
reconnects by itself, and who took over a dead peer's address, or its routing id, does not know the ticket. What was
under way over a connection that broke is lost; the next message over a new one makes the dialer prove itself again.
"""

from __future__ import annotations

import hmac
import logging
import math
import secrets
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq

from distgd.errors import RunFailed
from distgd.transport.proof import STRANGERS, Challenge, Identity
from distgd.wire import Codec

log = logging.getLogger("distgd.transport")

LINGER = 1.0  # seconds that what was sent last may take to prove itself, and again to leave, at close
PIECE = 4 << 20  # bytes of a frame: a larger array is sent in several, as one takes long to find memory for
BURST = 64  # messages taken from one socket before the clock is looked at, so that no flood outlasts a deadline
TICKET = 16  # bytes
HELLO, CHALLENGE, PROOF, DATA, UNKNOWN = b"H", b"C", b"P", b"D", b"?"


@dataclass(frozen=True)
class _Session:
    """A connection whose two ends have proved themselves; `ours` and `theirs` begin every message of an end."""

    peer: int
    ours: bytes
    theirs: bytes


@dataclass
class _Dialed:
    """A connection that this process made; what is sent before there is a session waits in `outbox`."""

    socket: zmq.Socket[bytes]
    nonce: bytes = b""
    session: _Session | None = None
    outbox: deque[list[Any]] = field(default_factory=deque)


class ZmqEndpoint:
    """An endpoint over ZeroMQ.

    Args:
        me, role: who this is; part of what is proved.
        secret: the run's, at least 16 bytes.
        listen: `ipc` (this host, no file: an abstract socket on Linux), `tcp` (a free port of `host`), both or none.
        max_bytes: the largest array that is sent or taken; a peer that sends more is cut off.

    Example::

        server, worker = ZmqEndpoint(1, "server", secret, codec, ("ipc",)), ZmqEndpoint(2, "worker", secret, codec)
        worker.connect(1, server.addresses[0])
        worker.send(1, message)
        server.receive(timeout=5.0)  # (2, message)
    """

    def __init__(
        self,
        me: int,
        role: str,
        secret: bytes,
        codec: Codec,
        listen: Sequence[str] = (),
        host: str | None = None,
        max_bytes: int = 1 << 30,
    ) -> None:
        self._identity, self._codec, self._max_bytes = Identity(me, role, secret), codec, max_bytes
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._dialed: dict[int, _Dialed] = {}
        self._by_socket: dict[zmq.Socket[bytes], int] = {}
        self._sessions: dict[bytes, _Session] = {}  # by routing id: the connections that were made to us
        self._route_to: dict[int, bytes] = {}
        self._strangers: dict[bytes, Challenge] = {}  # what each has to sign
        self._waiting: dict[int, deque[list[Any]]] = {}  # for peers that have not dialed yet
        self._inbox: deque[tuple[int, list[Any]]] = deque()
        self._warned: set[str] = set()
        self.refused = 0  # connections and messages so far
        self._router: zmq.Socket[bytes] | None = None
        self.addresses: tuple[str, ...] = ()  # where this process listens
        if listen:
            self._router = self._socket(zmq.ROUTER)
            self.addresses = tuple(self._bind(kind, host) for kind in listen)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, int(LINGER * 1000))
        socket.setsockopt(zmq.SNDHWM, 0)  # the protocol bounds what is under way; a full queue would block or drop
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_bytes)
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _bind(self, kind: str, host: str | None) -> str:
        assert self._router is not None
        if kind == "ipc" and sys.platform == "linux":
            address = f"ipc://@distgd-{secrets.token_hex(16)}"
            self._router.bind(address)
            return address
        self._router.bind(f"tcp://{host or '127.0.0.1'}:*")
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, peer: int, address: str) -> None:
        """Dial `peer`, which may not listen yet; returns at once."""
        dialed = _Dialed(self._socket(zmq.DEALER))
        self._dialed[peer] = dialed
        self._by_socket[dialed.socket] = peer
        dialed.socket.connect(address)
        self._greet(dialed)

    def send(self, to: int, message: Any) -> None:
        """Send, or queue until `to` has proved itself. Arrays may not be rewritten before the receiver has answered.

        Raises:
            RunFailed: part of it is larger than `max_bytes`; the receiver would cut the connection.
        """
        frames = [piece for frame in self._codec.encode(message) for piece in _pieces(frame)]
        if (found := max(map(len, frames))) > self._max_bytes:
            kind = type(message).__name__
            raise RunFailed(f"{kind} to {to}: expected at most {self._max_bytes} bytes in a piece, found {found}")
        dialed = self._dialed.get(to)
        if dialed is None:
            route = self._route_to.get(to)
            if route is None:
                self._waiting.setdefault(to, deque()).append(frames)
            else:
                self._answer(route, self._sessions[route].ours, *frames)
        elif dialed.session is None:
            dialed.outbox.append(frames)
        else:
            dialed.socket.send_multipart([dialed.session.ours, *frames], copy=False)

    def _answer(self, route: bytes, *frames: Any) -> None:
        assert self._router is not None
        self._router.send_multipart([route, *frames], copy=False)

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
        for socket, _ in self._poller.poll(max(0, math.ceil(left * 1000))):
            self._drain(socket)
        return left > 0

    def wait(self, timeout: float, beside: int) -> None:
        """Return when something has arrived, when the file descriptor `beside` can be read, or after `timeout`."""
        self._poller.register(beside, zmq.POLLIN)
        self._poller.poll(max(0, math.ceil(timeout * 1000)))
        self._poller.unregister(beside)

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(BURST):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if socket is self._router:
                self._from_route(frames[0].bytes, frames[1:])
            else:
                self._from_dialed(self._by_socket[socket], frames)

    def close(self) -> None:
        """Close every connection. What was sent before gets a second to prove itself and a second to leave."""
        until = time.monotonic() + LINGER
        while any(dialed.outbox for dialed in self._dialed.values()) and self._take_in(until):
            pass
        for socket in [*self._by_socket, *([self._router] if self._router else [])]:
            self._poller.unregister(socket)
            socket.close()
        self._by_socket.clear()
        self._dialed.clear()
        self._router = None
        self._context.term()

    # The proof, at the side that dialed.

    def _greet(self, dialed: _Dialed) -> None:
        who, dialed.nonce = self._identity.greet()
        dialed.session = None
        dialed.socket.send_multipart([HELLO, who, dialed.nonce])

    def _from_dialed(self, peer: int, frames: list[Any]) -> None:
        dialed, tag = self._dialed[peer], _tag(frames)
        session = dialed.session
        if session is not None and hmac.compare_digest(tag, session.theirs):
            self._inbox.append((peer, frames[1:]))
        elif tag == UNKNOWN:
            if session is not None:
                self._greet(dialed)
        elif tag == CHALLENGE and session is None and len(frames) == 4:
            self._prove(peer, dialed, *(bytes(frame) for frame in frames[1:]))
        else:
            self._refuse(f"a listener that has not proved itself at incarnation {peer}'s address sent {tag[:1]!r}")

    def _prove(self, peer: int, dialed: _Dialed, *frames: bytes) -> None:
        proved = self._identity.prove(peer, dialed.nonce, frames)
        if proved is None:
            self._refuse(f"the listener at incarnation {peer}'s address does not know this run's secret, or is another")
            return
        proof, transcript = proved
        ours, theirs = self._tickets(transcript)
        dialed.session = _Session(peer, ours, theirs)
        dialed.socket.send_multipart([PROOF, proof])
        while dialed.outbox:
            dialed.socket.send_multipart([ours, *dialed.outbox.popleft()], copy=False)

    # The proof, at the side that listens.

    def _from_route(self, route: bytes, frames: list[Any]) -> None:
        tag, session = _tag(frames), self._sessions.get(route)
        if not route.startswith(b"\0"):
            self._refuse("a peer chose its own routing id")
        elif session is not None and hmac.compare_digest(tag, session.theirs):
            self._inbox.append((session.peer, frames[1:]))
        elif tag == HELLO and session is None and len(frames) == 3:
            self._challenge(route, bytes(frames[1]), bytes(frames[2]))
        elif tag == PROOF and session is None and len(frames) == 2:
            self._judge(route, bytes(frames[1]))
        else:
            self._refuse(f"a peer {'of another' if session else 'without a'} session sent {tag[:1]!r}")
            if tag.startswith(DATA) and session is None:
                self._answer(route, UNKNOWN)

    def _challenge(self, route: bytes, who: bytes, nonce: bytes) -> None:
        challenge = self._identity.challenge(who, nonce)
        if challenge is None:
            self._refuse("a peer's greeting was not one")
            return
        while len(self._strangers) >= STRANGERS:
            self._strangers.pop(next(iter(self._strangers)))
        self._strangers[route] = challenge
        self._answer(route, CHALLENGE, *challenge.frames)

    def _judge(self, route: bytes, signature: bytes) -> None:
        challenge = self._strangers.pop(route, None)
        if challenge is None or not self._identity.accepts(challenge, signature):
            who = f"{challenge.role!r} {challenge.peer}" if challenge else "nobody"
            self._refuse(f"a peer that calls itself {who} does not know this run's secret")
            return
        incarnation = challenge.peer
        former = self._route_to.get(incarnation)
        if former is not None:  # it dialed again: ZeroMQ reconnected
            del self._sessions[former]
        theirs, ours = self._tickets(challenge.transcript)
        self._sessions[route], self._route_to[incarnation] = _Session(incarnation, ours, theirs), route
        for frames in self._waiting.pop(incarnation, ()):
            self._answer(route, ours, *frames)

    def _tickets(self, transcript: bytes) -> tuple[bytes, bytes]:
        """What begins the dialer's messages, and what begins the listener's."""
        dialer, listener = (
            self._identity.sign(side, transcript)[:TICKET] for side in (b"dialer sends", b"listener sends")
        )
        return DATA + dialer, DATA + listener

    def _refuse(self, why: str) -> None:
        self.refused += 1
        if why not in self._warned and len(self._warned) < 100:
            self._warned.add(why)
            log.warning("refused: %s", why)


def _pieces(frame: Any) -> list[Any]:
    if len(frame) <= PIECE:
        return [frame]
    return [frame[start : start + PIECE] for start in range(0, len(frame), PIECE)]


def _tag(frames: list[Any]) -> bytes:
    return bytes(frames[0]) if frames and len(frames[0]) <= len(DATA) + TICKET else b""
