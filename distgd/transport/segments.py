"""Memory that processes of one machine share.

A segment is allocated whole when it is made, so that memory which is not there is an error then and never a SIGBUS. It
has no name: its descriptor is handed over a socket, only its maker can write to it, and it is gone with the last
process that has it mapped, however that process ends. So nothing is ever left behind, and nothing is swept. It is not
in /dev/shm either, whose size containers limit to 64 MB unless told otherwise; nothing limits it but memory itself, so
that what is free is looked at before.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from distgd.memory import available

Array = np.ndarray[Any, Any]
Allocate = Callable[[int, str], Array]
"""Zeros of a size and a dtype, in memory that other processes may be shown."""

SUPPORTED = sys.platform == "linux"
PAGE = mmap.PAGESIZE
MOST = 0.9  # of what is free; the rest is for whoever else needs some now
_MAYMOVE_FIXED = 1 | 2  # mremap's flags; the same on every Linux


class Segment:
    """A piece of shared memory, mapped here.

    Attributes:
        memory: uint8, whole pages; read-only where another process made the segment.
        descriptor: to be handed to others, who can only read; -1 once it is closed.
    """

    def __init__(self, memory: Array, descriptor: int) -> None:
        self.memory = memory
        self.descriptor = descriptor
        self.address = address_of(memory)

    @classmethod
    def allocate(cls, size: int) -> Segment:
        """A new segment of at least `size` bytes of zeros.

        Raises:
            OSError: there is not so much memory, or no shared memory of this kind.
        """
        whole = max(1, -(-size // PAGE)) * PAGE
        writable = reserve(whole)
        try:
            readable = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
            return cls(np.frombuffer(mmap.mmap(writable, whole), dtype=np.uint8), readable)
        finally:
            os.close(writable)

    @classmethod
    def adopt(cls, descriptor: int) -> Segment:
        """Map another process's segment; the descriptor is closed."""
        try:
            mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        return cls(read_only(mapped), -1)

    def holds(self, address: int, size: int) -> bool:
        """Whether `size` bytes at `address` lie in here."""
        return self.address <= address and address + size <= self.address + self.memory.nbytes


def reserve(size: int) -> int:
    """The descriptor of `size` bytes of new memory that can be shared.

    Raises:
        OSError: there is not so much. Asking the kernel without looking before would end other processes.
    """
    if not SUPPORTED:
        raise OSError(errno.ENOSYS, "no shared memory without a name on this system")
    if size > (free := available()) * MOST:
        raise OSError(errno.ENOMEM, f"{free >> 20} MB of memory are free and {size >> 20} MB were asked for")
    descriptor = os.memfd_create("distgd", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def address_of(array: Array) -> int:
    """Where an array's first byte lies."""
    return int(array.__array_interface__["data"][0])


def read_only(mapped: mmap.mmap) -> Array:
    """A mapping as an array that numpy refuses to write to.

    The memory below is declared writable, as torch warns of any other, whether it is going to write to it or not. What
    protects it is the mapping.
    """
    start = address_of(np.frombuffer(mapped, dtype=np.uint8))
    block = (ctypes.c_uint8 * len(mapped)).from_address(start)
    block.mapped = mapped  # type: ignore[attr-defined]  # so that it lives as long as any view
    array: Array = np.frombuffer(memoryview(block), dtype=np.uint8).view()
    array.flags.writeable = False
    return array


class Recycled:
    """Memory that is taken anew with each timeline, from what the one before had: others have that mapped already.

    Whoever still reads it is in the former timeline, where nothing counts any more.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._taken: list[Array] = []
        self._free: list[Array] = []

    def __call__(self, size: int, dtype: str) -> Array:
        """Zeros, [size]."""
        wanted = np.dtype(dtype)
        for at, array in enumerate(self._free):
            if array.size == size and array.dtype == wanted:
                self._taken.append(self._free.pop(at))
                array.fill(0)
                return array
        self._taken.append(self._allocate(size, dtype))
        return self._taken[-1]

    def begin(self) -> None:
        """Nothing that was taken so far is needed any more."""
        self._free += self._taken
        self._taken = []


class Window:
    """One contiguous range of addresses that shows parts of several segments, or holds values of its own.

    Attributes:
        memory: uint8, [size]; what nobody is shown in holds zeros at first, and can be written to.
    """

    def __init__(self, size: int) -> None:
        whole = max(1, -(-size // PAGE)) * PAGE
        self.memory: Array = np.frombuffer(mmap.mmap(-1, whole), dtype=np.uint8)[:size]
        self._start = address_of(self.memory)
        self._shown: dict[
            int, Array
        ] = {}  # first byte of a part -> what it shows, kept so that its address stays its own

    def show(self, at: int, array: Array) -> bool:
        """Let the bytes from `at` on be the memory of `array`, which is shared: later writes there show here.

        Nothing is copied. Where that memory is another process's, a process that writes to these bytes is ended by
        SIGSEGV.

        Returns:
            False where that cannot be: memory that nobody else can be shown, or parts that share a page.
        """
        source = address_of(array)
        if not SUPPORTED or at % PAGE or source % PAGE:
            return False
        if array.nbytes % PAGE and at + array.nbytes < self.memory.nbytes:
            return False
        shown = self._shown.get(at)
        if shown is None or address_of(shown) != source:
            if not _duplicate(source, -(-array.nbytes // PAGE) * PAGE, self._start + at):
                return False
            self._shown[at] = array
        return True


def _duplicate(source: int, size: int, target: int) -> bool:
    """Map the pages at `source` at `target` too: mremap with an old size of 0 leaves the old mapping (mremap(2)).

    False where they are private, which the kernel refuses before it changes anything.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    words = (ctypes.c_void_p(source), ctypes.c_size_t(0), ctypes.c_size_t(size))
    mapped = libc.mremap(*words, ctypes.c_int(_MAYMOVE_FIXED), ctypes.c_void_p(target))
    if mapped != target:
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            return False
        raise OSError(number, f"mremap: {os.strerror(number)}")
    return True
