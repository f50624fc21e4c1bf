"""Which faults of a plan were delivered: a line each in `faults.jsonl` of the run folder, by whoever is hit.

It is written before the fault is performed, so that it is there when its writer is dead: a driver that goes on does not
deliver it a second time. On several machines the folder is one that all of them share.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = "faults.jsonl"


class Journal:
    """The file of one run folder."""

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir, NAME)
        self._read = 0  # bytes

    def add(self, text: str, whom: str) -> None:
        """A fault is delivered to somebody."""
        line = json.dumps({"fault": text, "whom": whom}) + "\n"
        with suppress(OSError):  # a machine that has no such folder; the end of the run says what it has not heard of
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(file, line.encode())
            os.close(file)

    def new(self) -> list[dict[str, Any]]:
        """Lines since the last call."""
        if not self._path.exists() or self._path.stat().st_size == self._read:
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            found = file.read()
        self._read += found.rfind(b"\n") + 1
        return [json.loads(line) for line in found[: found.rfind(b"\n") + 1].splitlines()]

    def counts(self, texts: Sequence[str]) -> dict[int, int]:
        """How often each fault of a plan has been delivered, by its place there."""
        there = Counter(line["fault"] for line in Journal(self._path.parent).new())
        return {number: there[text] for number, text in enumerate(texts) if there[text]}
