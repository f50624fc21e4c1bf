"""A run's weights as one file that plain torch loads, from whatever the run has left so far."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distgd import weights
from distgd.checkpoint import Checkpoint, Checkpoints
from distgd.config import Config, load
from distgd.errors import BadInput, RunFailed
from distgd.layout import state
from distgd.prepare import prepare
from distgd.result import reached
from distgd.runfolder import identity
from distgd.runstore import place


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
    config = load(run_dir / "config.yaml", [], os.environ)
    there, found = _newest(config, run_dir)
    _write(there, found, config, out)
    return f"of step {found.manifest.step}, by checkpoint {found.folder.name}"


def _newest(config: Config, run_dir: Path) -> tuple[Checkpoints, Checkpoint]:
    damaged: list[str] = []
    run = identity(run_dir)
    there = Checkpoints(place(config, run_dir))
    found = there.newest(run, damaged) if run is not None else None
    if found is None and damaged:
        raise RunFailed("; ".join(damaged))
    if found is None:
        do = "wait for the first one"
        raise BadInput.described("RUN", "a run with a checkpoint or with its last weights", str(run_dir), do)
    return there, found


def _write(there: Checkpoints, found: Checkpoint, config: Config, out: Path) -> None:
    """The task builds the model, whose buffers and frozen parameters have names and shapes that it alone knows."""
    plan = prepare(config)
    replica, slices = plan.replica, plan.layout.slices(1)
    state_there = there.restore(found.folder.name, slices[0], plan.layout).state
    replica.install(slices, {0: state_there.weights}, state_there.buffers)
    replica.buffer_layout.unpack(replica.buffers, replica.model)
    weights.save(state(replica.model), out)
