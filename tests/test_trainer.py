"""A run through the public door, on the in-process cluster: what it leaves, what it returns, what it does not touch."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from simulate import OddTask

import distgd
from distgd.config import load
from distgd.errors import BadInput, Diverged, Interrupted
from distgd.trainer import launch
from distgd.weights import fingerprint


def sections(tmp_path: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "run": {"storage": str(tmp_path)},
        "tracking": {"uri": "none"},
        "stop": {"steps": 8},
        "batch": {"size": 32, "slots": 4},
        "cluster": {"backend": "inprocess"},
    }
    for name, section in more.items():
        given[name] = {**given.get(name, {}), **section} if isinstance(section, dict) else section
    return given


def test_a_run_leaves_what_it_says(tmp_path: Path) -> None:
    result = distgd.train(sections(tmp_path, task="digits", stop={"epochs": 2, "steps": 100}))
    folder = Path(result.run_dir)
    assert load(folder / "config.yaml").batch.slots == 4
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 91))
    assert [e["step"] for e in events if e["event"] == "eval"] == [45, 90]
    assert events[-1]["event"] == "end"
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for epoch in (0, 1):
        places = sorted(p for x in lines if x["epoch"] == epoch for p in range(x["first"], x["last"] + 1))
        assert places == list(range(1437)), "every place of the epoch's order once"
    assert fingerprint(load_file(folder / "model.safetensors")) == result.weights_sha256
    assert (folder / "report" / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(result.as_dict()))["status"] == "completed"


def test_the_state_loads_into_the_plain_model(tmp_path: Path) -> None:
    task = OddTask(112)
    result = distgd.train(sections(tmp_path), task=task)
    model = task.model()
    model.load_state_dict(result.state_dict)
    assert fingerprint(model.state_dict()) == result.weights_sha256 == fingerprint(result.state_dict)


def test_the_callers_world_is_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    handler = signal.getsignal(signal.SIGINT)
    environment = dict(os.environ)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = float(torch.rand(())), float(np.random.rand()), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    distgd.train(sections(tmp_path), task=OddTask(112))
    assert (float(torch.rand(())), float(np.random.rand()), random.random()) == expected
    assert torch.get_num_threads() == 2
    assert signal.getsignal(signal.SIGINT) == handler
    assert dict(os.environ) == environment


def test_a_folder_with_files_in_it_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("x")
    with pytest.raises(BadInput, match=r"choose another with run\.name="):
        distgd.train(sections(tmp_path, task="digits"), "run.name=taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["precious"]


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"batch\.size: expected at most the 112 samples"):
        distgd.train(sections(tmp_path, batch={"size": 113}), task=OddTask(112))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_divergence_keeps_what_was_reached(tmp_path: Path, mode: str) -> None:
    how = sections(tmp_path, task="digits", optimizer={"name": "sgd", "lr": 1e30}, consistency={"mode": mode})
    with pytest.raises(Diverged, match=r"step \d+, slot \d+.*: expected a finite loss and gradient") as caught:
        distgd.train(how)
    result = caught.value.result
    assert result.status == "diverged"
    assert result.weights_sha256 is None
    assert not (Path(result.run_dir) / "model.safetensors").exists()
    assert (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()[-1].startswith('{"event": "end"')


def at_step(step: int, do: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            do()

    return watch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_what_was_reached(tmp_path: Path, number: int) -> None:
    config = load(sections(tmp_path, task="digits", stop={"steps": 500}))
    with pytest.raises(Interrupted) as caught:
        launch(config, "run", at_step(7, lambda: os.kill(os.getpid(), number)))
    assert caught.value.exit_code == 130
    assert caught.value.result.steps == 7


def test_single_samples_train_at_the_defaults(tmp_path: Path) -> None:
    """`batch.size: 1` with 2 workers: one slot, one idle worker, and the loss falls."""
    given = sections(tmp_path, task="digits", stop={"steps": 1500}, optimizer={"lr": 0.02})
    given["batch"] = {"size": 1}
    result = distgd.train(given)
    events = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [e["metrics"]["train/loss"] for e in events if e["event"] == "step"]
    assert result.slots == 1
    assert np.mean(losses[-300:]) < 0.7 * np.mean(losses[:300])
