from __future__ import annotations

from pathlib import Path

import pytest

from distgd import machine


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "COPIED", 1 << 20)
    monkeypatch.setattr(machine, "MESSAGES", 3)


def test_a_machine_has_cores_bandwidth_and_messages() -> None:
    here = machine.measure()
    assert here.cores >= 1
    assert 0 < here.bandwidth <= here.bandwidth_all
    assert 0 < here.message < 1


def test_cores_are_those_of_this_process() -> None:
    assert machine.cores() <= len(machine.os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("", None)]
)
def test_a_containers_quota_counts(
    quota: str, cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "no.max")
    without = machine.cores()
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    assert machine.cores() == (without if cores is None else cores)


def test_without_sockets_of_this_kind_a_message_has_a_typical_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "AVAILABLE", False)
    assert machine.message_seconds() == machine.ELSEWHERE
