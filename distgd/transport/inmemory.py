"""The twin of a network on one thread: whoever makes it decides when a message arrives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np


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
