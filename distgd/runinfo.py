"""What trackers are told of a run when it starts: config, data, versions, where it comes from."""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from distgd.plan import Plan
from distgd.records import RunInfo


def describe(plan: Plan, run_dir: Path, parent: str | None, logged: Mapping[str, int] | None = None) -> RunInfo:
    """The run's name and place, its config as params, tags, its training data, and the MLflow run it is a part of."""
    schema = plan.source.schema()
    described = f"{plan.model_name} {len(plan.source)} {json.dumps(schema, default=str, sort_keys=True)}"
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    return RunInfo(
        run_id=run_dir.name,
        name=run_dir.name,
        run_dir=run_dir,
        params=plan.config.flat(),
        tags=_tags(plan),
        data={"name": plan.model_name, "samples": len(plan.source), "digest": digest, "schema": schema},
        steps=plan.planned_steps,
        uri=plan.config.tracking.uri,
        experiment=plan.config.tracking.experiment,
        parent=parent,
        logged=logged,
    )


def _tags(plan: Plan) -> dict[str, str]:
    packages = {f"version.{name}": version(name) for name in ("distgd", "torch", "ray", "numpy")}
    with suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        ).stdout.strip()
        packages |= {"mlflow.source.git.commit": described} if described else {}
    with suppress(KeyError, OSError):  # a user id without a name
        packages["mlflow.user"] = getpass.getuser()
    packages |= {"mlflow.source.name": "distgd", "host": platform.node(), "python": platform.python_version()}
    return {**packages, "bits": plan.bits, **({"faults": "injected"} if plan.faults else {})}
