"""What one update does to a shard's weights: optimizer, learning-rate schedule, gradient clipping.

The optimizers are `torch.optim`'s own, by name, with torch's arguments and defaults, cut over shards without a changed
bit. A schedule is a pure function of the step; it multiplies the learning rate of every parameter group. Nothing here
knows the network, the servers or the clock.
"""

from __future__ import annotations

from distgd.optim.optimizers import OptimizerSpec, PieceOptimizer, State, StateParts, check_groups, resolve_optimizer
from distgd.optim.schedules import Schedule, clip_scale, resolve_schedule

__all__ = [
    "OptimizerSpec",
    "PieceOptimizer",
    "Schedule",
    "State",
    "StateParts",
    "check_groups",
    "clip_scale",
    "resolve_optimizer",
    "resolve_schedule",
]
