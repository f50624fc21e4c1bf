"""A card (CUDA GPU) and host memory: copies that run beside what the card computes, and memory that it reaches itself.

CUDA copies without a processor's help only from and to memory that is registered with it, which pins its pages. Shared
memory is registered where the system allows that; other memory, and a mapping that the system does not let be
registered, goes through CUDA's own buffers, with the same result.

Nothing of this is asked for where everything is computed on the CPU: `Card.of` is None there.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distgd.transport.segments import PAGE

log = logging.getLogger("distgd.device")

LEAST = 1 << 16
"""Bytes below which registering costs more than it saves."""
PORTABLE, READ_ONLY = 1, 8  # cudaHostRegisterPortable: for every context; cudaHostRegisterReadOnly: as it is mapped


def be_deterministic() -> None:
    """Let torch take deterministic algorithms alone, in this process; called before CUDA starts.

    An operation that has none raises torch's own error, which names it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Compute with so many of torch's threads; set back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Copies(Protocol):
    """Copies that run in the order in which they are begun, beside what the device computes."""

    def begin(self, into: Tensor, value: Tensor, *, blocking: bool = False) -> Callable[[], None]:
        """Copy when all that the device has been asked for until now is done.

        Args:
            blocking: return when `value` has been read; else it must neither go away nor change before the copy is
                made.

        Returns:
            What returns when this copy is made.
        """

    def join(self) -> None:
        """Let all that the device is asked for from now on come after the copies begun until now."""


class StreamCopies:
    """`Copies` on a CUDA stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, into: Tensor, value: Tensor, *, blocking: bool = False) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(value, non_blocking=not blocking)
        done: Callable[[], None] = self._stream.record_event().synchronize
        return done

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class Pins:
    """Host memory that is registered with CUDA, for as long as this object lives.

    It keeps what it has been shown from being freed: pages that are given back while they are registered would go on
    being read and written by the card.

    Args:
        cudart: has CUDA's `cudaHostRegister` and `cudaHostUnregister`, as `torch.cuda.cudart()` has.
        forget: called after CUDA has refused, to clear the error that it keeps.
    """

    def __init__(self, cudart: Any, forget: Callable[[], None]) -> None:
        self._cudart, self._forget = cudart, forget
        self._shown: dict[Hashable, tuple[Tensor, bool]] = {}  # what was shown last under a key, and whether it is ours
        self._warned = False
        weakref.finalize(self, _release_all, self._shown, cudart)

    def pin(self, key: Hashable, memory: Tensor, *, read_only: bool = False) -> bool:
        """Register a contiguous tensor's memory, once; what was shown under this key before is let go.

        Args:
            read_only: this process may not write to it.

        Returns:
            Whether the card reaches it by itself. Where CUDA refuses, the first time is told in a warning.
        """
        known = self._shown.get(key)
        if known is not None and (known[0].data_ptr(), known[0].nbytes) == (memory.data_ptr(), memory.nbytes):
            return known[1]
        if known is not None:
            _release(known, self._cudart)
        pinned = self._register(memory, PORTABLE | (READ_ONLY if read_only else 0))
        self._shown[key] = (memory, pinned)
        return pinned

    def _register(self, memory: Tensor, flags: int) -> bool:
        if memory.data_ptr() % PAGE or memory.nbytes < LEAST:  # in no segment, so that its pages are others' too
            return False
        error = int(self._cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, flags))
        if error:
            self._forget()
            if not self._warned:
                self._warned = True
                what = "read-only " if flags & READ_ONLY else ""
                log.warning("CUDA registers no %sshared memory (error %d): copies take its own buffers", what, error)
        return not error


def _release(shown: tuple[Tensor, bool], cudart: Any) -> None:
    memory, pinned = shown
    if pinned:
        cudart.cudaHostUnregister(memory.data_ptr())


def _release_all(shown: dict[Hashable, tuple[Tensor, bool]], cudart: Any) -> None:
    while shown:
        _release(shown.popitem()[1], cudart)


@dataclass(frozen=True)
class Card:
    """A CUDA device, as seen from host memory."""

    device: torch.device
    copies: Copies
    pins: Pins

    @classmethod
    def of(cls, device: torch.device) -> Card | None:
        """The card that `device` is; None for the CPU."""
        if device.type != "cuda":
            return None
        whole = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

        def forget() -> None:
            with suppress(RuntimeError):  # torch would find the error after its next kernel, and blame that one
                torch.zeros(1, device=whole).add_(1)

        return cls(whole, StreamCopies(whole), Pins(torch.cuda.cudart(), forget))  # type: ignore[no-untyped-call]
