"""What is free, here and in a container."""

from __future__ import annotations

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
