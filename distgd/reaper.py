"""Ends what Ray leaves of a private cluster when its driver is gone without a word, as after `kill -9`.

Run as a script beside the driver, in a session of its own. It reads its standard input, which ends with the driver: if
the driver said nothing before, every process that was started for the cluster is killed, and its folder removed.

    python reaper.py FOLDER
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import psutil

MARK = "DISTGD_CLUSTER"
"""The environment variable that every process of a private cluster inherits; its value is the cluster's folder."""
DONE = b"done"
"""What a driver says that has ended its cluster itself."""
ROUNDS, REST = 20, 0.25
"""Some processes start others while they end: it is looked for them so often, and so many seconds apart."""


def end_all(folder: Path) -> int:
    """Kill every process of a cluster that is still there, by its mark or its folder; how many there were."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and _is_of(process, str(folder)):
                process.kill()
                found += 1
    return found


def _is_of(process: psutil.Process, folder: str) -> bool:
    """By what it was started with; or, as a process may have written its name over that, by the logs that it writes."""
    words = process.cmdline()
    if any(folder in word for word in words) and __file__ not in words:
        return True
    return process.environ().get(MARK) == folder or any(folder in file.path for file in process.open_files())


def main(folder: Path) -> None:
    """Wait for the driver's end, and see to what it has left."""
    said = sys.stdin.buffer.read()
    if said == DONE:
        return
    for _ in range(ROUNDS):
        if not end_all(folder):
            break
        time.sleep(REST)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
