"""What is trained: a model, its loss and its data, as one object, and how a config names it.

A task is any class with the methods of `Task`; it need not import this package. Everything that it returns must be the
same in every process: each worker makes its own copy, and only the driver's initial weights are the run's.

Optional methods:
    `eval_data()`: held-out data, in a form that `train_data` may return. Without it there is no evaluation.
    `metrics(model, batch)`: name -> a tensor with one value a sample, or a mean over the batch's samples.

>>> class Line:
...     def model(self): return torch.nn.Linear(1, 1)
...     def loss(self, model, batch): return (model(batch[0]) - batch[1]).square().mean()
...     def train_data(self): return torch.rand(64, 1), torch.ones(64, 1)

Built-in tasks are such classes too; `BUILT_IN` has their import paths.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distgd.config import Data, TaskSection
from distgd.errors import BadInput

BUILT_IN = {
    "char-lm": "distgd.tasks.charlm:CharLM",
    "counting": "distgd.tasks.counting:Counting",
    "digits": "distgd.tasks.digits:Digits",
    "quadratic": "distgd.tasks.quadratic:Quadratic",
    "synthetic": "distgd.tasks.synthetic:Synthetic",
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
    if section.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    made = _made(section.path or _built_in(section.name or ""), dict(section.args), data)
    missing = [name for name in ("model", "loss", "train_data") if not callable(getattr(made, name, None))]
    if missing:
        expected = "a class with the methods model(), loss(model, batch), train_data()"
        raise BadInput.at("task.path", expected, section.path, f"add {', '.join(missing)}")
    return cast(Task, made)


def build(task: Task, seed: int) -> nn.Module:
    """The task's model, its initial weights decided by `seed` alone. Leaves torch's generator changed.

    Raises:
        BadInput: not an `nn.Module`, or no parameter in it takes a gradient.
    """
    torch.manual_seed(seed)
    model: object = task.model()
    if not isinstance(model, nn.Module):
        raise BadInput(f"task.model: expected a torch.nn.Module, found {type(model).__name__}; return the model itself")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput("task.model: expected at least one trainable parameter, found none; set requires_grad=True")
    return copy.deepcopy(model)  # a task may return one module each time, and every process needs its own


def _built_in(name: str) -> str:
    if name not in BUILT_IN:
        raise BadInput.at("task.name", f"one of {', '.join(BUILT_IN)}", name, _nearest(name, BUILT_IN))
    return BUILT_IN[name]


def _made(path: str, args: dict[str, Any], data: Data) -> object:
    """Import what `path` names and call it with arguments that its signature takes."""
    make = _imported(path)
    with _blaming("task.path", "module:Class", path):
        parameters = inspect.signature(make).parameters
    args |= _of_data(data, parameters)
    _check_names(args, parameters)
    with _blaming("task.args", "arguments that make the task", args):
        try:
            return make(**args)
        except ValidationError as error:
            raise _wrong_value(error, args) from error


def _of_data(data: Data, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The section, or its path alone, for a constructor that takes it. What nobody would read is refused."""
    if "data" in parameters:
        return {"data": data}
    if data.path is not None and "data_path" not in parameters:
        do = "remove it, or give the task's constructor a parameter data_path"
        raise BadInput.at("data.path", "null, as this task reads no file", data.path, do)
    for key, value in data:
        if key != "path" and value != getattr(Data(), key):
            found = value.model_dump(exclude_unset=True) if hasattr(value, "model_dump") else value
            raise BadInput.at(f"data.{key}", "nothing, as this task does not read it", found, "remove it")
    return {} if data.path is None else {"data_path": data.path}


def _imported(path: str) -> Callable[..., object]:
    module_name, _, name = path.partition(":")
    with _blaming("task.path", "a module that imports, in the current folder or installed", path):
        module = importlib.import_module(module_name)
    found = getattr(module, name, None)
    if not callable(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise BadInput.at("task.path", f"a class in {module}", name, _nearest(name, classes))
    return cast("Callable[..., object]", found)


def _check_names(args: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    kinds = {parameter.kind for parameter in parameters.values()}
    for name in args if inspect.Parameter.VAR_KEYWORD not in kinds else ():
        if name not in parameters:
            expected = f"an argument of the task ({', '.join(parameters)})"
            raise BadInput.at(f"task.args.{name}", expected, args[name], _nearest(name, parameters))
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if needed and name not in args:
            raise BadInput.at("task.args", f"a value for {name}", dict(args), f"set task.args.{name}")


def _wrong_value(error: ValidationError, args: Mapping[str, Any]) -> Exception:
    """The first wrong argument as a message about its key; the error itself where it is about something else."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if name not in args:
        return error
    return BadInput(f"task.args.{name}: {first['msg'][0].lower()}{first['msg'][1:]}, found {args[name]!r}")


@contextmanager
def _blaming(key: str, expected: str, found: object) -> Iterator[None]:
    """Turn an error in somebody else's code into a message about `key`, with that code's own frames."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        ours = (__file__, contextlib.__file__, importlib.__file__, inspect.__file__)
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename not in ours and not frame.filename.startswith("<frozen")
        ]
        lines = [*traceback.format_list(frames), *traceback.format_exception_only(error)]
        raise BadInput(f"{BadInput.at(key, expected, found)}\n{''.join(lines).rstrip()}") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""
