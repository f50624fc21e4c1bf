"""distgd: gradient descent on many machines, with a parameter server made of Ray actors.

Shards hold the weights and the optimizer's state; workers compute the gradients of slots, fixed pieces of a global
batch, and push them. In sync mode the weights are a pure function of (config, seed, data), whatever the number of
workers and servers. A tour, from the story down to the ground:

    cli, trainer               a run from start to finish
    cluster, inprocess         where the actors live: on Ray, or on one thread in virtual time
    driver, worker, server     who does what in a run: grants slots, computes gradients, steps the weights
    shard, policy, ledger      what a push does to the weights, and what was applied
    layout, reduce, optim      the flat vector, the tree that adds slots, the optimizers
    config, events, errors     the words

>>> import distgd
>>> result = distgd.train("configs/quickstart.yaml", "cluster.workers=4")  # doctest: +SKIP
>>> result.metrics["eval/accuracy"]  # doctest: +SKIP
0.97

A public name is imported when it is first used, so `import distgd` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distgd.config import Config
    from distgd.errors import BadInput, Diverged, RunFailed
    from distgd.resources import bundles
    from distgd.result import Result
    from distgd.stopping import Stop
    from distgd.trainer import train

__version__ = "0.1.0"

__all__ = ["BadInput", "Config", "Diverged", "Result", "RunFailed", "Stop", "__version__", "bundles", "train"]

_HOMES = {
    "BadInput": "distgd.errors",
    "Config": "distgd.config",
    "Diverged": "distgd.errors",
    "Result": "distgd.result",
    "RunFailed": "distgd.errors",
    "Stop": "distgd.stopping",
    "bundles": "distgd.resources",
    "train": "distgd.trainer",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'distgd' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
