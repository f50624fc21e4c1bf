"""The tracker: MLflow on a thread of its own."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from distgd.records import Event, RunEnd, RunInfo
from distgd.tracking.store import CLIENT_SETTINGS, Store, refused

log = logging.getLogger("distgd.tracking")

BACKLOG = 10_000
"""Events that wait for MLflow at most; more are dropped from MLflow and counted."""

EVENTS_A_BATCH = 50
"""About a thousand metrics, which are one call."""

REST, LONGEST_REST = 25.0, 5.0
"""Between two calls the thread rests for so many times the CPU time that the last one took, but never longer than so
many seconds: a few percent of a core are MLflow's while training goes on, and the end of the run writes the rest."""

SHARE_WAITING = 0.25
"""It does not rest while more events wait than it writes in this share of the deadline at the end."""

RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 30.0


class Mlflow:
    """A run in MLflow: params, data, tags, curves, the figure, the weights and a model that loads back in plain torch.

    All of MLflow happens on one thread; `log` only appends to a list in memory. While MLflow does not answer the list
    grows to `BACKLOG` events and everything is tried again, with one warning a run. Of the steps, every
    `every_steps`-th event is logged as it is (no mean over the window), and the first and the last; all other events
    are logged. `metrics.jsonl` has the rest.

    On a SQLite store that does not exist yet, the tables are made, and artifacts go to the folder `mlruns` beside it.

    Args:
        every_steps: about the planned steps / 1,000; None where their number is not known: points get rarer as the run
            goes on, about 700 for 1,000 steps and 2,400 for a million.
        every_seconds: takes the place of `every_steps` where it is given.
        deadline: seconds that `finish` waits at most. A store that never answered is not waited for.
        store: makes the run's place in the store.
    """

    def __init__(
        self,
        every_steps: int | None = 1,
        every_seconds: float | None = None,
        deadline: float = 60.0,
        store: Callable[[RunInfo], Store] = Store,
    ) -> None:
        self._make_store = store
        self._every = every_steps
        self._every_seconds = every_seconds
        self._shown, self._shown_step = 0.0, 0
        self._settings: list[str] = []  # variables that were set here, and are taken back
        self._deadline = deadline
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._thinned: Event | None = None
        self._end: RunEnd | None = None
        self._ended = threading.Event()  # an event that is logged does not wake who waits for this
        self._until = math.inf
        self._unwritten: list[str] = []
        self._warned = False
        self._thread: threading.Thread | None = None
        self._store: Store | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once the run exists there."""
        return self._store.run_id if self._store else None

    def start(self, info: RunInfo) -> None:
        for name, value in CLIENT_SETTINGS.items():
            if name not in os.environ:
                os.environ[name] = value
                self._settings.append(name)
        self._store = self._make_store(info)
        self._thread = threading.Thread(target=self._write, args=(self._store,), name="distgd-mlflow", daemon=True)
        self._thread.start()

    def log(self, event: Event) -> None:
        if event["event"] == "step" and not self._due(event):
            self._thinned = event
            return
        if event["event"] == "step":
            self._thinned = None
            self._shown, self._shown_step = event["seconds"], event["step"]
        self._append(event)

    def _due(self, event: Event) -> bool:
        if event["step"] == 1:
            return True
        if self._every_seconds is not None:
            return bool(event["seconds"] >= self._shown + self._every_seconds)
        if self._every is None:
            return bool(event["step"] >= self._shown_step + max(1, event["step"] // 250))
        return bool(event["step"] % self._every == 0)

    def _append(self, event: Event) -> None:
        with self._changed:
            if len(self._events) < BACKLOG:
                self._events.append(event)
                self._changed.notify()
                return
            self._dropped += 1
        if self._dropped == 1:
            log.warning("MLflow is %d events behind; more are left out there, metrics.jsonl has them all", BACKLOG)

    def finish(self, end: RunEnd) -> None:
        """Write what is left, for at most `deadline` seconds, and name in a warning what was not written."""
        if self._thread is None:
            return
        if self._thinned is not None:
            self._append(self._thinned)
        with self._changed:
            self._end = end
            self._until = time.monotonic() + self._deadline
            self._changed.notify()
        self._ended.set()
        self._thread.join(self._deadline)
        for name in self._settings:
            os.environ.pop(name, None)
        self._warned = True  # the thread has nothing more to say: what is missing is named here
        missing = [*self._unwritten]
        if self._thread.is_alive():
            missing.append(f"what was still being written after {self._deadline:.0f} s")
        if waiting := len(self._events) + self._dropped:
            missing.append(f"{waiting} events")
        if missing:
            log.warning("not written to MLflow at %s: %s", self._store and self._store.uri, ", ".join(missing))

    def _write(self, store: Store) -> None:
        """The thread: open the run, write events until the end is known and none is left, then what the run leaves."""
        self._try("the run", store.open)
        if store.run_id is None:
            return
        self._try("params, tags and data", store.describe)
        self._try("what a kill left out", lambda: store.write(store.behind(self._every or 1)))
        while batch := self._next_batch():
            began, worked = time.monotonic(), time.thread_time()
            self._try(f"{len(batch)} events", partial(store.write, batch))
            seconds_an_event = (time.monotonic() - began) / len(batch)
            if len(self._events) * seconds_an_event < self._deadline * SHARE_WAITING:
                self._ended.wait(min(REST * (time.thread_time() - worked), LONGEST_REST))
        if self._end:
            for what, call in store.closing(self._end):
                self._try(what, call)

    def _next_batch(self) -> list[Event]:
        """Events in order, as many as make one call or so; none when the run has ended and all are written."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._end)
            return [self._events.popleft() for _ in range(min(len(self._events), EVENTS_A_BATCH))]

    def _try(self, what: str, call: Callable[[], None]) -> None:
        """Call until it succeeds, MLflow refuses it for good, or the run has ended and patience with it."""
        pause = RETRY_SECONDS
        while True:
            try:
                return call()
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the thread
                reason = (str(error) or type(error).__name__).splitlines()[0]
                if self.run_id is None or pause > RETRY_SECONDS:
                    self._warn(reason)
                if refused(error) or self._give_up():
                    return self._unwritten.append(f"{what} ({reason})")
            self._rest(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    def _rest(self, seconds: float) -> None:
        """Sleep, but wake up when the run ends."""
        with self._changed:
            before = self._end
            self._changed.wait_for(lambda: self._end is not before, seconds)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("MLflow: %s; training goes on and metrics.jsonl is complete", reason)

    def _give_up(self) -> bool:
        return self._end is not None and (self.run_id is None or time.monotonic() >= self._until)
