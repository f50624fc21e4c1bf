"""An endpoint with peers on this machine and on others: each is reached the shortest way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distgd.transport.node import AVAILABLE, NodeEndpoint
from distgd.transport.segments import Array
from distgd.transport.zeromq import ZmqEndpoint
from distgd.wire import Codec

NODE = "node:"


@dataclass(frozen=True)
class Place:
    """The machine that a process is on, by any name, and the addresses that it listens on."""

    node: str
    addresses: tuple[str, ...]


class MixedEndpoint:
    """One process's endpoint.

    Args:
        me, role: who this is; part of what is proved.
        secret: the run's, at least 16 bytes.
        listen: who may dial: everybody (`all`), processes of this machine (`near`), or nobody (``).
        host: this machine's address for others, None where there are no others.
        max_bytes: the largest array that travels between machines.
    """

    def __init__(
        self, me: int, role: str, secret: bytes, codec: Codec, *, listen: str, host: str | None, max_bytes: int
    ) -> None:
        self._me = me
        self._near = NodeEndpoint(me, role, secret, codec, listen=bool(listen)) if AVAILABLE else None
        kinds = (*(() if AVAILABLE else ("ipc",)), *(("tcp",) if host else ()))
        heard = {"all": kinds, "near": tuple(kind for kind in kinds if kind == "ipc"), "": ()}[listen]
        far = ZmqEndpoint(me, role, secret, codec, heard, host, max_bytes) if kinds else None
        self._far = far
        self._neighbors: frozenset[int] = frozenset()
        near = (NODE + self._near.address,) if self._near and listen else ()
        self.addresses: tuple[str, ...] = (*near, *(far.addresses if far else ()))

    def meet(self, node: str, places: Mapping[int, Place]) -> None:
        """Learn where everybody is, this process on `node`, and dial those who listen."""
        self._neighbors = frozenset(peer for peer, place in places.items() if place.node == node)
        for peer, place in places.items():
            scheme = "tcp" if peer not in self._neighbors else NODE if self._near else "ipc"
            found = [address for address in place.addresses if address.startswith((scheme, "tcp"))]
            if peer == self._me or not found:
                continue
            if found[0].startswith(NODE) and self._near:
                self._near.connect(peer, found[0].removeprefix(NODE))
            elif self._far:
                self._far.connect(peer, found[0])

    def allocate(self, size: int, dtype: str) -> Array:
        """Zeros, [size]; in memory that processes of this machine are shown without a copy, where there is such."""
        return self._near.allocate(size, dtype) if self._near else np.zeros(size, dtype)

    def send(self, to: int, message: Any) -> None:
        """Send, or queue until `to` has proved itself. Arrays may not be rewritten before the receiver has answered."""
        (self._near if self._is_near(to) else self._far).send(to, message)  # type: ignore[union-attr]

    def _is_near(self, peer: int) -> bool:
        return self._near is not None and (self._far is None or peer in self._neighbors)

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """The next message and its sender; None after `timeout` seconds."""
        if self._far is None or self._near is None:
            return (self._far or self._near).receive(timeout)  # type: ignore[union-attr]
        until = time.monotonic() + timeout
        while (arrived := self._near.receive(0.0) or self._far.receive(0.0)) is None:
            left = until - time.monotonic()
            if left <= 0:
                return None
            self._far.wait(left, self._near.fileno())
        return arrived

    def close(self) -> None:
        """Leave."""
        for endpoint in (self._near, self._far):
            if endpoint is not None:
                endpoint.close()
