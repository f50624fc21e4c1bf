"""How two ends of a connection prove to each other that they know the run's secret.

HMAC-SHA256 over both nonces, incarnations and roles, once a connection (challenge-response as in RFC 2195, in both
directions):

    dialer    -> listener    who, nonce
    dialer    <- listener    who, nonce, HMAC("listener", all of it)
    dialer    -> listener    HMAC("dialer", all of it)

What follows on the connection is in clear: who can read or change what is under way is not kept out.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

NONCE = 32  # bytes
WHO = 256  # bytes; what a stranger says of himself is parsed before he has proved anything
STRANGERS = 256  # connections that may be about to prove themselves at one time
HELLO, CHALLENGE, PROOF = b"H", b"C", b"P"


class Refused(Exception):
    """The other end of a connection does not know the secret, or is another than expected; says why."""


class Introduction:
    """One end of a connection until both have proved themselves: what to say, and who is at the other end.

    Args:
        dials: whom this end dialed; -1 where it was dialed.

    Attributes:
        peer: the other end's incarnation, -1 until it has proved itself.
    """

    def __init__(self, identity: Identity, dials: int = -1) -> None:
        self._identity, self._dials = identity, dials
        self._who, self._nonce = identity.greet()
        self._challenge: Challenge | None = None
        self.peer = -1

    def opening(self) -> list[bytes]:
        """What the end that dialed says first."""
        return [HELLO, self._who, self._nonce]

    def heard(self, frames: Sequence[bytes]) -> list[bytes] | None:
        """Take what the other end said; what to answer.

        Raises:
            Refused: there is nothing more to say to it.
        """
        if self.peer >= 0:
            raise Refused("a peer that had proved itself introduced itself again")
        match self._dials >= 0, list(frames):
            case False, [b"H", who, nonce] if self._challenge is None:
                return self._greeted(who, nonce)
            case False, [b"P", proof] if self._challenge is not None:
                self._judge(self._challenge, proof)
                return None
            case True, [b"C", who, nonce, signature]:
                return self._prove((who, nonce, signature))
        raise Refused(f"a peer without a session sent {b''.join(frames)[:1]!r}")

    def _greeted(self, who: bytes, nonce: bytes) -> list[bytes]:
        self._challenge = self._identity.challenge(who, nonce)
        if self._challenge is None:
            raise Refused("a peer's greeting was not one")
        return [CHALLENGE, *self._challenge.frames]

    def _prove(self, frames: tuple[bytes, ...]) -> list[bytes]:
        proof = self._identity.prove(self._dials, self._nonce, frames)
        if proof is None:
            why = "does not know this run's secret, or is another"
            raise Refused(f"the listener at incarnation {self._dials}'s address {why}")
        self.peer = self._dials
        return [PROOF, proof]

    def _judge(self, challenge: Challenge, proof: bytes) -> None:
        if not self._identity.accepts(challenge, proof):
            who = f"{challenge.role!r} {challenge.peer}"
            raise Refused(f"a peer that calls itself {who} does not know this run's secret")
        self.peer = challenge.peer


@dataclass(frozen=True)
class Challenge:
    """A listener's answer to a greeting: `frames` are sent, the dialer signs `transcript`."""

    peer: int
    role: str
    transcript: bytes
    frames: tuple[bytes, bytes, bytes]


@dataclass(frozen=True)
class Identity:
    """One process in the exchange.

    Args:
        secret: the run's, at least 16 bytes.
    """

    incarnation: int
    role: str
    secret: bytes

    @property
    def who(self) -> bytes:
        """The incarnation and the role as they travel."""
        return json.dumps([self.incarnation, self.role]).encode()

    def greet(self) -> tuple[bytes, bytes]:
        """What a dialer says first: who it is, and a nonce to keep."""
        return self.who, secrets.token_bytes(NONCE)

    def challenge(self, who: bytes, nonce: bytes) -> Challenge | None:
        """A listener's answer; None where the greeting is none, or names this process itself."""
        peer, role = _read(who)
        if peer < 0 or peer == self.incarnation or len(nonce) != NONCE:
            return None
        mine, my_nonce = self.greet()
        transcript = _transcript(who, nonce, mine, my_nonce)
        return Challenge(peer, role, transcript, (mine, my_nonce, self.sign(b"listener", transcript)))

    def prove(self, peer: int, nonce: bytes, frames: tuple[bytes, ...]) -> bytes | None:
        """A dialer's proof; None where the listener is not `peer` or does not know the secret.

        Args:
            nonce: of this process's own greeting.
            frames: of the listener's challenge.
        """
        who, their_nonce, signature = frames
        transcript = _transcript(self.who, nonce, who, their_nonce)
        if _read(who)[0] != peer or not hmac.compare_digest(self.sign(b"listener", transcript), signature):
            return None
        return self.sign(b"dialer", transcript)

    def accepts(self, challenge: Challenge, proof: bytes) -> bool:
        """Whether a dialer's proof is one."""
        return hmac.compare_digest(self.sign(b"dialer", challenge.transcript), proof)

    def sign(self, side: bytes, transcript: bytes) -> bytes:
        """32 bytes that only those who know the secret can make."""
        return hmac.digest(self.secret, b"distgd " + side + b" " + transcript, "sha256")


def _transcript(dialer: bytes, dialer_nonce: bytes, listener: bytes, listener_nonce: bytes) -> bytes:
    return json.dumps([part.hex() for part in (dialer, dialer_nonce, listener, listener_nonce)]).encode()


def _read(who: bytes) -> tuple[int, str]:
    try:
        incarnation, role = json.loads(who) if len(who) <= WHO else (-1, "")
        return (incarnation, role) if type(incarnation) is int and isinstance(role, str) else (-1, "")
    except (ValueError, TypeError):
        return -1, ""
