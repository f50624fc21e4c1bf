"""The section `task`: what is trained, named in one of three ways."""

from __future__ import annotations

from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from distgd.config.strict import ImportPath, Section, Text, refuse

PIECES = ("model", "loss", "train_data", "eval_data", "metrics", "evaluate", "collate")
"""What a task can be given as, one by one; the first three are needed."""


class TaskSection(Section):
    """Model, loss and data. `task: digits` is short for `task: {name: digits}`.

    It is named in one of three ways: a built-in one by name, a class by path, or its pieces one by one.
    """

    model_config = ConfigDict(json_schema_extra={"short": "name"})

    name: Text | None = None
    """A built-in task."""
    path: ImportPath | None = None
    """A class of your own, as module:Class."""
    model: ImportPath | None = None
    """A torch.nn.Module, or a class or function that makes one, as module:name; with loss and train_data."""
    loss: ImportPath | None = None
    """A function (model, batch) -> the mean loss, or (mean, weight)."""
    train_data: ImportPath | None = None
    """The training data, or a function that returns it."""
    eval_data: ImportPath | None = None
    """Held-out data, or a function that returns it; without it nothing is evaluated."""
    metrics: ImportPath | None = None
    """A function (model, batch) -> {name: a tensor with a value a sample, or a mean over the batch}."""
    evaluate: ImportPath | None = None
    """A function (model, batches) -> {name: number} that sees the whole held-out set at once."""
    collate: ImportPath | None = None
    """A function that makes a batch of a list of a dataset's samples; null is torch's default_collate."""
    args: dict[str, Any] = Field(default={})
    """Keyword arguments of the task; where its pieces are named, by piece, such as {model: {hidden: 64}}."""

    @property
    def pieces(self) -> dict[str, str]:
        """The pieces that are named, by name."""
        return {key: value for key in PIECES if (value := getattr(self, key)) is not None}

    @model_validator(mode="after")
    def _one(self) -> Self:
        ways = {"name": self.name, "path": self.path, **self.pieces}
        found = {key: value for key, value in ways.items() if value}
        if sum((self.name is not None, self.path is not None, bool(self.pieces))) != 1:
            do = "set the others to null" if found else "set task.name=digits or task.path=module:Class"
            refuse("task", "exactly one of name, path, or the pieces model, loss, train_data", found, do)
        if self.pieces:
            missing = [key for key in PIECES[:3] if key not in self.pieces]
            if missing:
                refuse("task", "model, loss and train_data together", found, f"add {', '.join(missing)}")
            for key in self.args:
                if key not in self.pieces:
                    do = f"such as task.args={{{next(iter(self.pieces))}: {{...}}}}"
                    refuse(f"task.args.{key}", f"one of the pieces {', '.join(self.pieces)}", self.args[key], do)
        return self
