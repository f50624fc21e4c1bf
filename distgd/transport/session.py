"""What two living processes have sent each other, whatever becomes of the connections between them.

A connection that breaks loses what was under way, and neither end knows how much. Each therefore counts what it has
taken, tells the other from time to time and whenever a connection is made, and the other sends the rest again. So
messages arrive once and in order as long as both processes live (go-back-n).

Nothing is copied to be sent again: arrays are not rewritten before the receiver has answered, or what it would read in
them is of a version that nobody counts any more.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

EVERY, EVERY_BYTES = 16, 1 << 20
"""After so many messages, or bytes, the sender is told."""

Message = TypeVar("Message")


class Session(Generic[Message]):
    """Between this process and one peer.

    Attributes:
        sent: messages so far.
        taken: messages of the peer's so far.

    >>> here, there = Session(), Session()
    >>> [here.add(word) for word in ("a", "b", "c")]
    [0, 1, 2]
    >>> there.take(0), there.take(2)  # b is lost, so that c has to come again
    (True, False)
    >>> here.confirmed(there.taken)
    >>> here.rest()
    [(1, 'b'), (2, 'c')]
    """

    def __init__(self) -> None:
        self.sent = self.taken = 0
        self._unconfirmed: deque[Message] = deque()
        self._owed = self._owed_bytes = 0  # taken, and the peer has not been told

    def add(self, message: Message) -> int:
        """Keep a message until it is confirmed; its number."""
        self._unconfirmed.append(message)
        self.sent += 1
        return self.sent - 1

    def confirmed(self, count: int) -> None:
        """The peer has taken so many; told later about fewer, it had taken more.

        Raises:
            ValueError: more than were sent.
        """
        if count > self.sent:
            raise ValueError(f"{count} messages confirmed of {self.sent} that were sent")
        while len(self._unconfirmed) > self.sent - count:
            self._unconfirmed.popleft()

    def rest(self) -> list[tuple[int, Message]]:
        """What is not confirmed, to be sent again; with its numbers."""
        first = self.sent - len(self._unconfirmed)
        return list(enumerate(self._unconfirmed, first))

    def take(self, number: int) -> bool:
        """Whether a message that has arrived is the next one; any other was taken before, or comes too early."""
        if number != self.taken:
            return False
        self.took(0)
        return True

    def took(self, size: int) -> bool:
        """Count a message of so many bytes that came in order; whether the peer is to be told now."""
        self.taken += 1
        self._owed += 1
        self._owed_bytes += size
        return self._owed >= EVERY or self._owed_bytes >= EVERY_BYTES

    def told(self) -> int:
        """How many have been taken; the peer is being told."""
        self._owed = self._owed_bytes = 0
        return self.taken
