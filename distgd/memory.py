"""How much memory is free."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

CONTAINER = (  # a control group's limit and what is used of it, in both versions
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available() -> int:
    """Bytes that can be taken without swapping, on this machine and in this container."""
    return min(psutil.virtual_memory().available, *(_left(*paths) for paths in CONTAINER))


def _left(limit: str, used: str) -> int:
    try:
        return int(Path(limit).read_text()) - int(Path(used).read_text())
    except (OSError, ValueError):  # no such control group, or no limit in it
        return sys.maxsize
