"""Messages between processes: ZeroMQ, and a twin in memory.

An endpoint sends to incarnations and receives from them. What a message means is no business of this module, and how
its arrays travel is none of the actors': a later endpoint may put them into shared memory.

Shards and the driver listen, everybody dials, and an answer goes back over the connection that the asker made, so
workers listen on nothing. Peers prove to each other that they know the run's secret: HMAC-SHA256 over both nonces,
incarnations and roles, once per connection (challenge-response as in RFC 2195, in both directions). From the same
transcript each side derives a ticket that begins all its messages on that connection: ZeroMQ reconnects by itself, and
who took over a dead peer's address, or its routing id, does not know the ticket. The payload is in clear; who can read
or change what is on the wire is not kept out.

Messages between two processes arrive in order and at most once. What was under way to a process that died, or over a
connection that broke, is lost; the next message over a new connection makes the dialer prove itself again.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import zmq

from distgd.errors import RunFailed
from distgd.wire import Codec

log = logging.getLogger("distgd.transport")

LINGER = 1.0  # seconds that what was sent last may take to prove itself, and again to leave, at close
BURST = 64  # messages taken from one socket before the clock is looked at, so that no flood outlasts a deadline
NONCE = 32  # bytes
TICKET = 16  # bytes
WHO = 256  # bytes; what a stranger says of himself is parsed before he has proved anything
STRANGERS = 1024  # connections that may be about to prove themselves at one time
HELLO, CHALLENGE, PROOF, DATA, UNKNOWN = b"H", b"C", b"P", b"D", b"?"


class Endpoint(Protocol):
    """One process's place in the network."""

    def send(self, to: int, message: Any) -> None:
        """Hand over a message; never blocks. Arrays may not be rewritten before the receiver has answered."""

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """The next message and its sender; None after `timeout` seconds. Its arrays belong to the receiver."""

    def close(self) -> None:
        """Leave."""


# ZeroMQ.


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
        self._me, self._role, self._secret, self._codec, self._max_bytes = me, role, secret, codec, max_bytes
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._dialed: dict[int, _Dialed] = {}
        self._by_socket: dict[zmq.Socket[bytes], int] = {}
        self._sessions: dict[bytes, _Session] = {}  # by routing id: the connections that were made to us
        self._route_to: dict[int, bytes] = {}
        self._strangers: dict[bytes, tuple[bytes, int, str]] = {}  # the transcript each has to sign
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
        frames = self._codec.encode(message)
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
        dialed.nonce, dialed.session = secrets.token_bytes(NONCE), None
        dialed.socket.send_multipart([HELLO, _who(self._me, self._role), dialed.nonce])

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

    def _prove(self, peer: int, dialed: _Dialed, who: bytes, nonce: bytes, signature: bytes) -> None:
        transcript = _transcript(_who(self._me, self._role), dialed.nonce, who, nonce)
        if _read_who(who)[0] != peer or not hmac.compare_digest(self._sign(b"listener", transcript), signature):
            self._refuse(f"the listener at incarnation {peer}'s address does not know this run's secret, or is another")
            return
        ours, theirs = self._tickets(transcript)
        dialed.session = _Session(peer, ours, theirs)
        dialed.socket.send_multipart([PROOF, self._sign(b"dialer", transcript)])
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
        incarnation, role = _read_who(who)
        if incarnation < 0 or incarnation == self._me or len(nonce) != NONCE:
            self._refuse("a peer's greeting was not one")
            return
        mine, my_nonce = _who(self._me, self._role), secrets.token_bytes(NONCE)
        transcript = _transcript(who, nonce, mine, my_nonce)
        while len(self._strangers) >= STRANGERS:
            self._strangers.pop(next(iter(self._strangers)))
        self._strangers[route] = (transcript, incarnation, role)
        self._answer(route, CHALLENGE, mine, my_nonce, self._sign(b"listener", transcript))

    def _judge(self, route: bytes, signature: bytes) -> None:
        transcript, incarnation, role = self._strangers.pop(route, (b"", -1, ""))
        if not transcript or not hmac.compare_digest(self._sign(b"dialer", transcript), signature):
            self._refuse(f"a peer that calls itself {role!r} {incarnation} does not know this run's secret")
            return
        former = self._route_to.get(incarnation)
        if former is not None:  # it dialed again: ZeroMQ reconnected
            del self._sessions[former]
        theirs, ours = self._tickets(transcript)
        self._sessions[route], self._route_to[incarnation] = _Session(incarnation, ours, theirs), route
        for frames in self._waiting.pop(incarnation, ()):
            self._answer(route, ours, *frames)

    def _sign(self, side: bytes, transcript: bytes) -> bytes:
        return hmac.digest(self._secret, b"distgd " + side + b" " + transcript, "sha256")

    def _tickets(self, transcript: bytes) -> tuple[bytes, bytes]:
        """What begins the dialer's messages, and what begins the listener's."""
        dialer, listener = (self._sign(side, transcript)[:TICKET] for side in (b"dialer sends", b"listener sends"))
        return DATA + dialer, DATA + listener

    def _refuse(self, why: str) -> None:
        self.refused += 1
        if why not in self._warned and len(self._warned) < 100:
            self._warned.add(why)
            log.warning("refused: %s", why)


def _tag(frames: list[Any]) -> bytes:
    return bytes(frames[0]) if frames and len(frames[0]) <= len(DATA) + TICKET else b""


def _transcript(dialer: bytes, dialer_nonce: bytes, listener: bytes, listener_nonce: bytes) -> bytes:
    return json.dumps([part.hex() for part in (dialer, dialer_nonce, listener, listener_nonce)]).encode()


def _who(incarnation: int, role: str) -> bytes:
    return json.dumps([incarnation, role]).encode()


def _read_who(who: bytes) -> tuple[int, str]:
    try:
        incarnation, role = json.loads(who) if len(who) <= WHO else (-1, "")
        return (incarnation, role) if type(incarnation) is int and isinstance(role, str) else (-1, "")
    except (ValueError, TypeError):
        return -1, ""


# In memory.


@dataclass(frozen=True)
class Envelope:
    """A message under way."""

    source: int
    destination: int
    message: Any


class InMemoryNetwork:
    """The twin on one thread: `on_send` gets every envelope and decides when to `put` it.

    Arrays are copied, as a wire would.
    """

    def __init__(self, on_send: Callable[[Envelope], None]) -> None:
        self._on_send = on_send
        self._inboxes: dict[int, deque[tuple[int, Any]]] = {}

    def endpoint(self, me: int) -> InMemoryEndpoint:
        """A place in this network."""
        self._inboxes[me] = deque()
        return InMemoryEndpoint(self, me)

    def send(self, envelope: Envelope) -> None:
        """Take a message from an endpoint."""
        message = envelope.message
        arrays = {
            each.name: value.copy()
            for each in fields(message)
            if isinstance(value := getattr(message, each.name), np.ndarray)
        }
        self._on_send(replace(envelope, message=replace(message, **arrays)) if arrays else envelope)

    def put(self, envelope: Envelope) -> None:
        """Deliver; to somebody who has left, in vain."""
        if envelope.destination in self._inboxes:
            self._inboxes[envelope.destination].append((envelope.source, envelope.message))

    def take(self, me: int) -> tuple[int, Any] | None:
        """The oldest message delivered to `me`."""
        inbox = self._inboxes.get(me)
        return inbox.popleft() if inbox else None

    def leave(self, me: int) -> None:
        """Forget an endpoint and what lies in its inbox."""
        self._inboxes.pop(me, None)


class InMemoryEndpoint:
    """An endpoint of an `InMemoryNetwork`; `receive` never waits, as nothing happens meanwhile."""

    def __init__(self, network: InMemoryNetwork, me: int) -> None:
        self._network = network
        self._me = me

    def send(self, to: int, message: Any) -> None:
        self._network.send(Envelope(self._me, to, message))

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """What has been delivered, or None."""
        return self._network.take(self._me)

    def close(self) -> None:
        self._network.leave(self._me)
