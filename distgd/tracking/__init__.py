"""Where a run's numbers go: a complete local file, and MLflow. Neither can stall or kill training.

A tracker gets `start`, then any number of events, then `finish`. An event is a mapping
`{"event": "step|eval|fault|end", "step", "version", "samples", "seconds", "metrics": {"train/loss": ...}}`;
`seconds` count from the run's start.

    Jsonl    every event, in `metrics.jsonl` of the run folder; lost on a kill: at most one second of events
    Mlflow   a thinned copy, written by one thread of its own; lost when MLflow cannot be reached: what `finish` names
    Many     both, or any others; one that fails is a warning and never stops another

Warnings go to the logger `distgd.tracking`. MLflow is imported by the writing thread alone: that takes seconds.
"""

from __future__ import annotations

from distgd.tracking.local import Event, Jsonl, Many, RunEnd, RunInfo, Tracker, per_worker
from distgd.tracking.mlflow_store import absolute, ui
from distgd.tracking.mlflow_writer import Mlflow

__all__ = ["Event", "Jsonl", "Many", "Mlflow", "RunEnd", "RunInfo", "Tracker", "absolute", "per_worker", "ui"]
