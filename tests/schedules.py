"""Random schedules of deaths and messages in virtual time, on all cores: the real trainer, files and sessions.

A seed decides everything about its schedule, so that a bad one is played again by its number.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from test_recovery import ALL, right, through_all
from test_resume import run

from distgd.result import Result
from distgd.transport import Loss

MODES = ("sync", "bounded", "async")
LONG = 4
"""One in so many has 24 steps, the others have 8."""
SHORT: dict[str, Any] = {"stop": {"steps": 8}, "eval": {"every": {"steps": 3}}}
BLIND = mock.patch("distgd.run.write_report", lambda run_dir: run_dir / "report" / "index.html")


def play(folder: Path, seeds: Iterable[int]) -> tuple[list[str], Counter[str]]:
    """Which of them are bad, and what happened in all."""
    bad, happened = [], Counter[str]()
    with BLIND:
        wholes = {short: run(folder / f"whole-{short}", **(SHORT if short else {})) for short in (False, True)}
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), _one_thread) as pool:
        for wrong, what in pool.map(partial(schedule, folder, wholes), seeds, chunksize=10):
            bad += wrong
            happened += what
    return bad, happened


def _one_thread() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # a driver that is killed is collected, and what was there before is not to be looked at


def schedule(folder: Path, wholes: dict[bool, Result], seed: int) -> tuple[list[str], Counter[str]]:
    """What is wrong with one, and what happened in it.

    Args:
        wholes: the results of a short run and of a long one to which nothing happened.
    """
    mode, path, chance, short = MODES[seed % 3], folder / str(seed), random.Random(seed), seed % LONG > 0
    rate, every = chance.choice([10.0, 30.0, 60.0]) * (3 if short else 1), chance.choice([2, 5, 30])
    loss = Loss(chance.choice([0.0, 0.1, 0.2]), chance.choice([0.0, 0.1, 0.2]), chance.choice([1e-4, 2e-3]))
    try:
        with BLIND:
            done, what = through_all(path, seed, mode, every, rate, ALL, loss, **(SHORT if short else {}))
    except Exception as error:  # noqa: BLE001 - whatever it is, the seed is named
        return [f"{mode} {seed}: {str(error)[:80]}"], Counter()
    wrong = [] if right(done, path, wholes[short], mode) else [f"{mode} {seed}"]
    shutil.rmtree(path)
    return wrong, what
