"""A run of ours that counts what goes through a network device, as bytes a step.

    python -m proofs.counted CONFIG DEVICE

prints one JSON object: `result` as `--json` has it, and `bytes_per_step`, sent and received, over the second half of
the steps but the last few.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import distgd

LAST = 3  # steps that are not counted: the end of a run sends the weights to the driver


class Counter:
    """Sees every step; remembers the counters at the first and at the last step that count."""

    def __init__(self, device: str, steps: int) -> None:
        self._files = [Path(f"/sys/class/net/{device}/statistics/{way}_bytes") for way in ("tx", "rx")]
        self._at = {steps // 2: 0, steps - LAST: 0}

    def see(self, event: dict[str, Any]) -> None:
        """An event of the run."""
        if event["event"] == "step" and event["step"] in self._at:
            self._at[event["step"]] = sum(int(file.read_text()) for file in self._files)

    def per_step(self) -> float:
        """Bytes, both ways together."""
        (first, before), (last, after) = self._at.items()
        return (after - before) / (last - first)


def main(config: str, device: str) -> None:
    """Train and print."""
    wanted = json.loads(Path(config).read_text(encoding="utf-8"))
    counter = Counter(device, wanted["stop"]["steps"])
    result = distgd.train(wanted, on_event=counter.see)
    print(json.dumps({"result": result.as_dict(), "bytes_per_step": counter.per_step()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
