"""A run's config: frozen sections, loaded from YAML, overridden by `a.b=c`, dumped, and described.

    sections   what each key means
    task, data, stop
               the larger sections, in files of their own
    strict     what every section is made of
    text       YAML in and out
    schema     the sections in words
    loading    files, overrides, environment; errors with the key, what is allowed, what was found

Here is no torch and no Ray, and nothing is looked up outside the file and the arguments: paths are resolved, and the
task's and the optimizer's own arguments are checked, by who uses them.

>>> config = load({"task": "digits", "stop": {"epochs": 1}}, ["optimizer.lr=0.1"])
>>> config.optimizer.lr, config.cluster.workers.max
(0.1, 2)
"""

from __future__ import annotations

from distgd.config.data import Csv, Data, Feature, HeldOut, TargetColumn
from distgd.config.loading import load
from distgd.config.schema import Row, docs_markdown, json_schema, schema_rows
from distgd.config.sections import (
    Batch,
    Clip,
    Cluster,
    Config,
    Consistency,
    Eval,
    Every,
    Group,
    Optimizer,
    Run,
    Schedule,
    Tracking,
    Workers,
)
from distgd.config.stop import Best, Patience, Stop, Target, better
from distgd.config.task import PIECES, TaskSection

__all__ = [
    "PIECES",
    "Batch",
    "Best",
    "Clip",
    "Cluster",
    "Config",
    "Consistency",
    "Csv",
    "Data",
    "Eval",
    "Every",
    "Feature",
    "Group",
    "HeldOut",
    "Optimizer",
    "Patience",
    "Row",
    "Run",
    "Schedule",
    "Stop",
    "Target",
    "TargetColumn",
    "TaskSection",
    "Tracking",
    "Workers",
    "better",
    "docs_markdown",
    "json_schema",
    "load",
    "schema_rows",
]
