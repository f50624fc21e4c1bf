"""Messages between processes, and the memory that processes of one machine share.

    node        among processes of one machine: sockets carry headers, arrays lie in shared segments
    zeromq      between machines, and where the system has no such sockets
    segments    shared memory: allocated whole, nameless, gone with the last process that has it
    proof       how two ends of a connection prove that they know the run's secret
    inmemory    the twin on one thread

An endpoint sends to incarnations and receives from them. What a message means is no business of this room, and how
its arrays travel is none of the actors'. Messages between two processes arrive in order and at most once; what was
under way to a process that died is lost.

Shards and the driver listen, everybody dials, and an answer goes back over the connection that the asker made, so
workers listen on nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

from distgd.transport.inmemory import Envelope, InMemoryEndpoint, InMemoryNetwork
from distgd.transport.node import NodeEndpoint
from distgd.transport.zeromq import ZmqEndpoint

__all__ = ["Endpoint", "Envelope", "InMemoryEndpoint", "InMemoryNetwork", "NodeEndpoint", "ZmqEndpoint"]


class Endpoint(Protocol):
    """One process's place in the network."""

    def send(self, to: int, message: Any) -> None:
        """Hand over a message; never blocks. Arrays may not be rewritten before the receiver has answered."""

    def receive(self, timeout: float) -> tuple[int, Any] | None:
        """The next message and its sender; None after `timeout` seconds.

        An array that can be written to belongs to the receiver. One that cannot is the sender's own memory: it shows
        what the sender writes there, and stays readable when the sender has died.
        """

    def close(self) -> None:
        """Leave."""
