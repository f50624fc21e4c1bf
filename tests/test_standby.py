"""Standby processes: one a machine, taken once, never where memory is short, and gone in the end."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from distgd import standby
from distgd.standby import SETTLE, Standbys


class Processes:
    """Starts processes that are there at once; `stay` says whether they are ready."""

    def __init__(self, stay: bool | None = True) -> None:
        self.stay, self.living, self.begun = stay, [], []  # type: ignore[var-annotated]

    def begin(self, node: str) -> Any:
        process = f"{node}.{len(self.begun)}"
        self.begun.append(process)
        self.living.append(process)
        return process

    def stays(self, process: Any) -> bool | None:
        return self.stay

    def end(self, process: Any) -> None:
        self.living.remove(process)


def watch(standbys: Standbys, seconds: float, nodes: set[str], since: float = 0.0) -> None:
    for tenth in range(int(seconds * 10)):
        standbys.tend(lambda: nodes, since + tenth / 10)


def test_one_on_each_machine_whatever_time_passes() -> None:
    processes = Processes()
    watch(Standbys(processes, on=True), 10 * SETTLE, {"a", "b"})
    assert sorted(process[0] for process in processes.begun) == ["a", "b"]


def test_who_is_taken_is_nobodys_standby_and_another_one_comes_later() -> None:
    processes = Processes()
    standbys = Standbys(processes, on=True)
    watch(standbys, 2 * SETTLE, {"a"})
    assert standbys.take("a", 10.0) == "a.0"
    assert standbys.take("a", 10.0) is None, "taken once"
    watch(standbys, SETTLE - 0.1, {"a"}, since=10.0)
    assert len(processes.begun) == 1, "not beside the one that starts to work"
    watch(standbys, SETTLE, {"a"}, since=10.0 + SETTLE)
    assert standbys.take("a", 20.0) == "a.1"
    standbys.close()
    assert "a.0" in processes.living, "it belongs to whoever took it"


@pytest.mark.parametrize("stay", [None, False], ids=["imports", "no memory"])
def test_who_is_not_ready_is_not_taken(stay: bool | None) -> None:
    processes = Processes(stay)
    standbys = Standbys(processes, on=True)
    watch(standbys, 5 * SETTLE, {"a"})
    assert standbys.take("a", 30.0) is None
    assert len(processes.begun) == 1, "a machine without memory is not asked again"
    assert processes.living == ([] if stay is False else ["a.0"])


def test_a_machine_where_nobody_is_has_none_to_take() -> None:
    standbys = Standbys(Processes(), on=True)
    watch(standbys, SETTLE, {"a"})
    assert standbys.take("b", SETTLE) is None


def test_all_are_gone_in_the_end_and_none_comes_afterwards() -> None:
    processes = Processes()
    standbys = Standbys(processes, on=True)
    watch(standbys, SETTLE, {"a", "b"})
    standbys.close()
    watch(standbys, 5 * SETTLE, {"a", "b"}, since=SETTLE)
    assert processes.living == []


def test_none_where_they_are_off() -> None:
    processes = Processes()
    watch(Standbys(processes, on=False), 5 * SETTLE, {"a"})
    assert processes.begun == []


def test_without_memory_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "available", lambda: standby.NEEDS - 1)
    assert not standby.prepare(["no.such.module"])


LOOKS = """
import os, sys
from types import ModuleType
sys.modules["looking"] = looking = ModuleType("looking")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "looks":
            looking.during = os.getpriority(os.PRIO_PROCESS, 0)
sys.meta_path.insert(0, Finder())
from distgd.standby import prepare
try:
    prepare(["looks"])
finally:
    print(looking.during - os.getpriority(os.PRIO_PROCESS, 0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_imports_give_way_and_the_process_does_not_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["5"], done.stderr
