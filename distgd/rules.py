"""What all shards of a run have in common, and everybody who talks to them."""

from __future__ import annotations

from dataclasses import dataclass

from distgd.layout import BUCKET


@dataclass(frozen=True)
class ShardRules:
    """What all shards of a run have in common.

    `incarnations` are the shards' own, by index. `slots` is K. `last` is the run's last version. `clip` limits the
    global norm of the mean gradient (`staged`, sync mode; elsewhere the worker clips, as its push is the whole update).
    `scale_lr` divides the learning rate by max(1, staleness). `bucket` is how many elements travel between machines in
    one message (sync mode, every slot required), `dtype` as what (`transport.dtype`). `record` says that the driver is
    told of every update (bounded, async). `norm_ratio` is how many times the running median a slot's norm may be (sync
    mode; elsewhere the limit comes with the lease).
    """

    timeline: int
    incarnations: tuple[int, ...]
    slots: int
    last: int
    staged: bool
    clip: float | None
    scale_lr: bool
    bucket: int = BUCKET
    dtype: str = "model"
    record: bool = False
    norm_ratio: float | None = None

    def lr_scale(self, factor: float, staleness: int) -> float:
        """What multiplies the learning rates of one push's update, from the schedule's factor (bounded, async)."""
        return factor / max(1, staleness) if self.scale_lr else factor
