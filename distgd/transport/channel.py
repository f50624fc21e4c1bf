"""What a connection must be able to do for an endpoint; `node` and `tcp` do it each in their way."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

INTRODUCTION, MESSAGE = b"I", b"D"  # what a record is
RESUMED, CONFIRMED = b"R", b"C"  # how many messages this end has taken: when a connection is made, and later

Record = tuple[bytes, list[Any]]
"""Its kind, and its frames: bytes-like, small ones before all others."""


class Channel(Protocol):
    """One connection. Nothing here waits.

    Attributes:
        socket: to be watched.
        trusted: whether the other end has proved itself; before, it is heard on nothing else and given no memory.
    """

    socket: socket.socket
    trusted: bool

    def send(self, kind: bytes = MESSAGE, frames: Sequence[Any] = ()) -> bool:
        """Put a record, if there are frames, behind what is held, and let the kernel have all that it takes.

        Arrays are read until they have left. To somebody who is gone it is in vain, and `receive` says so.

        Returns:
            Whether something is held: the kernel does not take it yet.
        """

    def receive(self) -> Iterator[Record]:
        """What has arrived; not necessarily all.

        Raises:
            EOFError: the other end is gone.
            ValueError: it sent what is no record, or not for strangers to send.
        """

    def close(self, *, force: bool) -> bool:
        """Leave: at once if `force`, else only when all that was sent is on its way; whether it did."""
