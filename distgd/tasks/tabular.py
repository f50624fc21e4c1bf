"""`tabular`: rows of a CSV file, numbers and categories, to a label or a number.

What the file is and what becomes of its columns is said in the config's section `data` (docs/tabular.md). Everything
that is learnt from the data before training (statistics, vocabularies, labels) comes from the rows that are trained on.

Without `data.path` the file is scikit-learn's copy of UCI's "Breast Cancer Wisconsin (Diagnostic)" (Street, Wolberg and
Mangasarian, 1993): 569 rows of 30 numbers, and a diagnosis that is 0 (malignant) or 1 (benign).
"""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.util import find_spec
from math import pow
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from distgd.config import Csv, Data, Feature, TargetColumn
from distgd.errors import BadInput
from distgd.features import FIRST_SEEN, Features
from distgd.table import Column, CsvFile, Table
from distgd.tasks.imports import nearest
from distgd.tasks.targets import Target, fit_target

HELD_OUT = 0.2
"""The share of the rows that is held out where nothing is said."""

Rows = tuple[Tensor, Tensor]
"""Inputs of shape (samples, inputs): numbers first, then indices. Targets of shape (samples,)."""


@plain_dataclass(frozen=True)
class Prepared:
    """What was learnt from the training rows, and both sets as tensors."""

    features: Features
    target: Target
    train: Rows
    held_out: Rows


@dataclass(frozen=True)
class Tabular:
    """Predict one column from others by a network of fully connected layers.

    The loss is the cross-entropy of labels, in nats, with the metric `accuracy`; or the squared error of standardized
    numbers, with the metrics `mae` and `mse` in the column's own unit.

    Args:
        hidden: widths of the hidden layers.
        dropout: chance that a hidden activation is zeroed in training.
        embedding: numbers that stand for a category; None is min(50, round(1.6 n ** 0.56)) for n indices.
        dtype: of weights and inputs.
        data: the config's section.
    """

    hidden: tuple[PositiveInt, ...] = (64, 32)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    embedding: PositiveInt | None = None
    dtype: Literal["float32", "float64"] = "float32"
    data: Data = Data()

    def model(self) -> Network:
        """Logits of shape (samples, labels), or standardized numbers of shape (samples, 1)."""
        features, target = self._prepared.features, self._prepared.target
        widths = [self.embedding or _width(size) for size in features.sizes]
        network = Network(features.numbers, features.sizes, widths, self.hidden, target.outputs, self.dropout)
        return network.to(getattr(torch, self.dtype))

    def loss(self, model: nn.Module, batch: Rows) -> Tensor:
        """The mean over the rows: cross-entropy, or squared error in standard deviations."""
        inputs, targets = batch
        return self._prepared.target.loss(model(inputs), targets)

    def metrics(self, model: nn.Module, batch: Rows) -> dict[str, Tensor]:
        """`accuracy`, or `mae` and `mse`; a number a row."""
        inputs, targets = batch
        return self._prepared.target.metrics(model(inputs), targets)

    def train_data(self) -> Rows:
        """Rows to train on."""
        return self._prepared.train

    def eval_data(self) -> Rows:
        """Rows of the held-out file, or the held-out share of the one file."""
        return self._prepared.held_out

    def describe(self) -> dict[str, Any]:
        """What was learnt from the training rows, as plain data: with it a row becomes inputs anywhere."""
        prepared = self._prepared
        return {"target": prepared.target.describe(), "features": prepared.features.describe()}

    @cached_property
    def _prepared(self) -> Prepared:
        data = _sample(self.data) if self.data.path is None else self.data
        train, held_out = _tables(data)
        if data.target.column is None:
            expected = f"the column to predict ({train.names})"
            raise BadInput.described("data.target.column", expected, "null", "set data.target=NAME")
        target = fit_target(train.column(data.target.column), data.target)
        features = Features.fit(_chosen(train, data, data.target.column))
        dtype = getattr(torch, self.dtype)

        def rows(table: Table) -> Rows:
            columns = {name: table.column(name) for name in features.fitted}
            wanted = target.encode(table.column(target.column))
            return torch.tensor(features.encode(columns), dtype=dtype), wanted.to(target.dtype or dtype)

        return Prepared(features, target, rows(train), rows(held_out))


class Network(nn.Module):
    """An embedding for each category, beside the numbers, and ReLU layers on all of them.

    Args:
        numbers: inputs that are numbers; they come first.
        sizes: for each input after them, how many indices there are.
        widths: of their embeddings.
        hidden: widths of the hidden layers.
    """

    def __init__(
        self,
        numbers: int,
        sizes: list[int],
        widths: list[int],
        hidden: tuple[int, ...],
        outputs: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self.embeddings = nn.ModuleList(_embedding(*shape) for shape in zip(sizes, widths, strict=True))
        self.layers = nn.Sequential()
        width = numbers + sum(widths)
        for wider in hidden:
            self.layers.extend([nn.Linear(width, wider), nn.ReLU(), nn.Dropout(dropout)])
            width = wider
        self.layers.append(nn.Linear(width, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """(samples, inputs) to (samples, outputs); indices are whole numbers in the inputs' own type.

        One tensor for both, so that MLflow can store the model with an example of its input.
        """
        indices = inputs[:, self.numbers :].long()
        embedded = [table(indices[:, place]) for place, table in enumerate(self.embeddings)]
        outputs: Tensor = self.layers(torch.cat([inputs[:, : self.numbers], *embedded], dim=1))
        return outputs


def _tables(data: Data) -> tuple[Table, Table]:
    """Rows to train on and rows held out; a share keeps the order of the file."""
    held_out, skip_rows = data.held_out, data.csv.skip_rows
    table = CsvFile(Path(data.path or ""), data.csv, "data.path", skip_rows).table()
    if held_out.path is not None:
        skip_rows = skip_rows if held_out.skip_rows is None else held_out.skip_rows
        return table, CsvFile(Path(held_out.path), data.csv, "data.held_out.path", skip_rows).table()
    fraction = HELD_OUT if held_out.fraction is None else held_out.fraction
    count = max(1, round(fraction * len(table)))
    if count >= len(table):
        do = "give more rows, or a smaller data.held_out.fraction"
        raise BadInput.at(data.path or "", f"more rows than the {count} that are held out", len(table), do)
    order = np.random.RandomState(held_out.seed).permutation(len(table))  # frozen by NEP 19, unlike default_rng
    return table.take(np.sort(order[count:])), table.take(np.sort(order[:count]))


def _chosen(table: Table, data: Data, target: str) -> list[tuple[Column, Feature]]:
    """The columns that become inputs, in the order of the file, and what is said about each.

    Raises:
        BadInput: what is named is no column, or nothing is left.
    """
    for name in data.features or ():
        if name == target:
            raise BadInput.at(f"data.features.{name}", "a column that is not the target", name, "remove it")
        if not any(fnmatchcase(column, name) or column == name for column in table.columns):
            expected = f"a column of {table.file.path} or a pattern that matches one ({table.names})"
            raise BadInput.at(f"data.features.{name}", expected, name, nearest(name, table.columns))
    said = {name: data.feature(name) for name in table.columns if name != target}
    chosen = [(table.column(name), each) for name, each in said.items() if each and each.kind != "drop"]
    if not chosen:
        do = "name one in data.features, or remove that key for all of them"
        raise BadInput.at("data.features", "at least one column beside the target", list(said), do)
    return chosen


def _sample(data: Data) -> Data:
    """The section for scikit-learn's file, which begins with a line of counts and has no names."""
    for key, given in (("csv", data.csv != Csv()), ("held_out.path", data.held_out.path is not None)):
        if given:
            raise BadInput.described(f"data.{key}", "nothing without data.path", "a value", "set data.path too")
    measures = (
        *("radius", "texture", "perimeter", "area", "smoothness"),
        *("compactness", "concavity", "concave points", "symmetry", "fractal dimension"),
    )
    columns = [f"{which} {measure}" for which in ("mean", "error of", "worst") for measure in measures]
    package = find_spec("sklearn")  # importing it takes a second
    assert package is not None and package.origin is not None, "scikit-learn is a dependency"
    path = Path(package.origin).parent / "datasets" / "data" / "breast_cancer.csv"
    target = data.target if data.target.column else TargetColumn(column="diagnosis", kind="label")
    csv = Csv(columns=(*columns, "diagnosis"), skip_rows=1)
    return data.model_copy(update={"path": str(path), "csv": csv, "target": target})


def _embedding(size: int, width: int) -> nn.Embedding:
    """Small random numbers; zeros for missing and unseen, which say nothing until training has met them."""
    embedding = nn.Embedding(size, width)
    nn.init.normal_(embedding.weight, std=0.1)
    with torch.no_grad():
        embedding.weight[:FIRST_SEEN] = 0
    return embedding


def _width(size: int) -> int:
    """A rule of thumb for the width of an embedding, `emb_sz_rule` of fastai."""
    return min(50, round(1.6 * pow(size, 0.56)))
