"""The canary: the same on one machine whenever it is taken, another one where the arithmetic is another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distgd import canary
from distgd.device import be_deterministic
from distgd.optim import OptimizerSpec

ADAM = OptimizerSpec("AdamW", {"lr": 0.1})
TAKEN = """
from distgd import canary
from distgd.optim import OptimizerSpec
import torch
print(canary.gradients("cpu", 1), canary.steps(OptimizerSpec("AdamW", {"lr": 0.1}), torch.float32, "cpu"))
"""


def elsewhere(**environment: str) -> list[str]:
    """A worker's and a server's canary in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [sys.executable, "-c", TAKEN], env=env, check=True, capture_output=True, text=True
    ).stdout.split()


def test_it_is_the_same_whenever_it_is_taken() -> None:
    kept = []  # so that memory is elsewhere each time
    for size in range(20):
        kept.append(torch.empty(1000 + 37 * size))
        assert canary.gradients("cpu", 1) == canary.gradients("cpu", 1)
        assert len({canary.gradients("cpu", 2) for _ in range(3)}) == 1
        assert canary.steps(ADAM, torch.float32, "cpu") == canary.steps(ADAM, torch.float32, "cpu")


def test_it_is_the_same_in_another_process() -> None:
    assert elsewhere() == [canary.gradients("cpu", 1), canary.steps(ADAM, torch.float32, "cpu")]


def test_another_number_of_threads_gives_another_one_and_torch_has_its_own_again() -> None:
    before = torch.get_num_threads()
    assert canary.gradients("cpu", 1) != canary.gradients("cpu", 2)
    assert torch.get_num_threads() == before


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the CPU has one kind of vectors"
)
def test_other_vector_instructions_give_another_one_to_workers_and_to_servers() -> None:
    here, there = elsewhere(), elsewhere(ATEN_CPU_CAPABILITY="default")
    assert here[0] != there[0]
    assert here[1] != there[1]


def test_an_input_that_differs_in_its_last_bit_gives_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = canary.gradients("cpu", 1), canary.steps(ADAM, torch.float32, "cpu")
    fractions = canary._Inputs.__call__

    def nudged(self: canary._Inputs, seed: int, *shape: int) -> torch.Tensor:
        value = fractions(self, seed, *shape).detach()
        value.view(-1)[-1] = torch.nextafter(value.view(-1)[-1], torch.ones((), dtype=value.dtype))
        return value.requires_grad_()

    monkeypatch.setattr(canary._Inputs, "__call__", nudged)
    assert canary.gradients("cpu", 1) != before[0]
    assert canary.steps(ADAM, torch.float32, "cpu") != before[1]


def test_a_servers_is_of_its_own_optimizer_and_dtype() -> None:
    sgd = OptimizerSpec("SGD", {"lr": 0.1})
    found = {canary.steps(o, d, "cpu") for o in (ADAM, sgd) for d in (torch.float32, torch.float64)}
    assert len(found) == 4


def test_nothing_of_the_process_is_changed_and_a_task_that_turned_gradients_off_does_not_matter() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch.no_grad():
        inside = canary.gradients("cpu", 1)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(4), expected)
    assert inside == canary.gradients("cpu", 1)


def test_it_is_over_before_anybody_waits() -> None:
    canary.gradients("cpu", 1)  # libraries are loaded
    times = []
    for _ in range(5):
        began = time.perf_counter()
        canary.gradients("cpu", 1)
        canary.steps(ADAM, torch.float32, "cpu")
        times.append(time.perf_counter() - began)
    assert min(times) < 0.2, "50 ms is the aim on a machine that does nothing else"


def test_the_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Quick 9000\nflags\t: a b\n")
    monkeypatch.setattr(canary, "CPUINFO", tmp_path / "cpuinfo")
    named = canary.machine("cpu", 2)
    assert named.startswith("Quick 9000, ")
    assert f"torch {torch.__version__}" in named
    assert named.endswith("2 threads")
    monkeypatch.setattr(canary, "CPUINFO", tmp_path / "nothing")
    assert not canary.machine("cpu", 1).startswith(",")


@pytest.fixture
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_deterministic_algorithms_are_on_from_then_on(as_it_was: None) -> None:
    be_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.gpu
def test_a_gpu_gives_the_same_one_twice_and_another_than_the_cpu(as_it_was: None) -> None:
    be_deterministic()
    found = canary.gradients("cuda", 1)
    assert {canary.gradients("cuda", 1) for _ in range(10)} == {found}
    assert found != canary.gradients("cpu", 1)
    assert canary.machine("cuda", 1).startswith(torch.cuda.get_device_name())
    assert canary.steps(ADAM, torch.float32, "cuda") == canary.steps(ADAM, torch.float32, "cuda")
