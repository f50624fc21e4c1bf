"""Messages arrive whole, in order, at most once, and from whom they say; nobody without the secret gets a word in."""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from distgd.errors import RunFailed
from distgd.transport import Endpoint, Envelope, InMemoryNetwork
from distgd.transport.node import AVAILABLE
from distgd.transport.tcp import LARGE, SCRATCH, Incoming, Pool
from distgd.wire import Codec, MalformedMessage

DEADLINE = 20.0  # seconds until a test gives up; nothing waits for it to pass
SECRET = secrets.token_bytes(32)
SERVER, WORKER, OTHER = 1, 2, 3
HOST = "127.0.0.1"
WAYS = [pytest.param("node", marks=pytest.mark.skipif(not AVAILABLE, reason="Linux only")), "tcp"]


@dataclass(frozen=True, slots=True)
class Note:
    number: int
    values: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True, slots=True)
class Foreign:
    number: int


CODEC = Codec((Note,))
Open = Callable[..., Endpoint]


@pytest.fixture
def open_endpoint() -> Iterator[Open]:
    """Opens endpoints and closes them at the end."""
    opened: list[Endpoint] = []

    def opens(
        me: int, listen: str = "", secret: bytes = SECRET, codec: Codec = CODEC, max_bytes: int = 1 << 30
    ) -> Endpoint:
        opened.append(Endpoint(me, f"role-{me}", secret, codec, listen=listen, host=HOST, max_bytes=max_bytes))
        return opened[-1]

    yield opens
    close_all(opened)


def close_all(endpoints: list[Endpoint]) -> None:
    """All at once, as each waits up to its linger for a peer that does not read any more."""
    threads = [threading.Thread(target=endpoint.close) for endpoint in endpoints]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def address(endpoint: Endpoint, way: str = "tcp") -> str:
    return next(each for each in endpoint.addresses if each.startswith(way))


def record(kind: bytes, *frames: bytes) -> bytes:
    """What travels over TCP."""
    sizes = [len(frame) for frame in frames]
    return struct.pack(f"<cB{len(sizes)}Q", kind, len(sizes), *sizes) + b"".join(frames)


def records(data: bytes) -> list[tuple[bytes, list[bytes]]]:
    """The same, read; what is not whole is left out."""
    found, at = [], 0
    while len(data) - at >= 2:
        kind, count = struct.unpack_from("<cB", data, at)
        if len(data) - at < 2 + 8 * count:
            break
        sizes = struct.unpack_from(f"<{count}Q", data, at + 2)
        at += 2 + 8 * count
        if len(data) - at < sum(sizes):
            break
        frames = []
        for size in sizes:
            frames.append(data[at : at + size])
            at += size
        found.append((kind, frames))
    return found


class Raw:
    """A program that speaks TCP and is no endpoint: an attacker."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("tcp:").rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setblocking(False)
        self.heard = b""
        self.cut_off = False

    def send(self, data: bytes) -> None:
        """Everything, or until the other end hangs up."""
        self.socket.settimeout(DEADLINE)
        with suppress(OSError):
            self.socket.sendall(data)
        self.socket.setblocking(False)

    def turn(self) -> None:
        """Hear what has been said."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.heard += data
        self.cut_off |= not data


@pytest.fixture
def raw() -> Iterator[Callable[[str], Raw]]:
    opened: list[Raw] = []

    def opens(address: str) -> Raw:
        opened.append(Raw(address))
        return opened[-1]

    yield opens
    for each in opened:
        each.socket.close()


class Relay:
    """Stands between dialers and a listener, passes everything on, and keeps a record of what the dialers said."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.listener = socket.create_server((HOST, 0))
        self.listener.setblocking(False)
        self.address = f"tcp:{HOST}:{self.listener.getsockname()[1]}"
        self.pairs: list[tuple[socket.socket, Raw]] = []
        self.said: list[bytes] = []  # of each connection

    def turn(self) -> None:
        with suppress(BlockingIOError):
            front, _ = self.listener.accept()
            front.setblocking(False)
            self.pairs.append((front, Raw(self.target)))
            self.said.append(b"")
        for number, (front, back) in enumerate(self.pairs):
            with suppress(OSError):
                data = front.recv(1 << 16)
                self.said[number] += data
                back.send(data)
            back.turn()
            with suppress(OSError):
                front.sendall(back.heard)
                back.heard = b""

    def breaks(self) -> None:
        """Whatever is under way is lost."""
        for front, back in self.pairs:
            front.close()
            back.socket.close()

    def close(self) -> None:
        self.breaks()
        self.listener.close()


@pytest.fixture
def open_relay() -> Iterator[Callable[[str], Relay]]:
    opened: list[Relay] = []

    def opens(target: str) -> Relay:
        opened.append(Relay(target))
        return opened[-1]

    yield opens
    for relay in opened:
        relay.close()


Turn = Endpoint | Relay | Raw | Callable[[], object]
Mail = list[tuple[int, int, Any]]  # receiver's place among the parties, sender, message


def run_until(done: Callable[[Mail], object], *parties: Turn) -> Mail:
    """Give everybody a turn, over and over, until `done` with what has arrived."""
    mail: Mail = []
    until = time.monotonic() + DEADLINE
    while not done(mail):
        assert time.monotonic() < until, f"nothing came of it; arrived: {mail}"
        for place, party in enumerate(parties):
            if isinstance(party, Endpoint):
                if (arrived := party.receive(0.002)) is not None:
                    mail.append((place, *arrived))
            elif isinstance(party, Relay | Raw):
                party.turn()
            else:
                party()
    return mail


def arrived(count: int, *parties: Turn) -> Mail:
    return run_until(lambda mail: len(mail) >= count, *parties)


def pair(open_endpoint: Open, way: str = "tcp") -> tuple[Endpoint, Endpoint]:
    server, worker = open_endpoint(SERVER, "all"), open_endpoint(WORKER)
    worker.connect(SERVER, address(server, way))
    return server, worker


def assert_still_serves(server: Endpoint, open_endpoint: Open) -> None:
    """An honest peer gets through, and its message is the first that the server hears."""
    honest = open_endpoint(OTHER)
    honest.connect(SERVER, address(server))
    honest.send(SERVER, Note(7))
    assert arrived(1, server, honest) == [(0, OTHER, Note(7))]


@pytest.mark.parametrize("way", WAYS)
def test_messages_go_there_and_back(open_endpoint: Open, way: str) -> None:
    server, worker = pair(open_endpoint, way)
    assert worker.addresses == ()
    worker.send(SERVER, Note(1))
    server.send(WORKER, Note(2))  # waits for the worker's proof
    assert sorted(arrived(2, server, worker)) == [(0, WORKER, Note(1)), (1, SERVER, Note(2))]
    server.send(WORKER, Note(3))
    assert arrived(1, server, worker) == [(1, SERVER, Note(3))]


@pytest.mark.skipif(not AVAILABLE, reason="Linux only")
def test_one_process_listens_on_both_and_knows_its_peers_apart(open_endpoint: Open) -> None:
    server, worker, other = open_endpoint(SERVER, "all"), open_endpoint(WORKER), open_endpoint(OTHER)
    worker.connect(SERVER, address(server, "node"))
    other.connect(SERVER, address(server, "tcp"))
    worker.send(SERVER, Note(WORKER))
    other.send(SERVER, Note(OTHER))
    assert {(source, note.number) for _, source, note in arrived(2, server, worker, other)} == {(2, 2), (3, 3)}
    server.send(OTHER, Note(30))
    server.send(WORKER, Note(20))
    assert sorted(arrived(2, server, worker, other)) == [(1, SERVER, Note(20)), (2, SERVER, Note(30))]


@pytest.mark.parametrize(("listen", "host", "ways"), [("", HOST, ""), ("near", HOST, "n"), ("all", None, "n")])
def test_nobody_listens_beyond_what_is_asked(listen: str, host: str | None, ways: str) -> None:
    endpoint = Endpoint(SERVER, "server", SECRET, CODEC, listen=listen, host=host)
    ways = ways if AVAILABLE else ways.replace("n", "t")
    assert [each[0] for each in endpoint.addresses] == list(ways)
    endpoint.close()


@pytest.mark.parametrize("way", WAYS)
def test_messages_of_a_pair_keep_their_order_also_those_that_waited_for_the_proof(
    open_endpoint: Open, way: str
) -> None:
    server, worker = pair(open_endpoint, way)
    for number in range(300):
        worker.send(SERVER, Note(number))
        server.send(WORKER, Note(number))
        if number == 150:
            mail = arrived(1, server, worker)
    mail += arrived(600 - len(mail), server, worker)
    for place in (0, 1):
        assert [note.number for receiver, _, note in mail if receiver == place] == list(range(300))


@pytest.mark.parametrize("way", WAYS)
def test_large_arrays_arrive_whole_also_both_ways_at_once(open_endpoint: Open, way: str) -> None:
    """More than the kernel takes: each end reads while it has something left to send."""
    server, worker = pair(open_endpoint, way)
    values = np.arange(10_000_000, dtype=np.float32)  # 40 MB
    worker.send(SERVER, Note(1, values))
    server.send(WORKER, Note(2, values))
    for _, _, note in arrived(2, server, worker):
        assert np.array_equal(note.values, values)


@pytest.mark.parametrize("way", WAYS)
def test_what_arrived_is_the_receivers_own(open_endpoint: Open, way: str) -> None:
    server, worker = pair(open_endpoint, way)
    values = np.zeros(100_000)
    worker.send(SERVER, Note(1, values))
    ((_, _, note),) = arrived(1, server, worker)
    values += 1
    assert not note.values.any()
    note.values[:] = 2.0
    worker.send(SERVER, Note(2, values))
    ((_, _, later),) = arrived(1, server, worker)
    assert (note.values == 2.0).all(), "its memory is used again only when nobody has it"
    assert (later.values == 1.0).all()


def test_an_array_that_has_a_place_is_read_into_it(open_endpoint: Open) -> None:
    server, worker = pair(open_endpoint)
    asked = []
    places = {1: np.zeros(LARGE), 2: np.zeros(7)}

    def place(message: Note) -> np.ndarray[Any, Any] | None:
        asked.append(message)
        return places.get(message.number)

    server.place = place
    for number in (1, 2, 3):
        worker.send(SERVER, Note(number, np.full(LARGE, float(number))))
    worker.send(SERVER, Note(4, np.zeros(7)))  # small
    notes = [note for _, _, note in arrived(4, server, worker)]
    assert asked == [Note(1), Note(2), Note(3)]
    assert np.shares_memory(notes[0].values, places[1])
    assert (places[1] == 1.0).all()
    assert not places[2].any(), "of another size"
    for note in notes[1:3]:
        assert (note.values == float(note.number)).all()


def test_dialing_before_anybody_listens(open_endpoint: Open) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    worker = open_endpoint(WORKER)
    worker.connect(SERVER, f"tcp:{HOST}:{port}")
    worker.send(SERVER, Note(1))
    assert worker.receive(0.1) is None
    server = open_endpoint(SERVER, "all")
    relay = Relay(address(server))
    relay.listener.close()
    relay.listener = socket.create_server((HOST, port))
    relay.listener.setblocking(False)
    assert arrived(1, server, worker, relay) == [(0, WORKER, Note(1))]
    relay.close()


@pytest.mark.parametrize("way", WAYS)
def test_what_was_sent_right_before_close_arrives_even_if_nothing_was_proved_yet(open_endpoint: Open, way: str) -> None:
    server, worker = pair(open_endpoint, way)
    values = np.zeros(1_000_000)
    worker.send(SERVER, Note(1, values))
    server.send(WORKER, Note(2, values))  # nobody reads it
    closing = threading.Thread(target=worker.close)
    closing.start()
    ((_, source, note),) = arrived(1, server)
    assert (source, note.number, note.values.size) == (WORKER, 1, values.size)
    closing.join()


def test_after_a_broken_connection_peers_prove_themselves_again_and_nothing_arrives_twice(
    open_endpoint: Open, open_relay: Callable[[str], Relay]
) -> None:
    server, worker = open_endpoint(SERVER, "all"), open_endpoint(WORKER)
    relay = open_relay(address(server))
    worker.connect(SERVER, relay.address)
    worker.send(SERVER, Note(0))
    arrived(1, server, worker, relay)
    relay.breaks()
    sent = iter(range(1, 1_000_000))
    mail = run_until(lambda mail: len(mail) >= 5, server, worker, relay, lambda: worker.send(SERVER, Note(next(sent))))
    numbers = [note.number for _, _, note in mail]
    assert numbers == sorted(set(numbers))
    for said in relay.said:
        assert said.startswith(b"I")
    assert len(relay.said) == 2
    server.send(WORKER, Note(-1))  # goes over the new connection
    run_until(lambda mail: (1, SERVER, Note(-1)) in mail, server, worker, relay)


def test_the_listener_takes_the_newer_of_two_connections_of_one_peer(
    open_endpoint: Open, open_relay: Callable[[str], Relay]
) -> None:
    """The older one may be broken without anybody having noticed."""
    server, worker = open_endpoint(SERVER, "all"), open_endpoint(WORKER)
    relay = open_relay(address(server))
    worker.connect(SERVER, relay.address)
    worker.send(SERVER, Note(0))
    arrived(1, server, worker, relay)
    relay.pairs[0][0].close()  # at the worker's side only
    server.send(WORKER, Note(1))
    worker.send(SERVER, Note(2))
    run_until(lambda _: len(relay.said) == 2, server, worker, relay, lambda: worker.send(SERVER, Note(3)))
    run_until(lambda mail: (0, WORKER, Note(3)) in mail, server, worker, relay)
    server.send(WORKER, Note(4))
    run_until(lambda mail: (1, SERVER, Note(4)) in mail, server, worker, relay)


def broken_again_and_again(seed: int, open_endpoint: Open, open_relay: Callable[[str], Relay]) -> list[list[Any]]:
    """What each end hears of the other's 60 messages, large ones among them, as connections break."""
    chance, count = random.Random(seed), 60
    server, worker = open_endpoint(SERVER, "all"), open_endpoint(WORKER)
    relay = open_relay(address(server))
    worker.connect(SERVER, relay.address)
    heard: list[list[Any]] = [[], []]
    sent, breaks, until = [0, 0], 0, time.monotonic() + DEADLINE
    while min(map(len, heard)) < count and time.monotonic() < until:
        for place, (end, to) in enumerate(((server, WORKER), (worker, SERVER))):
            if sent[place] < count and chance.random() < 0.5:
                size = chance.choice([0, 3, 5000, 300_000])
                end.send(to, Note(sent[place], values=np.full(size, sent[place], np.float32)))
                sent[place] += 1
            if (mail := end.receive(0.0)) is not None:
                heard[place].append(mail[1])
        relay.turn()
        if breaks < 12 and chance.random() < 0.1:
            relay.breaks()
            relay.pairs.clear()
            breaks += 1
    assert breaks >= 3
    return heard


@pytest.mark.parametrize("seed", range(6))
def test_whatever_breaks_between_two_that_live_everything_arrives_once_and_in_order(
    open_endpoint: Open, open_relay: Callable[[str], Relay], seed: int
) -> None:
    for heard in broken_again_and_again(seed, open_endpoint, open_relay):
        assert [note.number for note in heard] == list(range(60))
        assert all((note.values == note.number).all() for note in heard)


def test_without_a_session_it_would_not(
    open_endpoint: Open, open_relay: Callable[[str], Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: nothing is sent again."""
    monkeypatch.setattr("distgd.transport.session.Session.rest", lambda session: [])
    monkeypatch.setattr(sys.modules[__name__], "DEADLINE", 3.0)
    lost = [60 - len(heard) for heard in broken_again_and_again(0, open_endpoint, open_relay)]
    assert max(lost) > 0


# Strangers.


def test_a_dialer_without_the_secret_is_refused(open_endpoint: Open, caplog: pytest.LogCaptureFixture) -> None:
    server, thief = open_endpoint(SERVER, "all"), open_endpoint(WORKER, secret=secrets.token_bytes(32))
    thief.connect(SERVER, address(server))
    thief.send(SERVER, Note(1))
    server.send(WORKER, Note(2))
    with caplog.at_level(logging.WARNING, "distgd.transport"):
        run_until(lambda _: thief.refused > 0, server, thief)
    assert "does not know this run's secret" in caplog.text
    assert_still_serves(server, open_endpoint)


def hello(incarnation: int) -> bytes:
    return record(b"I", b"H", json.dumps([incarnation, "worker"]).encode(), bytes(32))


def test_a_dialer_that_skips_the_proof_or_forges_it_is_refused(
    open_endpoint: Open, raw: Callable[[str], Raw], caplog: pytest.LogCaptureFixture
) -> None:
    server = open_endpoint(SERVER, "all")
    impatient = raw(address(server))
    impatient.send(record(b"D", *map(bytes, CODEC.encode(Note(1)))))
    assert run_until(lambda _: impatient.cut_off, server, impatient) == []
    thief = raw(address(server))
    thief.send(hello(2))
    run_until(lambda _: records(thief.heard), server, thief)
    ((kind, (tag, _, _, signature)),) = records(thief.heard)
    assert (kind, tag) == (b"I", b"C")
    thief.send(record(b"I", b"P", signature) + record(b"D", *map(bytes, CODEC.encode(Note(2)))))  # reflected
    assert run_until(lambda _: thief.cut_off, server, thief) == []
    assert server.refused == 2
    assert_still_serves(server, open_endpoint)


def test_a_listener_without_the_secret_hears_nothing_and_is_not_heard(open_endpoint: Open) -> None:
    fake, worker = open_endpoint(SERVER, "all", secret=secrets.token_bytes(32)), open_endpoint(WORKER)
    worker.connect(SERVER, address(fake))
    worker.send(SERVER, Note(1))
    fake.send(WORKER, Note(2))
    assert run_until(lambda _: worker.refused > 0, fake, worker) == []
    assert fake.refused == 0  # no proof and no message was offered to it


def test_a_listener_that_is_another_than_expected_is_refused(open_endpoint: Open) -> None:
    other, worker = open_endpoint(OTHER, "all"), open_endpoint(WORKER)
    worker.connect(SERVER, address(other))
    worker.send(SERVER, Note(1))
    assert run_until(lambda _: worker.refused > 0, other, worker) == []


def test_a_recorded_conversation_is_worth_nothing(
    open_endpoint: Open, raw: Callable[[str], Raw], open_relay: Callable[[str], Relay]
) -> None:
    server, worker = open_endpoint(SERVER, "all"), open_endpoint(WORKER)
    relay = open_relay(address(server))
    worker.connect(SERVER, relay.address)
    worker.send(SERVER, Note(1))
    arrived(1, server, worker, relay)
    assert [(kind, frames[0][:1]) for kind, frames in records(relay.said[0])][:2] == [(b"I", b"H"), (b"I", b"P")]
    thief = raw(address(server))
    thief.send(relay.said[0])
    assert run_until(lambda _: thief.cut_off, server, thief) == []
    assert server.refused == 1
    assert_still_serves(server, open_endpoint)


def test_who_takes_over_a_dead_listeners_address_has_to_prove_himself(open_endpoint: Open) -> None:
    server, worker = pair(open_endpoint)
    worker.send(SERVER, Note(1))
    arrived(1, server, worker)
    host, port = address(server).removeprefix("tcp:").rsplit(":", 1)
    server.close()
    with socket.create_server((host, int(port))) as impostor:
        impostor.settimeout(0.002)
        heard: list[bytes] = []

        def listens() -> None:
            worker.send(SERVER, Note(2))
            with suppress(TimeoutError):
                taken, _ = impostor.accept()
                with taken:
                    taken.settimeout(0.002)
                    worker.receive(0.05)
                    with suppress(TimeoutError):
                        heard.append(taken.recv(1 << 16))
                    taken.sendall(record(b"D", *map(bytes, CODEC.encode(Note(666)))))
                    worker.receive(0.05)

        assert run_until(lambda _: worker.refused > 0, worker, listens) == []
    assert all(kind == b"I" for data in heard for kind, _ in records(data))


def test_a_peer_speaks_for_nobody_else(open_endpoint: Open, raw: Callable[[str], Raw]) -> None:
    server = open_endpoint(SERVER, "all")
    stranger = raw(address(server))
    stranger.send(hello(SERVER))  # the server's own incarnation
    run_until(lambda _: stranger.cut_off, server, stranger)
    assert server.refused == 1
    twice = raw(address(server))
    twice.send(hello(2) + hello(3))
    run_until(lambda _: twice.cut_off, server, twice)
    assert server.refused == 2
    assert_still_serves(server, open_endpoint)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        record(b"I", b"H"),
        record(b"I", b""),
        record(b"I", b"H", b"", bytes(32)),
        record(b"I", b"H", b"[" * 1000, bytes(32)),  # deeper than a parser goes
        record(b"I", b"H", b'[true,"worker"]', bytes(32)),
        record(b"I", b"H", b'[-2,"worker"]', bytes(32)),
        record(b"I", b"H", b'[2,"worker"]', b"short"),
        record(b"I", b"P", bytes(32)),
        record(b"I", b"C", b'[1,"server"]', bytes(32), bytes(32)),
        record(b"I", *[b""] * 255),
        struct.pack("<cB", b"I", 0),
        struct.pack("<cBQ", b"I", 1, 1 << 60),  # no memory is taken for it
        struct.pack("<cBQ", b"I", 1, 2000),
        struct.pack("<cBQ", b"D", 1, 10),
    ],
)
def test_nonsense_from_strangers_harms_nobody(open_endpoint: Open, raw: Callable[[str], Raw], data: bytes) -> None:
    server = open_endpoint(SERVER, "all")
    stranger = raw(address(server))
    stranger.send(data)
    run_until(lambda _: stranger.cut_off, server, stranger)
    assert server.refused == 1
    assert_still_serves(server, open_endpoint)


def test_strangers_who_say_nothing_make_room_for_others(open_endpoint: Open) -> None:
    server = open_endpoint(SERVER, "all")
    host, port = address(server).removeprefix("tcp:").rsplit(":", 1)
    crowd = [socket.create_connection((host, int(port))) for _ in range(300)]
    for _ in crowd:
        assert server.receive(0.0) is None
    assert_still_serves(server, open_endpoint)
    for each in crowd:
        each.close()


def test_a_flood_outlasts_no_deadline(open_endpoint: Open) -> None:
    """Of somebody who knows the secret; others are cut off at their first word."""
    server, worker = pair(open_endpoint)
    for _ in range(20_000):
        worker.send(SERVER, Note(1))
    began = time.monotonic()
    count = 0
    while time.monotonic() < began + 0.2:
        worker.receive(0.0)
        count += server.receive(0.0) is not None
    assert count


def test_a_warning_is_given_once(
    open_endpoint: Open, raw: Callable[[str], Raw], caplog: pytest.LogCaptureFixture
) -> None:
    server = open_endpoint(SERVER, "all")
    with caplog.at_level(logging.WARNING, "distgd.transport"):
        for _ in range(20):
            stranger = raw(address(server))
            stranger.send(b"XX")
            run_until(lambda _, stranger=stranger: stranger.cut_off, server, stranger)  # type: ignore[misc]
    assert server.refused == 20
    assert len(caplog.records) == 1


class Ahead(Codec):
    """Of a version that has one kind more, and uses it now and then."""

    def encode(self, message: Any) -> list[Any]:
        return Codec((Note, Foreign)).encode(message) if isinstance(message, Foreign) else super().encode(message)


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_kind_from_a_known_peer_is_an_error_and_the_next_message_is_read(
    open_endpoint: Open, way: str
) -> None:
    server, worker = open_endpoint(SERVER, "all"), open_endpoint(WORKER, codec=Ahead((Note,)))
    worker.connect(SERVER, address(server, way))
    worker.send(SERVER, Foreign(1))
    worker.send(SERVER, Note(2))
    with pytest.raises(MalformedMessage, match="another version"):
        arrived(1, server, worker)
    assert arrived(1, server, worker) == [(0, WORKER, Note(2))]


def test_an_array_above_the_limit_is_refused_at_its_sender(open_endpoint: Open) -> None:
    server, worker = open_endpoint(SERVER, "all"), open_endpoint(WORKER, max_bytes=1000)
    worker.connect(SERVER, address(server))
    worker.send(SERVER, Note(0))
    arrived(1, server, worker)
    with pytest.raises(RunFailed, match="at most 1000 bytes in an array, found 1001"):
        worker.send(SERVER, Note(1, np.zeros(1001, np.uint8)))
    worker.send(SERVER, Note(2, np.zeros(1000, np.uint8)))
    assert arrived(1, server, worker)[0][2].number == 2


def test_an_array_above_the_listeners_limit_is_dropped_and_its_sender_may_come_back(open_endpoint: Open) -> None:
    server, worker = open_endpoint(SERVER, "all", max_bytes=1000), open_endpoint(WORKER)
    worker.connect(SERVER, address(server))
    worker.send(SERVER, Note(1, np.zeros(100_000)))
    mail = run_until(bool, server, worker, lambda: worker.send(SERVER, Note(2)))
    assert {note.number for _, _, note in mail} == {2}
    honest = open_endpoint(OTHER)
    honest.connect(SERVER, address(server))
    honest.send(SERVER, Note(7))
    run_until(lambda mail: (0, OTHER, Note(7)) in mail, server, honest)


def test_who_dials_while_an_endpoint_closes_does_no_harm(open_endpoint: Open) -> None:
    """Its connection may get the number of a file that has just been closed."""
    server, deaf, other = open_endpoint(SERVER, "all"), open_endpoint(WORKER), open_endpoint(OTHER)
    for worker in (deaf, other):
        worker.connect(SERVER, address(server))
        worker.send(SERVER, Note(1))
    arrived(2, server, deaf, other)
    server.send(WORKER, Note(2, np.zeros(10_000_000)))  # more than the kernel takes, and nobody reads it
    host, port = address(server).removeprefix("tcp:").rsplit(":", 1)
    late = [socket.create_connection((host, int(port))) for _ in range(5)]
    server.close()
    for each in late:
        each.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", WAYS)
def test_closing_leaves_no_socket_no_file_and_no_thread(open_endpoint: Open, way: str) -> None:
    def talk() -> None:
        server, worker = pair(open_endpoint, way)
        worker.send(SERVER, Note(1, np.zeros(100_000)))
        arrived(1, server, worker)
        close_all([server, worker])

    talk()
    files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    talk()
    assert len(os.listdir("/proc/self/fd")) == files
    run_until(lambda _: len(os.listdir("/proc/self/task")) <= threads)


# Streams.


def cut(stream: bytes, incoming: Incoming, chance: random.Random | None) -> list[tuple[bytes, list[bytes]]]:
    """What comes out of a stream that arrives in pieces of any size; whole, as far as there is room, without chance."""
    found = []
    while stream:
        room = incoming.room()
        size = min(len(room), len(stream), len(stream) if chance is None else chance.randint(1, 3 * LARGE))
        room[:size] = stream[:size]
        stream = stream[size:]
        found += [(kind, [bytes(frame) for frame in frames]) for kind, frames in incoming.took(size)]
    return found


@pytest.mark.parametrize("seed", range(40))
def test_a_stream_cut_anywhere_gives_the_same_records(seed: int) -> None:
    chance = random.Random(seed)
    sizes = (0, 1, 7, 100, LARGE - 1, LARGE, LARGE + 1, SCRATCH, 3 * SCRATCH)
    sent = [(b"D", [chance.randbytes(chance.choice(sizes)) for _ in range(chance.randint(1, 4))]) for _ in range(30)]
    stream = b"".join(record(kind, *frames) for kind, frames in sent)
    for how in (chance, None):
        incoming = Incoming(Pool(), 1 << 30)
        incoming.trusted = True
        assert cut(stream, incoming, how) == sent


def test_limits_are_looked_at_before_memory_is_taken() -> None:
    class Stingy(Pool):
        def take(self, size: int) -> memoryview:
            raise AssertionError(f"{size} bytes were taken")

    for trusted, size in ((False, 1 << 20), (True, 2000)):
        incoming = Incoming(Stingy(), 1000)
        incoming.trusted = trusted
        with pytest.raises(ValueError, match=f"{size} bytes where"):
            cut(struct.pack("<cBQ", b"I", 1, size), incoming, None)


class TestPool:
    def test_memory_comes_back_when_the_last_who_sees_it_is_gone(self) -> None:
        pool = Pool()
        view = pool.take(4000)
        first = np.ndarray((1000,), np.float32, view).__array_interface__["data"][0]
        array: Any = np.ndarray((1000,), np.float32, view)
        seen = torch.from_numpy(array)[10:20]
        del view, array
        other = np.ndarray((1000,), np.float32, pool.take(4000))
        assert other.__array_interface__["data"][0] != first
        seen += 1
        del seen
        assert np.ndarray((1000,), np.float32, pool.take(4000)).__array_interface__["data"][0] == first

    def test_it_keeps_no_more_than_it_may(self) -> None:
        pool = Pool(most=10_000)
        views: Sequence[memoryview] = [pool.take(4000) for _ in range(5)]
        del views
        assert pool.kept == 8000


# In memory.


def test_the_twin_delivers_what_the_scheduler_puts_in_the_order_it_chooses() -> None:
    pending: deque[Envelope] = deque()
    network = InMemoryNetwork(pending.append)
    server, worker = network.endpoint(SERVER), network.endpoint(WORKER)
    worker.send(SERVER, Note(1))
    worker.send(SERVER, Note(2))
    assert server.receive(0.0) is None
    network.put(pending.pop())
    network.put(pending.pop())
    assert [server.receive(0.0) for _ in range(3)] == [(WORKER, Note(2)), (WORKER, Note(1)), None]


def test_the_twin_copies_arrays_as_a_wire_does() -> None:
    pending: deque[Envelope] = deque()
    network = InMemoryNetwork(pending.append)
    values = np.zeros(3)
    network.endpoint(WORKER).send(SERVER, Note(1, values))
    values += 1
    assert not pending[0].message.values.any()


def test_the_twin_drops_what_is_sent_to_those_who_left() -> None:
    pending: deque[Envelope] = deque()
    network = InMemoryNetwork(pending.append)
    server, worker = network.endpoint(SERVER), network.endpoint(WORKER)
    worker.send(SERVER, Note(1))
    server.close()
    network.put(pending.pop())
    assert server.receive(0.0) is None
