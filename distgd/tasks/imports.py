"""From a name in the config to an object: `module:name`, imported, called with arguments that it takes.

Whatever goes wrong is one message about the key, with the frames of the user's own code where an error is theirs.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from distgd.errors import BadInput, blaming

Parameters = Mapping[str, inspect.Parameter]


def see_current_folder() -> None:
    """Let modules in the current folder be imported, as `python script.py` does for the script's."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def imported(key: str, path: str) -> object:
    """What `path`, a `module:name`, names.

    Raises:
        BadInput: the module does not import, or has no such name.
    """
    module_name, _, name = path.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        plain = module_name.removesuffix(".py").removeprefix("./").replace("/", ".")
        raise BadInput.at(key, "module:name, no file", path, f"did you mean {plain}:{name}?")
    with blaming(key, f"a module that imports at {path}"):
        module = _module(key, module_name)
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        where = getattr(module, "__file__", None) or f"the module {module_name}"
        do = nearest(name, names) or f"it has {_some(names)}"
        raise BadInput.at(key, f"a name in {where}", name, do)
    return getattr(module, name)


def _module(key: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and needs another one
        expected = f"a module in {Path.cwd()} or installed"
        do = nearest(name, [file.stem for file in Path.cwd().glob("*.py")])
        raise BadInput.at(key, expected, name, do or "start from the folder that it is in, or install it") from error


def signature(key: str, path: str, make: Callable[..., object]) -> Parameters:
    """The parameters of a callable.

    Raises:
        BadInput: Python does not know them.
    """
    with blaming(key, f"a class or a function with a signature at {path}"):
        return inspect.signature(make).parameters


def called(key: str, make: Callable[..., object], args: dict[str, Any], parameters: Parameters) -> object:
    """Call `make` with `args`, which are the config's at `key`.

    Raises:
        BadInput: an argument that it does not take, one that is missing, a value of the wrong kind, or its own error.
    """
    _check_names(key, args, parameters)
    with blaming(key, f"arguments that {getattr(make, '__qualname__', make)} can be made of"):
        try:
            return make(**args)
        except ValidationError as error:
            raise _wrong_value(key, error, args) from error


def _check_names(key: str, args: Mapping[str, Any], parameters: Parameters) -> None:
    kinds = {parameter.kind for parameter in parameters.values()}
    for name in args if inspect.Parameter.VAR_KEYWORD not in kinds else ():
        if name not in parameters:
            expected = (
                f"one of its arguments {', '.join(parameters)}" if parameters else "no argument, as it takes none"
            )
            raise BadInput.at(f"{key}.{name}", expected, args[name], nearest(name, parameters) or "remove it")
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if needed and name not in args:
            do = f"set {key}.{name}, or give it a default" if key.startswith("task.args") else "give it a default"
            raise BadInput.at(key, f"a value for the argument {name}", dict(args), do)


def _wrong_value(key: str, error: ValidationError, args: Mapping[str, Any]) -> Exception:
    """The first wrong argument as a message about its key; the error itself where it is about something else."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if name not in args:
        return error
    expected = first["msg"].removeprefix("Input should be ").partition(", unable")[0]
    return BadInput.at(f"{key}.{name}", expected, args[name], "set it to one, or leave it out")


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"


def nearest(name: str, known: Iterable[str]) -> str:
    """A question about the known name that is most like `name`; empty where none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""
