"""A run's folder: what is made for it, and what is taken back where nothing began."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from distgd.config import load
from distgd.errors import BadInput
from distgd.runfolder import give_back, missing, new_folder, refused_by_disk


def folder_in(storage: Path, name: str = "mine") -> Path:
    sections = {"task": "digits", "stop": {"steps": 1}, "run": {"storage": str(storage), "name": name}}
    return new_folder(load(sections), "run")


def test_what_was_made_is_taken_back(tmp_path: Path) -> None:
    storage = tmp_path / "new" / "runs"
    made = missing(storage)
    run_dir = folder_in(storage)
    (run_dir / "config.yaml").write_text("x")
    give_back(run_dir, made)
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_and_other_runs_stay(tmp_path: Path) -> None:
    storage = tmp_path / "new" / "runs"
    made = missing(storage)
    run_dir, other = folder_in(storage), folder_in(storage, "theirs")
    give_back(run_dir, made)
    assert not run_dir.exists() and other.is_dir()
    give_back(other, missing(storage))
    assert storage.is_dir(), "it was there before the second run"


@pytest.mark.parametrize("name", ["taken", "file"])
def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=r"run\.name: expected a new run folder"):
        folder_in(tmp_path, name)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_what_a_disk_refuses_is_about_the_disk(tmp_path: Path) -> None:
    full = refused_by_disk(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert full is not None and "No space left on device" in str(full) and "MB free" in str(full)
    assert refused_by_disk(FileNotFoundError(errno.ENOENT, "their own file"), tmp_path) is None
