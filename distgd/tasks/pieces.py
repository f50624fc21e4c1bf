"""A task made of separate pieces: a model, a loss and data, given in Python or named in a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from distgd.config import PIECES, Data, TaskSection
from distgd.errors import BadInput
from distgd.sources import arrived, is_data, open_source, travelling
from distgd.tasks.imports import called, imported, signature


class Pieces:
    """A task whose methods are the pieces that were given; a piece that was not is no attribute.

    It means the same as a class with methods of these names:
        `model`: a module, or a class or function that makes one.
        `loss`, `metrics`, `evaluate`, `collate`: functions.
        `train_data`, `eval_data`: data, or a function that returns it.

    Args:
        prefix: what messages put before a piece's name.

    Raises:
        BadInput: a piece of another kind, or one that is missing; the message names it.

    >>> task = Pieces(model=nn.Linear(1, 1), loss=lambda model, batch: model(batch).mean(), train_data=(1.0,))
    >>> task.train_data(), hasattr(task, "eval_data")
    ((1.0,), False)
    """

    def __init__(self, prefix: str = "", /, **pieces: Any) -> None:
        given = {name: piece for name, piece in pieces.items() if piece is not None}
        missing = [name for name in PIECES[:3] if name not in given]
        if missing:
            raise BadInput.at("task", "model, loss and train_data", sorted(given), f"give {', '.join(missing)} too")
        for name, piece in given.items():
            setattr(self, name, _piece(f"{prefix}{name}", name, piece))

    def origin(self) -> dict[str, str]:
        """Where each piece comes from, as `module:name`, for the record."""
        return {name: _origin(getattr(self, name)) for name in PIECES if hasattr(self, name)}


def named(section: TaskSection, data: Data) -> Pieces:
    """The pieces that a config names, imported. A function that takes `data` or `data_path` gets the config's.

    Raises:
        BadInput: a name that does not import, or arguments that a piece does not take.
    """
    made = {}
    for name, path in section.pieces.items():
        piece, args = imported(f"task.{name}", path), section.args.get(name, {})
        if not isinstance(args, Mapping):
            raise BadInput.at(f"task.args.{name}", "a mapping of arguments", args, f"such as {{{name}: {{width: 3}}}}")
        made[name] = _bound(name, path, piece, dict(args), data)
    _check_read(section, data, made)
    return Pieces("task.", **{name: piece.made if isinstance(piece, _Bound) else piece for name, piece in made.items()})


class _Bound:
    """A function of the config with its arguments, called where the piece is."""

    def __init__(self, key: str, make: Callable[..., Any], args: dict[str, Any], path: str) -> None:
        self.parameters = signature(key, path, make)
        self.key, self.make, self.args = key, make, args

    def made(self) -> Any:
        return called(self.key, self.make, self.args, self.parameters)


def _bound(name: str, path: str, piece: object, args: dict[str, Any], data: Data) -> Any:
    """Pieces that are called without arguments get the config's; `loss` and the others get theirs from the run."""
    makes = name in ("model", "train_data", "eval_data") and callable(piece)
    if not makes or isinstance(piece, nn.Module) or is_data(piece):
        if args:
            raise BadInput.at(f"task.args.{name}", "nothing, as this piece is not called to be made", args, "remove it")
        return piece
    bound = _Bound(f"task.args.{name}", cast("Callable[..., Any]", piece), args, path)
    if name != "model":
        if "data" in bound.parameters:
            bound.args["data"] = data
        elif data.path is not None and "data_path" in bound.parameters:
            bound.args["data_path"] = data.path
    return bound


def _check_read(section: TaskSection, data: Data, made: Mapping[str, Any]) -> None:
    read = {name for piece in made.values() if isinstance(piece, _Bound) for name in piece.args}
    if data.path is not None and not read & {"data", "data_path"}:
        do = "remove it, or give the function a parameter data_path"
        raise BadInput.at("data.path", f"null, as {section.train_data} takes no data_path", data.path, do)
    if "data" not in read:
        refuse_unread(data)


def refuse_unread(data: Data) -> None:
    """Refuse what the section says beside `path`, for a task that does not take the section."""
    for key, value in data:
        if key != "path" and value != getattr(Data(), key):
            found = value.model_dump(exclude_unset=True) if hasattr(value, "model_dump") else value
            raise BadInput.at(f"data.{key}", "nothing, as this task does not read it", found, "remove it")


class _Held:
    """A value in place of the function that returns it; a memory-mapped array in it travels as its file's place."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": travelling(self.value)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = arrived(state["value"])


def _piece(key: str, name: str, piece: Any) -> Callable[..., Any]:
    if name == "model" and isinstance(piece, nn.Module):
        return _Held(piece)
    if name in ("train_data", "eval_data") and is_data(piece):
        return _Held(piece)
    if callable(piece):
        return cast("Callable[..., Any]", piece)
    if name in ("train_data", "eval_data"):
        open_source(piece, key=key)  # says what is wrong with it
    is_model = name == "model"
    expected = "a torch.nn.Module, or a class or function that makes one" if is_model else "a function"
    raise BadInput.at(
        key, expected, piece, "give the object itself, no name of it" if isinstance(piece, str) else "give one"
    )


def _origin(piece: Any) -> str:
    if isinstance(piece, _Held):
        piece = type(piece.value)
    piece = getattr(piece, "__self__", piece)  # a bound method is recorded as its object
    kind = piece if hasattr(piece, "__qualname__") else type(piece)
    return f"{kind.__module__}:{kind.__qualname__}"
