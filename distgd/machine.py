"""What this machine's memory and messages cost, measured in a fraction of a second. Nothing is started but threads.

Whatever else runs here takes part: the best of a few short tries is what counts.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from distgd import events as ev
from distgd.cost import Machine
from distgd.memory import available
from distgd.transport import Endpoint
from distgd.transport.node import AVAILABLE
from distgd.wire import Codec

COPIED = 32 << 20
"""Bytes of an array to copy: more than a core's caches hold."""
MOST_CORES = 16
"""Cores that copy at once, at most; by then memory is what limits them."""
TRIES = 4
MESSAGES = 50
ELSEWHERE = 100e-6
"""Seconds a message where there are no sockets of the kind that is measured, as outside Linux."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def measure() -> Machine:
    """This machine; about 0.2 s."""
    count = cores()
    busy = max(1, min(count, MOST_CORES, available() // 4 // (2 * COPIED)))
    one = copy_bandwidth(1)
    return Machine(count, one, max(one, copy_bandwidth(busy)) if busy > 1 else one, message_seconds())


def cores() -> int:
    """Cores that this process may use, its container's quota counted."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit in it
        return allowed


def copy_bandwidth(threads: int) -> float:
    """Bytes a second, read and written ones both counted, that `threads` cores copy together."""
    pairs = [(np.zeros(COPIED, np.uint8), np.ones(COPIED, np.uint8)) for _ in range(threads)]
    best = min(_together([partial(np.copyto, target, source) for target, source in pairs]) for _ in range(TRIES))
    return 2 * threads * COPIED / best


def _together(works: list[Callable[[], None]]) -> float:
    """Seconds from the start of all to the end of the last."""
    gate = threading.Barrier(len(works) + 1)

    def work(each: Callable[[], None]) -> None:
        gate.wait()
        each()
        gate.wait()

    threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in works]
    for thread in threads:
        thread.start()
    gate.wait()
    began = time.perf_counter()
    gate.wait()
    seconds = time.perf_counter() - began
    for thread in threads:
        thread.join()
    return seconds


def message_seconds() -> float:
    """Seconds of one core for a message between processes of this machine: half of a push and its answer."""
    if not AVAILABLE:
        return ELSEWHERE
    secret, codec = secrets.token_bytes(16), Codec(ev.MESSAGES)
    with (
        closing(Endpoint(1, "server", secret, codec, listen="near")) as shard,
        closing(Endpoint(2, "worker", secret, codec)) as worker,
    ):
        worker.connect(1, shard.addresses[0])
        push = _push(worker.allocate(1 << 14, "<f4"))
        sent = ev.WeightsSent(1, 0, 1, -1, 0, shard.allocate(1 << 14, "<f4"), None)
        return min(_pair(worker, shard, push, sent) for _ in range(MESSAGES)) / 2


def _push(gradient: np.ndarray[tuple[int], np.dtype[np.float32]]) -> ev.GradientArrived:
    stats = (ev.SlotStats(0, 8, 8.0, 0.5, 0.25, 1e-3),)
    times = {"compute": 1e-3, "wait": 1e-3, "pull": 1e-4, "push": 1e-4}
    return ev.GradientArrived(1, 0, 0, 0, 1, 0, 8.0, (), -1, gradient, None, stats, {2: times}, 0)


def _pair(worker: Endpoint, shard: Endpoint, push: ev.GradientArrived, sent: ev.WeightsSent) -> float:
    """Seconds of a push and its answer, both ends on this thread: no time passes in which nobody works."""
    began = time.perf_counter()
    worker.send(1, push)
    while shard.receive(0.0) is None:  # the first time the two introduce themselves in between
        worker.receive(0.0)
    shard.send(2, sent)
    while worker.receive(0.0) is None:
        pass
    return time.perf_counter() - began
