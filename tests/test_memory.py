"""What is free, and that freed memory stays."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from distgd import memory


def test_what_is_free_is_no_more_than_the_machine_has() -> None:
    assert 0 < memory.available() <= psutil.virtual_memory().total


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "current").write_text("3000\n")
    paths = (str(tmp_path / "max"), str(tmp_path / "current"))
    monkeypatch.setattr(memory, "CONTAINER", (paths, ("/nowhere", "/nowhere")))
    assert memory.available() == 2000
    (tmp_path / "max").write_text("max\n")
    assert memory.available() > 5000, "no limit"


AGAIN = """
import resource, sys, torch
from distgd.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
for _ in range(4):  # until the heap has the shape that it keeps
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_large_block_is_used_again_without_asking_the_kernel_for_its_pages() -> None:
    def faults(how: str) -> int:
        ran = subprocess.run([sys.executable, "-c", AGAIN, how], capture_output=True, text=True, timeout=60, check=True)
        return int(ran.stdout)

    pages = (1 << 26) // resource.getpagesize()
    assert faults("kept") < pages // 100 < faults("given back")
