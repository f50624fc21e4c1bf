"""What the rows about stop rules, metrics and sweeps run."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import distgd
from distgd.replica import Replica
from distgd.tasks.digits import Digits


@contextmanager
def ray_cluster(cpus: int = 8) -> Iterator[None]:
    """A Ray cluster of this process: the runs inside share it, which saves each the start of its own."""
    import ray

    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=folder, **quiet)
        try:
            yield
        finally:
            ray.shutdown()


def events(run_dir: str | Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in a run's metrics.jsonl."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def accuracies(folder: Path, sizes: tuple[int, ...]) -> tuple[float, dict[int, float]]:
    """scikit-learn's accuracy of a trained model on digits' held-out set, and ours by size of batch."""
    from sklearn.metrics import accuracy_score

    result = distgd.train(
        {"task": "digits", "stop": {"steps": 60}, "optimizer": {"lr": 0.1}, "cluster": {"backend": "inprocess"}},
        f"run.storage={folder}",
        "tracking.uri=none",
    )
    replica = Replica(Digits(), seed=0)
    replica.model.load_state_dict(result.state_dict)
    pixels, labels = Digits().eval_data()
    with torch.no_grad():
        guessed = replica.model.eval()(pixels).argmax(1).numpy()
    expected = float(accuracy_score(np.asarray(labels), guessed))
    source = replica.eval_source()
    return expected, {size: replica.evaluate(source, size)["accuracy"] for size in sizes}


@dataclass(frozen=True)
class Ending:
    """A run that a rule ended; `right` says whether its evaluations say the same step."""

    steps: int
    sha256: str
    ended_by: str
    right: bool


EVERY = 15
RULES: dict[str, dict[str, Any]] = {
    "target": {"metric": "eval/accuracy", "at_least": 0.93},
    "patience": {"metric": "eval/loss", "evals": 3, "min_delta": 0.02},
}


def stopped_by(rule: str, workers: int, folder: Path) -> Ending:
    """A digits run that `stop.target` or `stop.patience` ends."""
    config = {
        "task": "digits",
        "batch": {"size": 32, "slots": 4},
        "stop": {"steps": 3000, rule: RULES[rule]},
        "optimizer": {"name": "adam", "lr": 0.003},
        "eval": {"every": {"steps": EVERY}},
        "cluster": {"workers": workers, "servers": workers},
        "run": {"storage": str(folder)},
        "tracking": {"uri": "none"},
    }
    result = distgd.train(config)
    scores = [(e["step"], e["metrics"][RULES[rule]["metric"]]) for e in events(result.run_dir, "eval")]
    due = [step for step, _ in scores] == list(range(EVERY, result.steps + 1, EVERY))
    ends = [_reached(scores[: at + 1]) if rule == "target" else _waited(scores[: at + 1]) for at in range(len(scores))]
    right = due and ends == [False] * (len(ends) - 1) + [True]
    return Ending(result.steps, str(result.weights_sha256), str(result.ended_by), right)


def _reached(scores: list[tuple[int, float]]) -> bool:
    return scores[-1][1] >= RULES["target"]["at_least"]


def _waited(scores: list[tuple[int, float]]) -> bool:
    """Whether the last so many losses were no better than the best before them, step by step."""
    best, since = float("inf"), 0
    for _, loss in scores:
        best, since = (loss, 0) if loss < best - RULES["patience"]["min_delta"] else (best, since + 1)
    return since >= RULES["patience"]["evals"]


GIVEN_BACK = 20.0  # seconds that Ray has to take back what the last trial held
ROLES = ("ray::Server", "ray::Worker", "ray::Evaluator")
"""How processes of a run are called."""


@dataclass(frozen=True)
class Swept:
    """What a sweep left: runs in MLflow, how each ended, the most at once, and Ray afterwards."""

    mlflow_runs: int
    statuses: list[str]
    at_once: int
    ray_up: bool
    processes: int
    cpus: float
    all_cpus: float


def sweep(folder: Path) -> Swept:
    """Four trials of Ray Tune over the learning rate, two at a time; the smallest stops itself after 20 steps."""
    import ray
    from mlflow import MlflowClient
    from ray import tune

    config = {
        "task": "digits",
        "batch": {"size": 32, "slots": 4},
        "stop": {"epochs": 2},
        "eval": {"every": {"steps": 20}},
        "run": {"storage": str(folder / "runs")},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "cluster": {"start_timeout": 120},
    }

    def trial(parameters: dict[str, float]) -> None:
        lr = parameters["lr"]

        def on_event(event: dict[str, Any]) -> distgd.Stop | None:
            if event["event"] == "eval":
                tune.report({"accuracy": event["metrics"]["eval/accuracy"]})
            return distgd.Stop("too slow") if lr == 0.001 and event["step"] >= 20 else None

        distgd.train(config, f"optimizer.lr={lr}", on_event=on_event)

    with ray_cluster():
        bundles = tune.PlacementGroupFactory(distgd.bundles(config))
        tuner = tune.Tuner(
            tune.with_resources(trial, bundles),
            param_space={"lr": tune.grid_search([0.001, 0.05, 0.1, 0.2])},
            tune_config=tune.TuneConfig(max_concurrent_trials=2),
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
        )
        errors = tuner.fit().errors
        if errors:
            raise errors[0]
        up = ray.is_initialized()
        left = [p for p in psutil.process_iter(["cmdline"]) if "".join(p.info["cmdline"] or []).startswith(ROLES)]
        total = ray.cluster_resources()["CPU"]
        until = time.monotonic() + GIVEN_BACK
        while (cpus := ray.available_resources().get("CPU", 0.0)) < total and time.monotonic() < until:
            time.sleep(0.2)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "distgd"]
    runs = client.search_runs([experiment.experiment_id])
    spans = [(run.info.start_time, run.info.end_time) for run in runs]
    at_once = max(sum(start <= begin < end for start, end in spans) for begin, _ in spans)
    statuses = [run.data.tags["result.status"] for run in runs]
    return Swept(len(runs), statuses, at_once, up, len(left), cpus, total)
