"""Rows of `scripts/prove train` about the way in: tasks of one's own, stop rules, sweeps, bad input."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import test_models
import yaml

import distgd
from proofs import mine, outside, trials
from proofs.rows import Bench, Measured, Proof

proof = Proof()

ROOT = Path(__file__).parents[2]
ADULT = ROOT.parent / "shared" / "data"

MY_TASK = """\
import torch
from torch import nn

class MyTask:
    def model(self):
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, model, batch):
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])

    def train_data(self):
        x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        return x, (x[:, 0] * x[:, 1] > 0).float()

    eval_data = train_data
"""
MY_CONFIG = """\
task:
  path: my_task:MyTask
batch: {size: 50, slots: 4}
stop: {epochs: 10}
optimizer:
  name: adam
  lr: 0.01
tracking: {uri: none}
"""


def fresh_environment(folder: Path) -> Path:
    """A virtual environment with the wheel in it, pinned as `scripts/train` pins, and nothing of this folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "wheel"), str(ROOT)]
    outside.run(build, folder).checked()
    (wheel,) = (folder / "wheel").glob("*.whl")
    outside.run([sys.executable, "-m", "venv", str(folder / "venv")], folder).checked()
    python = folder / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    outside.run(install, folder).checked()
    return python.with_name("distgd")


def hiding(command: list[str]) -> list[str]:
    """The command where this repository and its neighbors are empty folders; as it is where that takes rights."""
    hidden = ROOT if Path(sys.base_prefix).is_relative_to(ROOT.parent) else ROOT.parent
    if os.geteuid() != 0:
        return command
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none "{hidden}" && exec "$@"', "sh", *command]


@proof.row("exit 0, the loss falls; from a folder with these two files alone")
def wheel_trains_in_an_empty_folder(bench: Bench) -> Measured:
    """With the wheel in a fresh environment a `my_task.py` of 15 lines and a YAML of 8 train, the repository hidden."""
    distgd_there = fresh_environment(bench.folder)
    folder = bench.folder / "empty"
    folder.mkdir()
    (folder / "my_task.py").write_text(MY_TASK, encoding="utf-8")
    (folder / "mine.yaml").write_text(MY_CONFIG, encoding="utf-8")
    ended = outside.run(hiding([str(distgd_there), "train", "mine.yaml", "--json"]), folder).checked()
    loss, lines = ended.result["metrics"]["eval/loss"], (len(MY_TASK.splitlines()), len(MY_CONFIG.splitlines()))
    found = f"exit {ended.code}, eval/loss {loss:.3f} after {ended.result['steps']} steps, {ended.seconds:.0f} s"
    how = "repository and its neighbors hidden" if os.geteuid() == 0 else "not root: nothing is hidden"
    return Measured(found, loss < 0.5 and lines <= (15, 8), f"{lines[0]} and {lines[1]} lines; {how}; log 2 = 0.693")


@proof.row("one weights_sha256")
def three_ways_are_one(bench: Bench) -> Measured:
    """Function arguments, names in a config and a class give the same bits, on Ray."""
    sections = {"batch": {"size": 50, "slots": 4}, "stop": {"epochs": 2}, "tracking": {"uri": "none"}}
    sections |= {"run": {"storage": str(bench.folder / "runs")}, "optimizer": {"name": "adam", "lr": 0.01}}
    names = {"model": "proofs.mine:make_model", "loss": "proofs.mine:error", "train_data": "proofs.mine:points"}
    given: Mapping[str, Any] = {"model": mine.make_model, "loss": mine.error, "train_data": mine.points}
    ways: Mapping[str, Callable[[], distgd.Result]] = {
        "functions": lambda: distgd.train(sections, **given),
        "with data itself": lambda: distgd.train(sections, **{**given, "train_data": mine.points()}),
        "names": lambda: distgd.train({**sections, "task": names}),
        "class": lambda: distgd.train({**sections, "task": {"path": "proofs.mine:Mine"}}),
    }
    with trials.ray_cluster():
        prints = {way: str(train().weights_sha256)[:12] for way, train in ways.items()}
    return Measured(", ".join(f"{way} {sha}" for way, sha in prints.items()), len(set(prints.values())) == 1)


@proof.row(">= 0.84 accuracy on UCI's test file")
def adult_is_learnt(bench: Bench) -> Measured:
    """`tabular` on UCI Adult: comma and space, no header, ? for missing, test labels that end in a dot."""
    if not ADULT.exists():
        return Measured(f"not measured: no files in {ADULT}", holds=False)
    config = {
        "task": "tabular",
        "data": {
            "path": str(ADULT / "adult-train.csv"),
            "held_out": {"path": str(ADULT / "adult-test.csv")},
            "csv": {"columns": ADULT_COLUMNS},
            "target": {"column": "income", "trim": "."},
            "features": {"fnlwgt": "drop", "capital-*": {"kind": "numeric", "clip": 5}, "*": "auto"},
        },
        "batch": {"size": 256, "slots": 4},
        "stop": {"epochs": 1 if bench.quick else 3},
        "optimizer": {"name": "adam", "lr": 0.003},
    }
    (bench.folder / "adult.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    ended = outside.distgd("train", "adult.yaml", "--json", cwd=bench.folder).checked()
    accuracy = ended.result["metrics"]["eval/accuracy"]
    found = f"{accuracy:.4f} after {ended.result['samples']:,} rows in {ended.seconds:.0f} s"
    return Measured(found, accuracy >= 0.84, "the defaults, Adam, 2 workers")


ADULT_COLUMNS = [
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
]


@proof.row("norm of the difference over norm <= 1e-5 after 50 steps")
def transformer_trains_as_in_a_plain_loop(bench: Bench) -> Measured:
    """A padded batch through a transformer of two layers from `transformers` trains as in a plain loop."""
    steps = 50
    away = test_models.transformer_distance(steps)
    return Measured(f"{away:.1e} after {steps} steps, float32", away <= 1e-5, "AdamW, 3 workers, 4 slots, in process")


@proof.row("exactly equal for batches of 1, 7 and 360 samples")
def accuracy_is_scikit_learns(bench: Bench) -> Measured:
    """Accuracy over the whole held-out set is scikit-learn's, whatever the batch."""
    expected, found = trials.accuracies(bench.folder, (1, 7, 360))
    shown = ", ".join(f"{size}: {value!r}" for size, value in found.items())
    return Measured(f"scikit-learn {expected!r}; {shown}", set(found.values()) == {expected}, "digits, 360 samples")


@proof.row("the step that the run's own evaluations say, in three runs on Ray each; one weights_sha256")
def stop_rules_end_at_the_right_step(bench: Bench) -> Measured:
    """`stop.target` and `stop.patience` end a digits run at the right step, with 1, 2 and 3 workers."""
    found, holds = [], True
    with trials.ray_cluster():
        for rule in ("target", "patience"):
            ends = [trials.stopped_by(rule, workers, bench.folder) for workers in (1, 2, 3)]
            found.append(f"{rule}: step {ends[0].steps} in {len(ends)} of 3 ({ends[0].ended_by})")
            holds = holds and all(end.right for end in ends) and len({(e.steps, e.sha256) for e in ends}) == 1
    return Measured("; ".join(found), holds, "an evaluation every 15 steps")


@proof.row("4 MLflow runs, 1 stopped early, at most 2 at a time; Ray up, nothing of the runs left in it")
def tune_sweeps(bench: Bench) -> Measured:
    """Four Ray Tune trials, two at a time, one stopped early by `on_event`."""
    swept = trials.sweep(bench.folder)
    found = (
        f"{swept.mlflow_runs} MLflow runs, status {swept.statuses}, {swept.at_once} at a time; Ray "
        f"{'up' if swept.ray_up else 'down'}, processes left {swept.processes}, "
        f"CPUs free {swept.cpus:g} of {swept.all_cpus:g}"
    )
    stopped = sorted(swept.statuses) == ["completed", "completed", "completed", "stopped"]
    clean = swept.ray_up and swept.processes == 0 and swept.cpus == swept.all_cpus
    return Measured(found, swept.mlflow_runs == 4 and stopped and clean and swept.at_once <= 2)


@proof.row(">= 60 cases, all told with what was expected, found and to do; exit 1 or 2; nothing left behind")
def bad_inputs_are_told(bench: Bench) -> Measured:
    """Every case of tests/bad_inputs.yaml ends as its line says."""
    listed = (ROOT / "tests" / "bad_inputs.yaml").read_text(encoding="utf-8")
    cases = re.findall(r"^  - name: ", listed, re.MULTILINE)
    chosen = ["-k", "yaml"] if bench.quick else []
    with mock.patch.object(outside, "PATIENCE", 1800.0):
        ended = outside.run([sys.executable, "-m", "pytest", "-q", "tests/test_bad_inputs.py", *chosen], ROOT)
    last = ended.out.strip().splitlines()[-1] if ended.out.strip() else ended.err[-200:]
    return Measured(f"{len(cases)} cases; {last}", ended.code == 0 and len(cases) >= 60, "tests/bad_inputs.yaml")
