"""A run's weights as one file that plain torch loads, from whatever the run has left so far."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distgd import weights
from distgd.checkpoint import Checkpoint, newest, restore
from distgd.config import load
from distgd.errors import BadInput, RunFailed
from distgd.layout import state
from distgd.prepare import prepare
from distgd.result import reached
from distgd.runfolder import identity


def export(run_dir: Path, out: Path, *, best: bool = False) -> str:
    """Write the weights of a run to `out`, as safetensors under the model's own names.

    Args:
        best: those of the best evaluation; else the last ones: of a run that has ended, or of the newest checkpoint.

    Returns:
        Which they are, in words.

    Raises:
        BadInput: there are none, or the file is there already.
        RunFailed: every checkpoint is damaged.
    """
    if out.exists():
        raise BadInput.described("OUT", "a file that is not there yet", str(out), "choose another, or remove it")
    kept = run_dir / ("best.safetensors" if best else "model.safetensors")
    if best and not kept.exists():
        do = "set eval.best in the run's config, or leave --best out"
        raise BadInput.described("--best", f"{kept.name} in the run folder", "none", do)
    if best or (kept.exists() and reached(run_dir) is not None):
        shutil.copyfile(kept, out)
        return "the best evaluation's" if best else "the last ones"
    found = _newest(run_dir)
    _write(found, run_dir, out)
    return f"of step {found.manifest.step}, by checkpoint {found.folder.name}"


def _newest(run_dir: Path) -> Checkpoint:
    damaged: list[str] = []
    run = identity(run_dir)
    found = newest(run_dir / "checkpoints", run, damaged) if run is not None else None
    if found is None and damaged:
        raise RunFailed("; ".join(damaged))
    if found is None:
        do = "wait for the first one"
        raise BadInput.described("RUN", "a run with a checkpoint or with its last weights", str(run_dir), do)
    return found


def _write(found: Checkpoint, run_dir: Path, out: Path) -> None:
    """The task builds the model, whose buffers and frozen parameters have names and shapes that it alone knows."""
    plan = prepare(load(run_dir / "config.yaml", [], os.environ))
    replica, slices = plan.replica, plan.layout.slices(1)
    there = restore(found.folder, slices[0], plan.layout)
    replica.install(slices, {0: there.state.weights}, there.state.buffers)
    replica.buffer_layout.unpack(replica.buffers, replica.model)
    weights.save(state(replica.model), out)
