"""Where a run goes on: which checkpoint, and whether the config still is that run's.

`stop`, `cluster`, `checkpoint`, `eval`, `tracking`, `faults`, and where the run lies, may change; anything else would
make it another run. What the config leaves open and the run has decided at its first start stays so: `batch.slots`, and
how long the schedule is.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distgd.assignment import Assignment
from distgd.checkpoint import Checkpoint, Checkpoints, Damaged, Manifest, ShardEntry, is_uri, open_checkpoint
from distgd.config import Config
from distgd.effects import Resumed
from distgd.errors import BadInput
from distgd.layout import Layout
from distgd.plan import Plan
from distgd.policy import Applied
from distgd.promise import Promise
from distgd.records import strict
from distgd.result import Result, reached
from distgd.runfolder import Start, identity
from distgd.runstore import place, run_store
from distgd.saving import Whole

MAY_CHANGE = ("stop", "cluster", "checkpoint", "eval", "tracking", "faults", "run.name", "run.storage", "run.bits")


@dataclass(frozen=True)
class Found:
    """A run that can go on: its folder, the checkpoint, and what was passed over because it is damaged.

    `checkpoint` is None where there is no whole one: the run begins anew, in the same folder.
    """

    run_dir: Path
    checkpoint: Checkpoint | None
    damaged: tuple[str, ...] = ()


def find(config: Config, resume: str) -> Found | None:
    """The run that `--resume` means; None where there is none yet, and one is to begin.

    Args:
        config: with absolute paths.
        resume: `auto`, or the folder of a checkpoint, or its URI where `checkpoint.storage` is an object store.

    Raises:
        BadInput: `auto` without `run.name`, or a folder that is no whole checkpoint of its run.
    """
    if resume != "auto":
        return _in_store(config, resume) if is_uri(resume) else _at(Path(resume))
    if config.run.name is None:
        do = "set run.name=NAME, so that every start finds the same folder"
        raise BadInput.described("run.name", "a name with --resume auto", "null", do)
    run_dir = Path(config.run.storage) / config.run.name
    if (store := run_store(config, run_dir)) is not None:
        store.bring()
    run = identity(run_dir)
    if run is None:
        return None
    damaged: list[str] = []
    return Found(run_dir, Checkpoints(place(config, run_dir)).newest(run, damaged), tuple(damaged))


def _in_store(config: Config, uri: str) -> Found:
    root, name = (config.checkpoint.storage or "").rstrip("/"), uri.rstrip("/").split("/")[-1]
    run_dir = Path(config.run.storage) / (uri.rstrip("/").split("/")[-3:][0])
    store = run_store(config, run_dir)
    if store is None or uri.rstrip("/") != f"{root}/{run_dir.name}/checkpoints/{name}":
        do = "give auto, or set checkpoint.storage to what is before the run's name"
        raise BadInput.described("--resume", "auto, or a checkpoint under checkpoint.storage", uri, do)
    store.bring()
    run = identity(run_dir)
    try:
        if run is None:
            raise Damaged(f"no run.json beside {uri}")
        return Found(run_dir, Checkpoints(place(config, run_dir)).open(name, run))
    except Damaged as error:
        do = "give auto for the newest whole one"
        raise BadInput.described("--resume", "a whole checkpoint", f"a damaged one: {error}", do) from error


def _at(folder: Path) -> Found:
    run_dir = folder.absolute().parent.parent
    run = identity(run_dir)
    if run is None:
        do = "give auto, or a folder under RUN/checkpoints"
        raise BadInput.described("--resume", "auto, or a checkpoint in its run folder", str(folder), do)
    try:
        return Found(run_dir, open_checkpoint(folder.absolute(), run))
    except Damaged as error:
        do = "give auto for the newest whole one"
        raise BadInput.described("--resume", "a whole checkpoint", f"a damaged one: {error}", do) from error


def in_place(config: Config, found: Found) -> Config:
    """The config of the same run: its folder, and what was left open as it was decided at the first start.

    Raises:
        BadInput: a key differs that may not; the message names it.
    """
    run = config.run.model_copy(update={"name": found.run_dir.name, "storage": str(found.run_dir.parent)})
    config = config.model_copy(update={"run": run})
    if found.checkpoint is None:
        return config
    manifest = found.checkpoint.manifest
    if config.batch.slots is None:
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"slots": manifest.facts["slots"]})})
    if config.schedule.steps is None and manifest.facts["schedule_steps"]:
        schedule = config.schedule.model_copy(update={"steps": manifest.facts["schedule_steps"]})
        config = config.model_copy(update={"schedule": schedule})
    _compare(config.model_dump(mode="json"), manifest.config)
    return config


def _compare(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    for key, (new, old) in sorted(_differences("", now, then).items()):
        if not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
            if key in ("batch.slots", "schedule.steps") and old is None:
                continue
            do = "set it back, or start another run with run.name="
            raise BadInput.at(key, f"{old!r}, as the run that goes on has it", new, do)


def _differences(prefix: str, now: Any, then: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in {*now, *then}:
            found |= _differences(f"{prefix}.{key}" if prefix else key, now.get(key), then.get(key))
        return found
    return {} if json.dumps(now) == json.dumps(then) else {prefix: (now, then)}


def resumed(found: Found | None, plan: Plan) -> Resumed | None:
    """What the driver goes on from, once the plan of the config is made.

    Raises:
        BadInput: model or data are not those of the run, or its shards cannot be cut as `cluster.servers` says.
    """
    if found is None or found.checkpoint is None:
        return None
    manifest = found.checkpoint.manifest
    for what, now, then in (
        ("task.model", _described(plan.layout), manifest.layout),
        ("data", facts(plan), manifest.facts),
    ):
        for key, (new, old) in sorted(_differences("", strict(now), then).items()):
            do = "set it back, or start another run with run.name="
            raise BadInput.at(what, f"{key} {old!r}, as the run that goes on has it", new, do)
    progress = manifest.progress
    if manifest.config["stop"] != plan.config.model_dump(mode="json")["stop"]:
        progress = {**progress, "ended": None}
    applied = _applied(manifest, plan)
    assignment = plan.assignment()
    version = manifest.step if applied is None else assignment.versions(applied.steps) + len(applied.beyond)
    return Resumed(manifest.step, version, progress, applied)


def finished(found: Found, plan: Plan) -> Result | None:
    """The result of a run that has ended and is not to go further, None of any other."""
    if found.checkpoint is None:
        return None
    manifest = found.checkpoint.manifest
    same = manifest.config["stop"] == plan.config.model_dump(mode="json")["stop"]
    ended = manifest.progress["ended"] is not None and same
    if not ended and manifest.step < plan.steps:
        return None
    return reached(found.run_dir)


def _applied(manifest: Manifest, plan: Plan) -> Applied | None:
    if plan.staged:
        return None
    filled = plan.order.filled
    cuts = [(part.start, part.stop) for part in plan.layout.slices(plan.config.cluster.servers)]
    written = [shard.applied for shard in manifest.shards]
    if len(set(written)) > 1 and cuts != [(shard.start, shard.stop) for shard in manifest.shards]:
        expected = f"{len(cuts)} servers only where all shards had applied the same slots at the checkpoint"
        do = f"set cluster.servers={len(manifest.shards)}; a run that is stopped by Ctrl-C can go on with any number"
        raise BadInput.described("cluster.servers", expected, "others", do)
    return Applied.in_all([Applied.of(json.loads(each), filled) for each in written], filled)


def facts(plan: Plan) -> dict[str, Any]:
    """What a run is, beyond its config: the data's size and how it is cut."""
    order = plan.order
    return {
        "samples": order.samples,
        "batch": order.batch,
        "slots": order.slots,
        "seed": order.seed,
        "buffers": plan.replica.buffer_layout.size,
        "schedule_steps": plan.schedule.steps,
    }


@cache
def _version(name: str) -> str:
    """Of an installed package; to look is to read and parse a file, and checkpoints are many."""
    return version(name)


def manifest_of(whole: Whole, plan: Plan, start: Start, assignment: Assignment, promise: Promise) -> Manifest:
    """The manifest of files that are all there."""
    slices = plan.layout.slices(len(whole.parts))
    shards = tuple(
        ShardEntry(p.file, p.size, p.sha256, cut.start, cut.stop, p.version, whole.parts[0].buffers_version, p.applied)
        for p, cut in zip(whole.parts, slices, strict=True)
    )
    return Manifest(
        run=start.run,
        timeline=start.timeline,
        step=assignment.steps_of(min(p.version for p in whole.parts)),
        shards=shards,
        layout=strict(_described(plan.layout)),
        facts=strict(facts(plan)),
        progress=strict(whole.progress),
        config=plan.config.model_dump(mode="json"),
        software={name: _version(name) for name in ("distgd", "torch", "numpy", "ray")}
        | {"python": platform.python_version()}
        | promise.record(),
        bits=promise.bits,
    )


def _described(layout: Layout) -> dict[str, Any]:
    return asdict(layout)
