"""`digits`: 1,797 real handwritten digits of 8 x 8 pixels, and a small network that reads them.

The images are scikit-learn's copy of the test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, 1998). They come with scikit-learn, so nothing is fetched.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

TRAIN = 1437
"""Samples to train on; the other 360 are held out. The split is fixed, whatever the run's seed."""

Images = tuple[Tensor, Tensor]
"""Pixels in [0, 1] of shape (samples, 64), and digits of shape (samples,) int64."""


@dataclass(frozen=True)
class Digits:
    """Classify digits by a network 64 - hidden - 10 with cross-entropy; the metric is `accuracy`.

    Args:
        hidden: width of the hidden layer.
        dropout: chance that a hidden activation is zeroed in training.
        batchnorm: normalize the hidden layer; a slot then needs two samples at least.
        dtype: of weights and pixels.
    """

    hidden: PositiveInt = 128
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    batchnorm: bool = False
    dtype: Literal["float32", "float64"] = "float32"

    def model(self) -> nn.Module:
        """Logits of shape (samples, 10) from pixels of shape (samples, 64)."""
        normalize = [nn.BatchNorm1d(self.hidden)] if self.batchnorm else []
        layers = (
            nn.Linear(64, self.hidden),
            *normalize,
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(self.hidden, 10),
        )
        return nn.Sequential(*layers).to(getattr(torch, self.dtype))

    def loss(self, model: nn.Module, batch: Images) -> Tensor:
        """Mean cross-entropy, nats a sample."""
        pixels, digits = batch
        return F.cross_entropy(model(pixels), digits)

    def train_data(self) -> Images:
        """The first 1,437 images of a fixed permutation."""
        return self._images[0][:TRAIN], self._images[1][:TRAIN]

    def eval_data(self) -> Images:
        """The other 360 images."""
        return self._images[0][TRAIN:], self._images[1][TRAIN:]

    def metrics(self, model: nn.Module, batch: Images) -> dict[str, Tensor]:
        """`accuracy`: 1 or 0 a sample."""
        pixels, digits = batch
        return {"accuracy": (model(pixels).argmax(1) == digits).float()}

    @cached_property
    def _images(self) -> Images:
        from sklearn.datasets import load_digits  # here because it takes a second, and other tasks need none of it

        pixels, digits = load_digits(return_X_y=True)
        order = np.random.RandomState(0).permutation(len(digits))  # frozen by NEP 19, unlike default_rng
        dtype = getattr(torch, self.dtype)
        return torch.tensor(pixels[order] / 16, dtype=dtype), torch.tensor(digits[order], dtype=torch.int64)
