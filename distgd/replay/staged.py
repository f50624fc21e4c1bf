"""A sync run again, in one process: the ledger says which slots each step had, everything else follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distgd.audit import Line
from distgd.errors import BadInput
from distgd.events import SlotStats
from distgd.layout import block_squares, squared_norm
from distgd.optim import clip_scale
from distgd.plan import Plan
from distgd.replay.leased import Differs, Part
from distgd.staging import Mean, Staging
from distgd.worker import SlotWork, Worker

COMPLETE = "replay a run whose ledger.jsonl is as the run left it"


def dropped(lines: Iterable[Line], plan: Plan, steps: int) -> dict[int, set[int]]:
    """The slots that each step was decided without (quorum); all of them where it was skipped.

    Raises:
        BadInput: the ledger does not say of every slot of the first `steps` what became of it.
    """
    missing: dict[int, set[int]] = {}  # of steps with lines: slots that are not applied
    out: dict[int, set[int]] = {}
    try:
        for line in lines:
            step = int(line.get("step", 0))
            match line["state"]:
                case "applied" | "dropped" | "skipped" as state:
                    left = missing.setdefault(step, set(range(plan.order.filled(step))))
                    left.discard(int(line["slot"]))
                    if state != "applied":
                        out.setdefault(step, set()).add(int(line["slot"]))
                case "rollback":
                    missing = {t: left for t, left in missing.items() if t < step}
                    out = {t: slots for t, slots in out.items() if t < step}
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput.described("ledger", "step and slot in every line", f"none: {error}", COMPLETE) from error
    for step in range(steps):
        if step not in missing or missing[step]:
            found = "no word of it" if step not in missing else f"nothing of slots {sorted(missing[step])}"
            raise BadInput.described("ledger", f"every slot of step {step}", found, COMPLETE)
    return out


def replay_steps(
    plan: Plan, worker: Worker, part: Part, without: Mapping[int, set[int]], losses: Mapping[int, float], steps: int
) -> int:
    """Make steps again, all in one shard; the bits are the same for any number of them.

    Args:
        without: slots that a step was decided without.
        losses: what is known of the steps' mean losses.

    Returns:
        How many slots were computed.

    Raises:
        Differs: a step's loss is another one.
    """
    slots = plan.order.slots
    outs = [plan.layout.zeros() for _ in range(slots)]
    staging = Staging(slots, part.cut.size, max(1, part.cut.size), eager=False)
    computed = 0
    for step in range(part.version, steps):
        taken = [k for k in range(slots) if k not in without.get(step, ())]
        if not any(k < plan.order.filled(step) for k in taken):  # it was skipped
            part.version += 1
            continue
        worker.replica.install((part.cut,), {0: part.weights.numpy()}, part.buffers)
        torch.set_num_threads(worker.spec.threads)
        buffers, stats = None, []
        for k in taken:
            done = worker.perform(
                SlotWork(worker.spec.rules.timeline, worker.work.token, step, k, outs[k]), lambda effect: None
            ).gradient
            computed += done.stats.samples > 0
            stats.append(done.stats)
            staging.put((k, k + 1), done.stats.weight, outs[k] if done.stats.weight else None, owned=False)
            buffers = done.buffers if k == 0 and done.stats.weight else buffers
        torch.set_num_threads(1)
        _check(step, stats, losses.get(step))
        part.step(_mean(staging, taken, worker.spec.rules.clip, part.weights), plan.schedule.factor(step))
        staging.clear()
        part.buffers = buffers if buffers is not None else part.buffers
        part.version += 1
    return computed


def _check(step: int, stats: Sequence[SlotStats], recorded: float | None) -> None:
    weight = sum(s.weight for s in stats)
    found = sum(s.loss * s.weight for s in stats) / weight if weight else None
    if recorded is not None and found is not None and found != recorded:
        raise Differs(f"step {step}: train/loss {recorded!r} logged, {found!r} found")


def _mean(staging: Staging, slots: list[int], clip: float | None, like: Any) -> Mean:
    """The step's mean gradient, clipped by its global norm."""
    mean = staging.total(slots)
    if clip is None:
        return mean
    whole = mean.block(0, like.numel(), torch.empty_like(like))
    square = squared_norm(block_squares(whole))
    assert np.isfinite(square)
    return Mean.of(whole, 1.0, clip_scale(square, clip))
