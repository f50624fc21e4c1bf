"""What is free, here and in a container."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from distgd import memory


def test_what_is_free_is_no_more_than_the_machine_has() -> None:
    assert 0 < memory.available() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limit", "used", "parts", "files"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ],
    ids=["version 2", "version 1"],
)
def test_a_containers_limit_counts_and_the_pages_of_files_do_not(
    limit: str, used: str, parts: str, files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.available() > 5000, "no container"
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("5000\n")
    (tmp_path / used).write_text("3000\n")
    (tmp_path / parts).write_text(f"anon 1500\n{files} 1200\nactive_file 300\n")
    assert memory.available() == 3200
    (tmp_path / limit).write_text("max\n")
    assert memory.available() > 5000, "no limit"
