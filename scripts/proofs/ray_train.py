"""Ray Train's TorchTrainer on the task `synthetic`.

    python -m proofs.ray_train WORKERS PARAMETERS STEPS OUT

writes a JSON object to OUT: seconds of each step, and the moment at which the first update was done, in seconds since
the epoch. The model is wrapped as DDP at its best is, with the bucket size that torch has by default.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def loop(config: dict[str, Any]) -> None:
    """One worker."""
    import ray.train
    from ray.train.torch import prepare_model

    from proofs.models import contest

    torch.set_num_threads(1)
    task, batch = contest(config["model"])
    wrap = {"gradient_as_bucket_view": True, "static_graph": True}
    model = prepare_model(task.model(), parallel_strategy_kwargs=wrap)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    seconds, first = [], 0.0
    for _ in range(config["steps"]):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        task.loss(model, batch).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        first = first or time.time()
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["out"]).write_text(json.dumps({"step": seconds, "first": first}), encoding="utf-8")


def main(workers: int, parameters: int, steps: int, out: str) -> None:
    """Train in a cluster that Ray starts for it, as a script without settings does."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        asked = {"model": f"synthetic:{parameters}", "steps": steps, "out": str(Path(out).absolute())}
        TorchTrainer(
            loop,
            train_loop_config=asked,
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        ray.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
