"""Run as `python load_back.py STORE RUN WEIGHTS`: print how far two models are apart, with imports of distgd refused.

One is loaded from MLflow, the other is the digits network built by hand with the weights of `model.safetensors`. What
is printed is the largest difference of their outputs on 17 random images.
"""

from __future__ import annotations

import sys


def difference(store: str, run: str, weights: str) -> float:
    """The largest difference of the two models' outputs."""
    import mlflow.pytorch
    import torch
    from safetensors.torch import load_file
    from torch import nn

    mlflow.set_tracking_uri(store)
    logged = mlflow.pytorch.load_model(f"runs:/{run}/model")
    plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)).eval()
    plain.load_state_dict(load_file(weights))
    images = torch.rand(17, 64, generator=torch.Generator().manual_seed(0))
    return float((logged(images) - plain(images)).abs().max())


if __name__ == "__main__":
    sys.modules["distgd"] = None  # type: ignore[assignment]
    print(difference(*sys.argv[1:]))
