"""Messages arrive whole, in order, at most once, and from whom they say; nobody without the secret gets a word in."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import zmq

from distgd.errors import RunFailed
from distgd.transport import Envelope, InMemoryNetwork, ZmqEndpoint
from distgd.transport.zeromq import PIECE
from distgd.wire import Codec, MalformedMessage

DEADLINE = 20.0  # seconds until a test gives up; nothing waits for it to pass
SECRET = secrets.token_bytes(32)
SERVER, WORKER, OTHER = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Note:
    number: int
    values: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True, slots=True)
class Foreign:
    number: int


CODEC = Codec((Note,))
Open = Callable[..., ZmqEndpoint]


@pytest.fixture
def open_endpoint() -> Iterator[Open]:
    """Opens endpoints and closes them at the end."""
    opened: list[ZmqEndpoint] = []

    def opens(
        me: int,
        listen: tuple[str, ...] = (),
        secret: bytes = SECRET,
        codec: Codec = CODEC,
        max_bytes: int = 1 << 30,
    ) -> ZmqEndpoint:
        opened.append(ZmqEndpoint(me, f"role-{me}", secret, codec, listen, max_bytes=max_bytes))
        return opened[-1]

    yield opens
    close_all(opened)


def close_all(endpoints: list[ZmqEndpoint]) -> None:
    """All at once, as each waits up to its linger for a peer that does not read any more."""
    threads = [threading.Thread(target=endpoint.close) for endpoint in endpoints]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Raw:
    """A program that speaks ZeroMQ and is no endpoint: an attacker, or a relay that writes down what passes."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        self.sockets.append(self.context.socket(kind))
        self.sockets[-1].linger = 0
        return self.sockets[-1]

    def close(self) -> None:
        for socket in self.sockets:
            socket.close()
        self.context.term()

    def dial(self, address: str, identity: bytes | None = None) -> zmq.Socket[bytes]:
        socket = self.socket(zmq.DEALER)
        if identity is not None:
            socket.setsockopt(zmq.IDENTITY, identity)
        socket.connect(address)
        return socket

    def listen(self, address: str = "") -> zmq.Socket[bytes]:
        socket = self.socket(zmq.ROUTER)
        socket.bind(address or "tcp://127.0.0.1:*")
        return socket


@pytest.fixture
def raw() -> Iterator[Raw]:
    program = Raw()
    yield program
    program.close()


def taken(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """What lies there now."""
    found = []
    while socket.poll(0):
        found.append(socket.recv_multipart())
    return found


class Relay:
    """Stands between one dialer and a listener, passes everything on, and keeps a record of what the dialer said."""

    def __init__(self, raw: Raw, target: str, address: str = "") -> None:
        self.raw, self.target = raw, target
        self.front = raw.listen(address)
        self.back = raw.dial(target)
        self.address = self.front.getsockopt_string(zmq.LAST_ENDPOINT)
        self.said: list[list[bytes]] = []
        self.route = b""

    def turn(self) -> None:
        for route, *frames in taken(self.front):
            self.route = route
            self.said.append(frames)
            self.back.send_multipart(frames)
        for frames in taken(self.back):
            self.front.send_multipart([self.route, *frames])

    def reconnect(self) -> None:
        """As ZeroMQ does after a broken connection: the dialer sees nothing, the listener sees a new routing id."""
        self.back.close()
        self.back = self.raw.dial(self.target)


Turn = ZmqEndpoint | Relay | Callable[[], None]
Mail = list[tuple[int, int, Any]]  # receiver's place among the parties, sender, message


def run_until(done: Callable[[Mail], bool], *parties: Turn) -> Mail:
    """Give everybody a turn, over and over, until `done` with what has arrived."""
    mail: Mail = []
    until = time.monotonic() + DEADLINE
    while not done(mail):
        assert time.monotonic() < until, f"nothing came of it; arrived: {mail}"
        for place, party in enumerate(parties):
            if isinstance(party, ZmqEndpoint):
                if (arrived := party.receive(0.002)) is not None:
                    mail.append((place, *arrived))
            elif isinstance(party, Relay):
                party.turn()
            else:
                party()
    return mail


def arrived(count: int, *parties: Turn) -> Mail:
    return run_until(lambda mail: len(mail) >= count, *parties)


def pair(open_endpoint: Open, kind: str = "ipc") -> tuple[ZmqEndpoint, ZmqEndpoint]:
    server, worker = open_endpoint(SERVER, (kind,)), open_endpoint(WORKER)
    worker.connect(SERVER, server.addresses[0])
    return server, worker


def assert_still_serves(server: ZmqEndpoint, open_endpoint: Open) -> None:
    """An honest peer gets through, and its message is the first that the server hears."""
    honest = open_endpoint(OTHER)
    honest.connect(SERVER, server.addresses[0])
    honest.send(SERVER, Note(7))
    assert arrived(1, server, honest) == [(0, OTHER, Note(7))]


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_messages_go_there_and_back(open_endpoint: Open, kind: str) -> None:
    server, worker = pair(open_endpoint, kind)
    assert server.addresses[0].startswith(kind)
    assert worker.addresses == ()
    worker.send(SERVER, Note(1))
    server.send(WORKER, Note(2))  # waits for the worker's proof
    assert sorted(arrived(2, server, worker)) == [(0, WORKER, Note(1)), (1, SERVER, Note(2))]
    server.send(WORKER, Note(3))
    assert arrived(1, server, worker) == [(1, SERVER, Note(3))]


def test_one_process_listens_on_both_and_knows_its_peers_apart(open_endpoint: Open) -> None:
    server, worker, other = open_endpoint(SERVER, ("ipc", "tcp")), open_endpoint(WORKER), open_endpoint(OTHER)
    worker.connect(SERVER, server.addresses[0])
    other.connect(SERVER, server.addresses[1])
    worker.send(SERVER, Note(WORKER))
    other.send(SERVER, Note(OTHER))
    assert {(source, note.number) for _, source, note in arrived(2, server, worker, other)} == {(2, 2), (3, 3)}
    server.send(OTHER, Note(30))
    server.send(WORKER, Note(20))
    assert sorted(arrived(2, server, worker, other)) == [(1, SERVER, Note(20)), (2, SERVER, Note(30))]


def test_messages_of_a_pair_keep_their_order_also_those_that_waited_for_the_proof(open_endpoint: Open) -> None:
    server, worker = pair(open_endpoint)
    for number in range(300):
        worker.send(SERVER, Note(number))
        server.send(WORKER, Note(number))
        if number == 150:
            mail = arrived(1, server, worker)
    mail += arrived(600 - len(mail), server, worker)
    for place in (0, 1):
        assert [note.number for receiver, _, note in mail if receiver == place] == list(range(300))


def test_large_arrays_arrive_whole(open_endpoint: Open) -> None:
    server, worker = pair(open_endpoint)
    values = np.arange(10_000_000, dtype=np.float32)  # 40 MB
    worker.send(SERVER, Note(1, values))
    ((_, _, note),) = arrived(1, server, worker)
    assert np.array_equal(note.values, values)


def test_what_arrived_is_the_receivers_own(open_endpoint: Open) -> None:
    server, worker = pair(open_endpoint)
    values = np.zeros(100_000)
    worker.send(SERVER, Note(1, values))
    ((_, _, note),) = arrived(1, server, worker)
    values += 1
    assert not note.values.any()


def test_dialing_before_anybody_listens(open_endpoint: Open, raw: Raw) -> None:
    server, worker = open_endpoint(SERVER, ("tcp",)), open_endpoint(WORKER)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as free:
        free.bind("tcp://127.0.0.1:*")
        address = free.getsockopt_string(zmq.LAST_ENDPOINT)
    worker.connect(SERVER, address)
    worker.send(SERVER, Note(1))
    assert worker.receive(0.0) is None
    relay = Relay(raw, server.addresses[0], address)
    assert arrived(1, server, worker, relay) == [(0, WORKER, Note(1))]


def test_what_was_sent_right_before_close_arrives_even_if_nothing_was_proved_yet(open_endpoint: Open) -> None:
    server, worker = pair(open_endpoint)
    worker.send(SERVER, Note(1))
    closing = threading.Thread(target=worker.close)
    closing.start()
    assert arrived(1, server) == [(0, WORKER, Note(1))]
    closing.join()


def test_after_a_broken_connection_peers_prove_themselves_again_and_nothing_arrives_twice(
    open_endpoint: Open, raw: Raw
) -> None:
    server, worker = open_endpoint(SERVER, ("ipc",)), open_endpoint(WORKER)
    relay = Relay(raw, server.addresses[0])
    worker.connect(SERVER, relay.address)
    worker.send(SERVER, Note(0))
    arrived(1, server, worker, relay)
    relay.reconnect()
    sent = iter(range(1, 1_000_000))
    mail = run_until(lambda mail: len(mail) >= 5, server, worker, relay, lambda: worker.send(SERVER, Note(next(sent))))
    numbers = [note.number for _, _, note in mail]
    assert numbers == sorted(set(numbers))
    assert [frames[0] for frames in relay.said].count(b"H") == 2
    server.send(WORKER, Note(-1))  # goes over the new connection
    run_until(lambda mail: (1, SERVER, Note(-1)) in mail, server, worker, relay)


# Strangers.


def test_a_dialer_without_the_secret_is_refused(open_endpoint: Open, caplog: pytest.LogCaptureFixture) -> None:
    server, thief = open_endpoint(SERVER, ("ipc",)), open_endpoint(WORKER, secret=secrets.token_bytes(32))
    thief.connect(SERVER, server.addresses[0])
    thief.send(SERVER, Note(1))
    server.send(WORKER, Note(2))
    with caplog.at_level(logging.WARNING, "distgd.transport"):
        run_until(lambda _: thief.refused > 0, server, thief)
    assert "does not know this run's secret" in caplog.text
    assert_still_serves(server, open_endpoint)


def test_a_dialer_that_skips_the_proof_or_forges_it_is_refused(open_endpoint: Open, raw: Raw) -> None:
    server = open_endpoint(SERVER, ("tcp",))
    thief = raw.dial(server.addresses[0])
    thief.send_multipart([b"D" + bytes(16), *CODEC.encode(Note(1))])
    run_until(lambda _: server.refused == 1, server)
    thief.send_multipart([b"H", b'[2,"worker"]', bytes(32)])
    answers: list[list[bytes]] = []
    run_until(lambda _: len(answers) == 2, server, lambda: answers.extend(taken(thief)))
    assert [tag for tag, *_ in answers] == [b"?", b"C"]
    thief.send_multipart([b"P", answers[1][3]])  # the listener's own signature, reflected
    run_until(lambda _: server.refused == 2, server)
    thief.send_multipart([b"D" + bytes(16), *CODEC.encode(Note(1))])
    run_until(lambda _: server.refused == 3, server)
    assert_still_serves(server, open_endpoint)


def test_a_listener_without_the_secret_hears_nothing_and_is_not_heard(open_endpoint: Open) -> None:
    fake, worker = open_endpoint(SERVER, ("ipc",), secret=secrets.token_bytes(32)), open_endpoint(WORKER)
    worker.connect(SERVER, fake.addresses[0])
    worker.send(SERVER, Note(1))
    fake.send(WORKER, Note(2))
    assert run_until(lambda _: worker.refused > 0, fake, worker) == []
    assert fake.refused == 0  # no proof and no message was offered to it


def test_a_listener_that_is_another_than_expected_is_refused(open_endpoint: Open) -> None:
    other, worker = open_endpoint(OTHER, ("ipc",)), open_endpoint(WORKER)
    worker.connect(SERVER, other.addresses[0])
    worker.send(SERVER, Note(1))
    assert run_until(lambda _: worker.refused > 0, other, worker) == []


def test_a_recorded_conversation_is_worth_nothing(open_endpoint: Open, raw: Raw) -> None:
    server, worker = open_endpoint(SERVER, ("tcp",)), open_endpoint(WORKER)
    relay = Relay(raw, server.addresses[0])
    worker.connect(SERVER, relay.address)
    worker.send(SERVER, Note(1))
    arrived(1, server, worker, relay)
    assert [frames[0][:1] for frames in relay.said] == [b"H", b"P", b"D"]
    thief = raw.dial(server.addresses[0])
    for frames in relay.said:
        thief.send_multipart(frames)
    assert run_until(lambda _: server.refused == 2, server) == []  # the proof and the message
    assert_still_serves(server, open_endpoint)


def test_who_takes_over_a_dead_listeners_address_can_say_nothing(open_endpoint: Open, raw: Raw) -> None:
    server, worker = pair(open_endpoint, "tcp")
    worker.send(SERVER, Note(1))
    arrived(1, server, worker)
    server.close()
    impostor = raw.listen(server.addresses[0])
    heard: list[list[bytes]] = []

    def listens() -> None:
        worker.send(SERVER, Note(2))
        heard.extend(taken(impostor))

    run_until(lambda _: bool(heard), listens)
    route, ticket, *_ = heard[0]
    for tag in (ticket, b"D", b"D" + bytes(16)):  # the worker's own ticket, reflected; none; a guess
        impostor.send_multipart([route, tag, *CODEC.encode(Note(666))])
    assert run_until(lambda _: worker.refused == 3, worker) == []


def test_a_peer_speaks_for_nobody_else(open_endpoint: Open, raw: Raw) -> None:
    server, worker = open_endpoint(SERVER, ("tcp",)), open_endpoint(WORKER)
    relay = Relay(raw, server.addresses[0])
    worker.connect(SERVER, relay.address)
    worker.send(SERVER, Note(1))
    arrived(1, server, worker, relay)
    relay.back.send_multipart([b"H", b'[3,"worker"]', bytes(32)])  # on a connection that is the worker's
    run_until(lambda _: server.refused == 1, server)
    relay.back.send_multipart([b"D" + bytes(16), *CODEC.encode(Note(666))])  # its routing id without its ticket
    run_until(lambda _: server.refused == 2, server)
    stranger = raw.dial(server.addresses[0])
    stranger.send_multipart([b"H", b'[1,"server"]', bytes(32)])  # the server's own incarnation
    run_until(lambda _: server.refused == 3, server)
    assert_still_serves(server, open_endpoint)


def test_a_peer_that_chose_its_own_routing_id_is_refused(open_endpoint: Open, raw: Raw) -> None:
    server = open_endpoint(SERVER, ("ipc",))
    raw.dial(server.addresses[0], identity=b"mine").send_multipart([b"H", b'[2,"worker"]', bytes(32)])
    run_until(lambda _: server.refused == 1, server)
    assert_still_serves(server, open_endpoint)


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"H"],
        [b"H", b"", bytes(32)],
        [b"H", b"[" * 100_000, bytes(32)],  # deeper than a parser goes
        [b"H", b'[true,"worker"]', bytes(32)],
        [b"H", b'[-2,"worker"]', bytes(32)],
        [b"H", b'[2,"worker"]', b"short"],
        [b"P", bytes(32)],
        [b"C", b'[1,"server"]', bytes(32), bytes(32)],
        [b"?"],
        [bytes(1 << 20)],
    ],
)
def test_nonsense_from_strangers_harms_nobody(open_endpoint: Open, raw: Raw, frames: list[bytes]) -> None:
    server = open_endpoint(SERVER, ("ipc",))
    raw.dial(server.addresses[0]).send_multipart(frames)
    run_until(lambda _: server.refused == 1, server)
    assert_still_serves(server, open_endpoint)


def test_a_flood_outlasts_no_deadline(open_endpoint: Open, raw: Raw) -> None:
    server = open_endpoint(SERVER, ("ipc",))
    flood = raw.dial(server.addresses[0])
    flood.sndhwm = 0
    count = 200_000
    for _ in range(count):
        flood.send(b"X")
    while server.refused == 0:
        assert server.receive(0.0) is None
    assert server.refused < count  # it came back with most of the flood still ahead


def test_a_warning_is_given_once(open_endpoint: Open, raw: Raw, caplog: pytest.LogCaptureFixture) -> None:
    server = open_endpoint(SERVER, ("ipc",))
    stranger = raw.dial(server.addresses[0])
    for _ in range(50):
        stranger.send(b"X")
    with caplog.at_level(logging.WARNING, "distgd.transport"):
        run_until(lambda _: server.refused == 50, server)
    assert len(caplog.records) == 1


class Ahead(Codec):
    """Of a version that has one kind more, and uses it now and then."""

    def encode(self, message: Any) -> list[Any]:
        return Codec((Note, Foreign)).encode(message) if isinstance(message, Foreign) else super().encode(message)


def test_an_unknown_kind_from_a_known_peer_is_an_error_and_the_next_message_is_read(open_endpoint: Open) -> None:
    server, worker = open_endpoint(SERVER, ("ipc",)), open_endpoint(WORKER, codec=Ahead((Note,)))
    worker.connect(SERVER, server.addresses[0])
    worker.send(SERVER, Foreign(1))
    worker.send(SERVER, Note(2))
    with pytest.raises(MalformedMessage, match="another version"):
        arrived(1, server, worker)
    assert arrived(1, server, worker) == [(0, WORKER, Note(2))]


def test_a_large_array_travels_in_pieces(open_endpoint: Open) -> None:
    """Both ways, and the pieces stay within the limit that the array exceeds."""
    server, worker = open_endpoint(SERVER, ("ipc",), max_bytes=PIECE), open_endpoint(WORKER, max_bytes=PIECE)
    values = np.arange(3 * PIECE // 8 + 1, dtype=np.float64)
    worker.connect(SERVER, server.addresses[0])
    worker.send(SERVER, Note(1, values))
    server.send(WORKER, Note(2, values))
    for _, _, note in arrived(2, server, worker):
        assert np.array_equal(note.values, values)


def test_an_array_above_the_limit_is_refused_at_its_sender(open_endpoint: Open) -> None:
    server, worker = open_endpoint(SERVER, ("ipc",)), open_endpoint(WORKER, max_bytes=1000)
    worker.connect(SERVER, server.addresses[0])
    with pytest.raises(RunFailed, match="at most 1000 bytes in a piece, found 1001"):
        worker.send(SERVER, Note(1, np.zeros(1001, np.uint8)))
    worker.send(SERVER, Note(2, np.zeros(1000, np.uint8)))
    assert arrived(1, server, worker)[0][2].number == 2


def test_an_array_above_the_listeners_limit_is_dropped_and_its_sender_may_come_back(open_endpoint: Open) -> None:
    server, worker = open_endpoint(SERVER, ("ipc",), max_bytes=1000), open_endpoint(WORKER)
    worker.connect(SERVER, server.addresses[0])
    worker.send(SERVER, Note(1, np.zeros(100_000)))
    mail = run_until(bool, server, worker, lambda: worker.send(SERVER, Note(2)))
    assert [note.number for _, _, note in mail] == [2]
    honest = open_endpoint(OTHER)
    honest.connect(SERVER, server.addresses[0])
    honest.send(SERVER, Note(7))
    run_until(lambda mail: (0, OTHER, Note(7)) in mail, server, honest)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_leaves_no_socket_no_file_and_no_thread(open_endpoint: Open) -> None:
    def talk() -> str:
        server, worker = pair(open_endpoint)
        worker.send(SERVER, Note(1, np.zeros(100_000)))
        arrived(1, server, worker)
        address = server.addresses[0].removeprefix("ipc://")
        assert address in open_sockets()
        close_all([server, worker])
        return address

    talk()  # pyzmq keeps one thread of its own from the first large message on
    threads = len(os.listdir("/proc/self/task"))
    address = talk()
    assert address.startswith("@")  # abstract: a name without a file, gone with its process even after kill -9
    assert address not in open_sockets()
    run_until(lambda _: len(os.listdir("/proc/self/task")) <= threads)


def open_sockets() -> str:
    with open("/proc/net/unix", encoding="utf-8") as table:
        return table.read()


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
