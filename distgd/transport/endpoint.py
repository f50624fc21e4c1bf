"""One process's place among all others: who is reached how, and who is let in.

Peers of the same machine are reached over `node`, others over `tcp`. A TCP connection that breaks is made anew by the
end that dialed, both prove themselves again, and what was under way is sent again (`session`). A broken one within a
machine means that the other process is gone, and what is sent to it is sent in vain.
"""

from __future__ import annotations

import logging
import math
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import distgd.transport.node as node  # not from the package, which imports this module
import distgd.transport.tcp as tcp
from distgd.transport.channel import CONFIRMED, INTRODUCTION, MESSAGE, RESUMED, Channel
from distgd.transport.proof import STRANGERS, Identity, Introduction, Refused
from distgd.transport.segments import Array
from distgd.transport.session import Session
from distgd.wire import Codec, MalformedMessage

log = logging.getLogger("distgd.transport")

LINGER = 1.0  # seconds that what was sent last may take to prove itself and to leave, at close
PATIENCE = 0.005  # seconds between two looks at whether it has left
REDIAL = 0.05, 1.0  # seconds until a broken connection is made anew: the first time, and at most
NODE, TCP = "node", "tcp"  # what an address begins with, and a colon
_COUNT = struct.Struct("<Q")
_READ, _BOTH = selectors.EVENT_READ, selectors.EVENT_READ | selectors.EVENT_WRITE


@dataclass(frozen=True)
class Place:
    """The machine that a process is on, by any name, and the addresses that it listens on."""

    node: str
    addresses: tuple[str, ...]


@dataclass(eq=False)
class _Link:
    """The way to a peer."""

    introduction: Introduction
    dials: int = -1  # whom this process dialed; -1 where it was dialed
    address: str = ""  # to be dialed when the connection is broken; empty where nobody will
    channel: Channel | None = None  # None while there is no connection
    connected: bool = True
    watched: int = _READ
    peer: int = -1  # who has proved himself to be at the other end
    session: Session[list[Any]] | None = None  # with the peer, over TCP
    resumed: bool = False  # whether the peer has said what it has taken (TCP), so that all else can be sent
    unsent: deque[list[Any]] = field(default_factory=deque)  # until somebody has
    delay: float = REDIAL[0]

    @property
    def holds(self) -> bool:
        """Whether there is something to send once both ends have proved themselves."""
        return bool(self.unsent or (self.session and self.channel and not self.resumed and self.session.rest()))

    @property
    def gone(self) -> bool:
        """For good."""
        return self.channel is None and not self.address


def _anywhere(message: Any) -> None:
    """No array has a place of its own."""


class Endpoint:
    """One process's endpoint.

    Args:
        me, role: who this is; part of what is proved.
        secret: the run's, at least 16 bytes.
        listen: who may dial: everybody (`all`), processes of this machine (`near`), or nobody (``).
        host: this machine's address for others, None where there are no others.
        max_bytes: the largest array that travels between machines; a peer that sends more is cut off.

    Attributes:
        addresses: where this process listens.
        refused: connections and messages so far.
        place: given a message without its arrays, the memory that its array is to be read into, contiguous and of its
            size; None for memory of its own. It is asked while the message arrives, over TCP, about large ones, and
            what arrived may be torn when the connection breaks.

    Example::

        server = Endpoint(1, "server", secret, codec, listen="near")
        worker = Endpoint(2, "worker", secret, codec)
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
        *,
        listen: str = "",
        host: str | None = None,
        max_bytes: int = 1 << 30,
    ) -> None:
        self._me, self._identity, self._codec, self._max_bytes = me, Identity(me, role, secret), codec, max_bytes
        self._shared, self._pool = node.Shared(), tcp.Pool()
        self._selector = selectors.DefaultSelector()
        self._links: dict[_Link, None] = {}  # in the order in which they came
        self._link_to: dict[int, _Link] = {}  # by peer: dialed, or proved
        self._sessions: dict[int, Session[list[Any]]] = {}  # by peer, over TCP
        self._waiting: dict[int, deque[list[Any]]] = {}  # for peers that have not dialed yet
        self._inbox: deque[tuple[int, list[Any]]] = deque()
        self._broken: dict[_Link, float] = {}  # when each is to be dialed again
        self._warned: set[str] = set()
        self._listeners: list[socket.socket] = []
        self.refused = 0
        self.place: Callable[[Any], Array | None] = _anywhere
        near = bool(listen) and node.AVAILABLE
        far = bool(listen) and (not near or (listen == "all" and host is not None))
        found = [self._listen(NODE, *node.listen())] if near else []
        found += [self._listen(TCP, *tcp.listen(host or "127.0.0.1"))] if far else []
        self.addresses = tuple(found)

    def _listen(self, scheme: str, listener: socket.socket, where: str) -> str:
        self._listeners.append(listener)
        self._selector.register(listener, _READ, scheme)
        return f"{scheme}:{where}"

    def meet(self, machine: str, places: Mapping[int, Place]) -> None:
        """Learn where everybody is, this process on `machine`, and dial those who listen, each the shortest way."""
        for peer, place in places.items():
            schemes = (NODE, TCP) if place.node == machine and node.AVAILABLE else (TCP,)
            found = [address for address in place.addresses if address.startswith(schemes)]
            if found and peer != self._me:
                self.connect(peer, found[0])

    def allocate(self, size: int, dtype: str) -> Array:
        """Zeros, [size]; in memory that processes of this machine are shown without a copy, where there is such."""
        return self._shared.allocate(size, dtype) if node.AVAILABLE else np.zeros(size, dtype)

    # Sending.

    def send(self, to: int, message: Any) -> None:
        """Send, or queue until `to` has proved itself; never waits.

        Arrays may not be rewritten before the receiver has answered.

        Raises:
            RunFailed: part of it is larger than `max_bytes`, which the receiver would not take; or there is no memory
                for an array that is in no segment.
        """
        frames = self._codec.encode(message)
        link = self._link_to.get(to)
        if link is None:
            self._waiting.setdefault(to, deque()).append(frames)
        elif link.session is not None:
            link.session.add(frames)
            if link.resumed:
                self._put(link, MESSAGE, frames)
        elif link.peer >= 0:
            self._put(link, MESSAGE, frames)
        elif not link.gone:
            link.unsent.append(frames)

    def _put(self, link: _Link, kind: bytes, frames: list[Any]) -> None:
        assert link.channel is not None
        self._watch(link, held=link.channel.send(kind, frames))

    def _watch(self, link: _Link, *, held: bool) -> None:
        wanted = _BOTH if held else _READ
        if wanted != link.watched and link.channel is not None:
            self._selector.modify(link.channel.socket, wanted, link)
            link.watched = wanted

    # Receiving.

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """The next message and its sender; None after `timeout` seconds.

        An array that can be written to belongs to the receiver. One that cannot is the sender's own memory: it shows
        what the sender writes there, and stays readable when the sender has died.

        Raises:
            MalformedMessage: a peer that knows the secret sent what is no message here. It is lost, nothing else is.
        """
        if not self._inbox:
            until = time.monotonic() + timeout
            while self._take_in(until) and not self._inbox:
                pass
            if not self._inbox:
                return None
        source, frames = self._inbox.popleft()
        return source, self._codec.decode(frames)

    def _take_in(self, until: float) -> bool:
        """Wait for something to arrive and sort it; False once `until` is over."""
        now = time.monotonic()
        again = min(self._broken.values(), default=math.inf)
        for key, what in self._selector.select(max(0.0, min(until, again) - now)):
            if isinstance(key.data, str):
                self._accept(key.data, key.fileobj)  # type: ignore[arg-type]
            elif key.data.channel is not None and key.data.channel.socket is key.fileobj:
                self._turn(key.data, what)
        if self._broken:
            now = time.monotonic()
            for link in [link for link, at in self._broken.items() if at <= now]:
                self._dial(link)
        return now < until

    def _turn(self, link: _Link, what: int) -> None:
        assert link.channel is not None
        if not link.connected:
            self._connected(link)
            return
        if what & selectors.EVENT_WRITE:
            self._watch(link, held=link.channel.send())
        if what & selectors.EVENT_READ:
            self._read(link, link.channel)

    def _read(self, link: _Link, channel: Channel) -> None:
        try:
            for kind, frames in channel.receive():
                if kind == MESSAGE:
                    self._inbox.append((link.peer, frames))
                    if link.session is not None and link.session.took(sum(map(len, frames))):
                        self._confirm(link.peer, link.session)
                elif kind == INTRODUCTION:
                    self._introduced(link, frames)
                else:
                    self._confirmed(link, kind, frames)
        except EOFError:
            self._lost(link)
        except Refused as refused:
            self._refuse(link, str(refused))
        except (ValueError, struct.error) as error:
            if link.session is not None:
                link.session.took(0)  # or it would come again and again
            self._refuse(link, f"incarnation {link.peer} sent what is no message ({error})")

    def _confirm(self, peer: int, session: Session[list[Any]]) -> None:
        """Tell a peer how many of its messages have been taken."""
        link = self._link_to[peer]
        if link.resumed:
            self._put(link, CONFIRMED, [_COUNT.pack(session.told())])

    def _confirmed(self, link: _Link, kind: bytes, frames: list[Any]) -> None:
        """The peer has taken so many; behind a new connection the rest is sent again."""
        if link.session is None:
            raise ValueError("a count from a peer of this machine")
        link.session.confirmed(*_COUNT.unpack(b"".join(frames)))
        if kind == RESUMED and link is self._link_to[link.peer]:
            link.resumed = True
            for _, message in link.session.rest():
                self._put(link, MESSAGE, message)

    def _place(self, head: Any, size: int) -> memoryview | None:
        try:
            place = self.place(self._codec.outline(head))
        except MalformedMessage:  # to be said when it is received
            return None
        return place.data.cast("B") if place is not None and place.nbytes == size else None

    # Connections.

    def connect(self, peer: int, address: str) -> None:
        """Dial `peer`, which may not listen yet where it is on another machine; returns at once."""
        link = _Link(Introduction(self._identity, peer), peer, address)
        self._links[link] = None
        self._link_to[peer] = link
        self._dial(link)

    def _dial(self, link: _Link) -> None:
        self._broken.pop(link, None)
        link.introduction = Introduction(self._identity, link.dials)
        scheme, _, where = link.address.partition(":")
        try:
            dialed, link.connected = (node if scheme == NODE else tcp).dial(where)
        except OSError:
            self._lost(link)
            return
        self._open(link, scheme, dialed, _READ if link.connected else _BOTH)
        if link.connected:
            self._put(link, INTRODUCTION, link.introduction.opening())

    def _connected(self, link: _Link) -> None:
        """Whether a connection was made is known."""
        assert link.channel is not None
        if link.channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._lost(link)
            return
        link.connected = True
        self._put(link, INTRODUCTION, link.introduction.opening())

    def _open(self, link: _Link, scheme: str, connection: socket.socket, watched: int) -> None:
        if scheme == NODE:
            link.channel = node.NodeChannel(connection, self._shared)
        else:
            link.channel = tcp.TcpChannel(connection, self._pool, self._max_bytes, self._place)
        link.watched = watched
        self._selector.register(connection, watched, link)

    def _accept(self, scheme: str, listener: socket.socket) -> None:
        strangers = [each for each in self._links if each.peer < 0 and each.dials < 0]
        for some in strangers[: len(strangers) + 1 - STRANGERS]:
            self._lost(some)
        try:
            connection = listener.accept()[0]
        except BlockingIOError:
            return
        except OSError as error:
            self._warn(f"a connection could not be taken ({error})")
            for some in strangers:
                self._lost(some)
            return
        link = _Link(Introduction(self._identity))
        self._links[link] = None
        self._open(link, scheme, connection, _READ)

    def _introduced(self, link: _Link, frames: list[bytes]) -> None:
        answer = link.introduction.heard([bytes(frame) for frame in frames])
        if answer is not None:
            self._put(link, INTRODUCTION, answer)
        if link.introduction.peer >= 0:
            self._opened(link, link.introduction.peer)

    def _opened(self, link: _Link, peer: int) -> None:
        """Both ends may have dialed: each goes on sending over its own connection, so that its order is kept."""
        assert link.channel is not None
        link.peer, link.delay, link.channel.trusted = peer, REDIAL[0], True
        former = self._link_to.setdefault(peer, link)
        if former is not link and former.dials < 0:
            self._link_to[peer] = link  # it dialed again
        if link.dials < 0:  # what an older one may still bring is sent again
            for other in [o for o in self._links if o.peer == peer and o.dials < 0 and o is not link]:
                self._lost(other)
        unsent = (*self._waiting.pop(peer, ()), *link.unsent)
        link.unsent.clear()
        if isinstance(link.channel, tcp.TcpChannel):
            link.session = self._sessions.setdefault(peer, Session())
            for frames in unsent:
                link.session.add(frames)
            self._put(link, RESUMED, [_COUNT.pack(link.session.told())])
            return
        for frames in unsent:
            self._put(link, MESSAGE, frames)

    def _lost(self, link: _Link) -> None:
        """There is no connection, or none any more. What it brought stays, and so does memory that somebody reads."""
        link.peer, link.resumed = -1, False
        if link.channel is not None:
            self._selector.unregister(link.channel.socket)
            link.channel.close(force=True)
            link.channel = None
        if link.address.startswith(TCP):
            self._broken[link] = time.monotonic() + link.delay
            link.delay = min(2 * link.delay, REDIAL[1])
        else:
            link.address = ""
            link.unsent.clear()
            self._links.pop(link, None)

    def _refuse(self, link: _Link, why: str) -> None:
        self.refused += 1
        self._warn(f"refused: {why}")
        self._lost(link)

    def _warn(self, text: str) -> None:
        if text not in self._warned and len(self._warned) < 100:
            self._warned.add(text)
            log.warning("%s", text)

    def close(self) -> None:
        """Close every connection. What was sent before gets a second to leave; arrays that others read stay theirs."""
        until = time.monotonic() + LINGER
        while any(link.holds for link in self._links) and self._take_in(until):
            pass
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._listeners.clear()
        links = [link for link in self._links if link.channel is not None]
        while links := [link for link in links if not self._left(link, force=time.monotonic() >= until)]:
            self._take_in(time.monotonic() + PATIENCE)
        self._links.clear()
        self._broken.clear()
        self._selector.close()
        self._shared.close()

    def _left(self, link: _Link, *, force: bool) -> bool:
        link.address = ""
        if link.channel is not None and link.channel.close(force=force):
            self._selector.unregister(link.channel.socket)
            link.channel = None
        return link.channel is None
