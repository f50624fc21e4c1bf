"""What is trained: a model, its loss and its data, as one object, and how a config names it.

A task is any class with the methods of `Task`; it need not import this package. Everything that it returns must be the
same in every process: each worker makes its own copy, and only the driver's initial weights are the run's.

Optional methods:
    `eval_data()`: held-out data, in a form that `train_data` may return. Without it there is no evaluation.
    `metrics(model, batch)`: name -> a tensor with one value a sample, or a mean over the batch's samples.
    `evaluate(model, batches)`: name -> a number, from an iterable over the batches of the whole held-out set, on the
        model's device, in order; for what is no mean over samples, such as an AUC. It runs beside the loss's own pass.
    `collate(samples)`: a batch, from a list of a dataset's samples; torch's `default_collate` where there is none.

>>> class Line:
...     def model(self): return torch.nn.Linear(1, 1)
...     def loss(self, model, batch): return (model(batch[0]) - batch[1]).square().mean()
...     def train_data(self): return torch.rand(64, 1), torch.ones(64, 1)

The same can be given piece by piece (`distgd.tasks.pieces`), in Python or by `task.model`, `task.loss`, ... in a
config. Built-in tasks are classes; `BUILT_IN` has their import paths.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from distgd.config import PIECES, Data, TaskSection
from distgd.errors import BadInput
from distgd.layout import check_memory
from distgd.tasks.imports import Parameters, called, imported, nearest, see_current_folder, signature
from distgd.tasks.pieces import Pieces, named, refuse_unread

__all__ = ["BUILT_IN", "Pieces", "Task", "build", "checked", "load", "tracker"]

BUILT_IN = {
    "char-lm": "distgd.tasks.charlm:CharLM",
    "counting": "distgd.tasks.counting:Counting",
    "digits": "distgd.tasks.digits:Digits",
    "quadratic": "distgd.tasks.quadratic:Quadratic",
    "synthetic": "distgd.tasks.synthetic:Synthetic",
    "tabular": "distgd.tasks.tabular:Tabular",
}


class Task(Protocol):
    """A model, its loss and its training data."""

    def model(self) -> nn.Module:
        """A new model. torch is seeded before the call, so that chance in it is the run's seed's."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor | tuple[Tensor, float | Tensor]:
        """The mean over the batch's samples, a scalar; or (mean, weight) where it is over other things, say tokens."""

    def train_data(self) -> Any:
        """What `distgd.sources.open_source` takes: a tensor, a tuple or dict of tensors, or a source."""


def load(section: TaskSection, data: Data) -> Task:
    """Make the task that a config names.

    A constructor that takes `data` gets that section, one that takes `data_path` gets `data.path`. The current
    folder is put on `sys.path` for a `task.path`.

    Raises:
        BadInput: an unknown name, a module that does not import, a missing class, arguments that its constructor does
            not take, missing methods, or a `data.path` that the task cannot use. Nothing is kept.

    >>> load(TaskSection(name="counting", args={"samples": 4}), Data()).train_data()
    tensor([0, 1, 2, 3])
    """
    see_current_folder()
    if section.pieces:
        return cast(Task, named(section, data))
    made = _made(section.path or _built_in(section.name or ""), dict(section.args), data)
    return checked("task.path", section.path, made)


def checked(key: str, found: object, made: object) -> Task:
    """`made` as a task.

    Raises:
        BadInput: a method is missing, or something that is no method has the name of one; the message is about `key`
            and shows `found`.
    """
    methods = {name: getattr(made, name, None) for name in PIECES}
    missing = [name for name in PIECES[:3] if methods[name] is None]
    if missing:
        expected = "a class with the methods model(), loss(model, batch), train_data()"
        raise BadInput.at(key, expected, found, f"add {', '.join(missing)}")
    for name, method in methods.items():
        if method is not None and not callable(method):
            do = "return it from a method of that name"
            raise BadInput.described(f"task.{name}", "a method", f"an attribute of type {type(method).__name__}", do)
    return cast(Task, made)


def tracker(path: str) -> Any:
    """Make a tracker that `tracking.also` names: a class with the methods `start`, `log` and `finish`.

    Raises:
        BadInput: it does not import, is not made without arguments, or has not these methods.
    """
    see_current_folder()
    make = imported("tracking.also", path)
    if not callable(make):
        raise BadInput.at("tracking.also", "a class", make, "name the class itself")
    made = called("tracking.also", make, {}, signature("tracking.also", path, make))
    missing = [name for name in ("start", "log", "finish") if not callable(getattr(made, name, None))]
    if missing:
        expected = "a class with the methods start(info), log(event), finish(end)"
        raise BadInput.at("tracking.also", expected, path, f"add {', '.join(missing)}")
    return made


def build(task: Task, seed: int) -> nn.Module:
    """The task's model, its initial weights decided by `seed` alone. Leaves torch's generator changed.

    Raises:
        BadInput: not an `nn.Module`, no parameter in it takes a gradient, or one that cannot be trained here.
    """
    torch.manual_seed(seed)
    model: object = task.model()
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise BadInput.described("task.model", "a torch.nn.Module", found, "return a module that is made: Net()")
    check_memory(model)
    try:  # a task may return one module each time, and every process needs its own
        return copy.deepcopy(model)
    except Exception as error:
        do = "keep locks, files and connections out of it"
        raise BadInput.described("task.model", "a model that can be copied", f"the error: {error}", do) from error


def _built_in(name: str) -> str:
    if name not in BUILT_IN:
        raise BadInput.at("task.name", f"one of {', '.join(BUILT_IN)}", name, nearest(name, BUILT_IN))
    return BUILT_IN[name]


def _made(path: str, args: dict[str, Any], data: Data) -> object:
    """Import what `path` names and call it with arguments that its signature takes."""
    make = imported("task.path", path)
    if not callable(make):
        raise BadInput.at("task.path", "a class", make, "name the class itself")
    parameters = signature("task.path", path, make)
    taken = _of_data(data, parameters)
    for name in args.keys() & taken.keys():
        do = "remove it and set data.path or its like"
        raise BadInput.at(f"task.args.{name}", "nothing, as it comes from the section data", args[name], do)
    return called("task.args", make, {**args, **taken}, parameters)


def _of_data(data: Data, parameters: Parameters) -> dict[str, Any]:
    """The section, or its path alone, for a constructor that takes it. What nobody would read is refused."""
    if "data" in parameters:
        return {"data": data}
    if data.path is not None and "data_path" not in parameters:
        do = "remove it, or give the task's constructor a parameter data_path"
        raise BadInput.at("data.path", "null, as this task reads no file", data.path, do)
    refuse_unread(data)
    return {} if data.path is None else {"data_path": data.path}
