"""Among processes of one machine: what is in a segment is shown, what is not is copied, and the dead leave nothing."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from distgd import events as ev
from distgd.transport import Endpoint, Place, segments
from distgd.transport.node import AVAILABLE, INLINE
from distgd.transport.segments import PAGE, Recycled, Segment, Window
from distgd.wire import Codec

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Linux only")

SECRET = secrets.token_bytes(32)
SERVER, WORKER, OTHER = 1, 2, 3
WAIT = 30.0
MANY = 4 * INLINE  # numbers: too many for the message itself
Open = Callable[..., Endpoint]


@pytest.fixture
def open_endpoint() -> Iterator[Open]:
    opened: list[Endpoint] = []

    def open_one(me: int, secret: bytes = SECRET, *, listen: bool = False) -> Endpoint:
        opened.append(Endpoint(me, f"role-{me}", secret, Codec(ev.MESSAGES), listen="near" if listen else ""))
        return opened[-1]

    yield open_one
    for endpoint in opened:
        endpoint.close()


def weights(values: Any, version: int = 0) -> ev.WeightsSent:
    return ev.WeightsSent(1, 0, version, -1, 0, values, None)


def meet(one: Endpoint, other: Endpoint, ends: int = 2) -> None:
    """Let two endpoints of this thread prove themselves to each other."""
    for _ in range(2 * ends):
        for endpoint in (one, other):
            assert endpoint.receive(0.0) is None


def pair(open_endpoint: Open) -> tuple[Endpoint, Endpoint]:
    server, worker = open_endpoint(SERVER, listen=True), open_endpoint(WORKER)
    worker.connect(SERVER, server.addresses[0])
    meet(server, worker)
    return server, worker


def received(endpoint: Endpoint) -> Any:
    arrived = endpoint.receive(WAIT)
    assert arrived is not None
    return arrived[1]


class TestArrays:
    def test_what_is_in_a_segment_is_shown_and_not_copied(self, open_endpoint: Open) -> None:
        server, worker = pair(open_endpoint)
        mine = worker.allocate(MANY, "float32")
        mine[:] = 1.0
        worker.send(SERVER, weights(mine[PAGE:]))
        seen = received(server).weights
        assert seen.shape == (MANY - PAGE,)
        assert not seen.flags.writeable
        mine[PAGE] = 7.0
        assert seen[0] == 7.0
        with pytest.raises(ValueError, match="read-only"):
            seen[0] = 0.0

    def test_the_second_message_shows_the_same_memory(self, open_endpoint: Open) -> None:
        server, worker = pair(open_endpoint)
        mine = worker.allocate(MANY, "float64")
        seen = []
        for version in range(2):
            worker.send(SERVER, weights(mine, version))
            seen.append(received(server).weights)
        assert np.shares_memory(*seen)

    @pytest.mark.parametrize("size", [0, 1, INLINE // 4, MANY, 1_000_003])
    def test_any_other_array_belongs_to_the_receiver(self, open_endpoint: Open, size: int) -> None:
        server, worker = pair(open_endpoint)
        values = np.arange(size, dtype=np.float32)
        worker.send(SERVER, weights(values))
        seen = received(server).weights
        assert np.array_equal(seen, values)
        values[:1] = -1.0
        seen[-1:] = -2.0
        assert not size or (seen[0] != -1.0 and values[-1] != -2.0)

    def test_a_header_of_any_length_arrives(self, open_endpoint: Open) -> None:
        server, worker = pair(open_endpoint)
        text = "slots, " * 100_000
        worker.send(SERVER, ev.StatusSent(1, text))
        assert received(server) == ev.StatusSent(1, text)

    def test_what_a_full_buffer_holds_back_arrives_in_order(self, open_endpoint: Open) -> None:
        server, worker = pair(open_endpoint)
        descriptors = len(os.listdir("/proc/self/fd"))
        for version in range(2000):
            worker.send(SERVER, weights(np.full(MANY if version % 500 == 0 else 3, version, np.float32), version))
        for version in range(2000):
            while (arrived := server.receive(0.0)) is None:
                assert worker.receive(0.0) is None
            assert arrived[1].version == arrived[1].weights[0] == version
        assert len(os.listdir("/proc/self/fd")) == descriptors

    def test_without_shared_memory_messages_carry_the_numbers(
        self, open_endpoint: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        server, worker = pair(open_endpoint)

        def full(size: int) -> Segment:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Segment, "allocate", full)
        mine = [worker.allocate(MANY, "float32") for _ in range(2)]
        worker.send(SERVER, weights(mine[0]))
        assert received(server).weights.flags.writeable, "a copy"
        assert caplog.text.count("no shared memory for") == 1


def live(address: str, secret: bytes, size: int) -> None:
    """A process that shows its memory and is gone without a word."""
    endpoint = Endpoint(WORKER, "worker", secret, Codec(ev.MESSAGES))
    endpoint.connect(SERVER, address)
    mine = endpoint.allocate(size, "float32")
    mine[:] = 3.0
    endpoint.send(SERVER, weights(mine))
    assert endpoint.receive(WAIT) is not None
    os._exit(9)


def test_the_memory_of_the_dead_can_still_be_read_and_is_gone_after(open_endpoint: Open) -> None:
    gc.collect()  # what other tests have left
    before = mappings()
    server = open_endpoint(SERVER, listen=True)
    process = multiprocessing.get_context("spawn").Process(target=live, args=(server.addresses[0], SECRET, MANY))
    process.start()
    seen = received(server).weights
    server.send(WORKER, ev.Stop(1))
    process.join(WAIT)
    assert process.exitcode == 9
    assert server.receive(0.0) is None
    assert (seen == 3.0).all()
    server.send(WORKER, ev.Stop(1))  # in vain, and no error
    assert mappings() == before + 1
    del seen
    assert mappings() == before


def mappings() -> int:
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return sum("memfd:distgd" in line for line in lines)


class TestProof:
    def test_who_does_not_know_the_secret_is_not_heard(self, open_endpoint: Open) -> None:
        server, stranger = open_endpoint(SERVER, listen=True), open_endpoint(WORKER, secret=secrets.token_bytes(32))
        stranger.connect(SERVER, server.addresses[0])
        stranger.send(SERVER, ev.Stop(1))
        meet(server, stranger)
        assert stranger.refused == 1, "the listener's proof is checked first"
        assert server.receive(0.0) is None

    def test_a_strangers_bytes_and_descriptors_are_refused(self, open_endpoint: Open) -> None:
        server = open_endpoint(SERVER, listen=True)
        descriptors = len(os.listdir("/proc/self/fd"))
        for data in (b"D\x01", b"", b"H", b"H\x02\x00ab", b"P\x01\x00a", b"C", secrets.token_bytes(100)):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
                raw.connect("\0" + server.addresses[0].removeprefix("node:"))
                socket.send_fds(raw, [data], [0, 1])
                for _ in range(3):
                    assert server.receive(0.0) is None
        for _ in range(3):
            assert server.receive(0.0) is None
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert pair(open_endpoint), "the others are served"

    def test_what_was_sent_before_either_dialed_or_proved_arrives_in_order(self, open_endpoint: Open) -> None:
        server, worker = open_endpoint(SERVER, listen=True), open_endpoint(WORKER)
        for version in range(3):
            server.send(WORKER, weights(np.zeros(1, np.float32), version))
        worker.connect(SERVER, server.addresses[0])
        for version in range(3):
            worker.send(SERVER, weights(np.zeros(1, np.float32), version))
        arrived: dict[int, list[int]] = {SERVER: [], WORKER: []}
        while sum(map(len, arrived.values())) < 6:
            for me, endpoint in ((SERVER, server), (WORKER, worker)):
                if (found := endpoint.receive(0.0)) is not None:
                    arrived[me].append(found[1].version)
        assert arrived == {SERVER: [0, 1, 2], WORKER: [0, 1, 2]}


class TestSegment:
    def test_only_its_maker_can_write(self) -> None:
        segment = Segment.allocate(100)
        with pytest.raises(PermissionError):
            mmap.mmap(segment.descriptor, PAGE)
        os.close(segment.descriptor)

    def test_more_than_is_free_is_refused_before_the_kernel_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel would end some process, this one or another."""
        monkeypatch.setattr(segments, "available", lambda: 8 * PAGE)
        monkeypatch.setattr(os, "posix_fallocate", None)
        with pytest.raises(OSError, match="were asked for"):
            Segment.allocate(8 * PAGE)


class TestWindow:
    def other(self, size: int) -> tuple[Any, Any]:
        """A segment's memory as its maker has it, and as another process sees it."""
        segment = Segment.allocate(size)
        return segment.memory, Segment.adopt(segment.descriptor).memory

    def test_parts_of_several_segments_lie_side_by_side(self) -> None:
        window = Window(3 * PAGE + 100)
        (first, seen_first), (second, seen_second) = self.other(2 * PAGE), self.other(PAGE + 100)
        assert window.show(0, seen_first)
        assert window.show(2 * PAGE, seen_second[: PAGE + 100])
        first[:], second[:] = 1, 2
        assert window.memory.tolist() == [1] * 2 * PAGE + [2] * (PAGE + 100)

    def test_what_is_shown_outlives_its_source(self) -> None:
        window = Window(PAGE)
        mine, seen = self.other(PAGE)
        mine[:] = 5
        assert window.show(0, seen)
        del mine, seen
        assert set(window.memory.tolist()) == {5}

    def test_what_cannot_be_shown_is_left_alone(self) -> None:
        window = Window(2 * PAGE)
        _, seen = self.other(2 * PAGE)
        assert not window.show(8, seen[:PAGE]), "not at a page"
        assert not window.show(0, seen[8:]), "not from a page"
        assert not window.show(0, seen[: PAGE - 8]), "it would cover what comes after"
        assert not window.show(0, np.zeros(PAGE, np.uint8)), "this process's own"
        window.memory[:] = 1
        assert set(window.memory.tolist()) == {1}


def test_each_peer_is_reached_the_shortest_way() -> None:
    """Two processes on one machine and one elsewhere, all of them in this thread."""
    make = {"secret": SECRET, "codec": Codec(ev.MESSAGES), "host": "127.0.0.1", "max_bytes": 1 << 20}
    server = Endpoint(SERVER, "server", listen="all", **make)  # type: ignore[arg-type]
    worker, far = (Endpoint(i, "worker", listen="", **make) for i in (WORKER, OTHER))  # type: ignore[arg-type]
    places = {SERVER: Place("here", server.addresses), WORKER: Place("here", ()), OTHER: Place("there", ())}
    try:
        for endpoint, node in ((server, "here"), (worker, "here"), (far, "there")):
            endpoint.meet(node, places)
        for endpoint in (worker, far):
            endpoint.send(SERVER, weights(endpoint.allocate(MANY, "float32")))
        seen: dict[int, bool] = {}
        while len(seen) < 2:
            for endpoint in (worker, far):
                assert endpoint.receive(0.0) is None
            if (arrived := server.receive(0.01)) is not None:
                seen[arrived[0]] = arrived[1].weights.flags.writeable
        assert seen == {WORKER: False, OTHER: True}
    finally:
        for endpoint in (worker, far, server):
            endpoint.close()


def test_what_was_taken_is_taken_again_after_a_new_beginning_and_is_zero() -> None:
    made: list[Any] = []

    def allocate(size: int, dtype: str) -> Any:
        made.append(np.zeros(size, dtype))
        return made[-1]

    take = Recycled(allocate)
    first, second, other = take(5, "<f4"), take(5, "<f4"), take(5, "<f8")
    first[:] = other[:] = 1.0
    assert first is not second
    take.begin()
    again = [take(5, "<f4"), take(5, "<f8"), take(5, "<f4"), take(5, "<f4")]
    assert [any(array is one for array in made[:3]) for one in again] == [True, True, True, False]
    assert len({id(one) for one in again}) == 4
    assert not any(one.any() for one in again)
