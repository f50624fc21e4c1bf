"""What every test stands on: no setting of the person's own shell, no GPU test without a GPU, no timed hypothesis."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A config that is silent takes these from the environment, and a test must not.
FROM_THE_SHELL = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")

settings.register_profile("distgd", deadline=None, print_blob=True)
settings.load_profile("distgd")


def pytest_configure() -> None:
    for name in FROM_THE_SHELL:
        os.environ.pop(name, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _cuda():
        pytest.skip("needs a CUDA GPU")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
