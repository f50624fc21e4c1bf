"""How much memory is free, and whether this process keeps what it has freed."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil

CONTAINER = (  # a control group's limit and what is used of it, in both versions
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def available() -> int:
    """Bytes that can be taken without swapping, on this machine and in this container."""
    return min(psutil.virtual_memory().available, *(_left(*paths) for paths in CONTAINER))


def _left(limit: str, used: str) -> int:
    try:
        return int(Path(limit).read_text()) - int(Path(used).read_text())
    except (OSError, ValueError):  # no such control group, or no limit in it
        return sys.maxsize


def keep_freed() -> None:
    """Keep freed memory for the next step, where the C library is glibc; elsewhere nothing changes.

    glibc gives every block above 32 MB back when it is freed. A step's large gradients and activations would be taken
    anew from the kernel each time, which sets every page to zero, and that takes longer than computing them. Cost: the
    process stays at its highest size.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
