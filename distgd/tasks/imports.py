"""From a name in the config to an object: `module:name`, imported, called with arguments that it takes.

Whatever goes wrong is one message about the key, with the frames of the user's own code where an error is theirs.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distgd.errors import BadInput

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
    with blaming(key, "a module that imports, in the current folder or installed", path):
        module = importlib.import_module(module_name)
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise BadInput.at(key, f"a name in {module}", name, nearest(name, names))
    return getattr(module, name)


def signature(key: str, path: str, make: Callable[..., object]) -> Parameters:
    """The parameters of a callable.

    Raises:
        BadInput: Python does not know them.
    """
    with blaming(key, "module:Class", path):
        return inspect.signature(make).parameters


def called(key: str, make: Callable[..., object], args: dict[str, Any], parameters: Parameters) -> object:
    """Call `make` with `args`, which are the config's at `key`.

    Raises:
        BadInput: an argument that it does not take, one that is missing, a value of the wrong kind, or its own error.
    """
    _check_names(key, args, parameters)
    with blaming(key, "arguments that it takes", args):
        try:
            return make(**args)
        except ValidationError as error:
            raise _wrong_value(key, error, args) from error


def _check_names(key: str, args: Mapping[str, Any], parameters: Parameters) -> None:
    kinds = {parameter.kind for parameter in parameters.values()}
    for name in args if inspect.Parameter.VAR_KEYWORD not in kinds else ():
        if name not in parameters:
            expected = f"an argument of the task ({', '.join(parameters)})"
            raise BadInput.at(f"{key}.{name}", expected, args[name], nearest(name, parameters))
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if needed and name not in args:
            raise BadInput.at(key, f"a value for {name}", dict(args), f"set {key}.{name}")


def _wrong_value(key: str, error: ValidationError, args: Mapping[str, Any]) -> Exception:
    """The first wrong argument as a message about its key; the error itself where it is about something else."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if name not in args:
        return error
    return BadInput(f"{key}.{name}: {first['msg'][0].lower()}{first['msg'][1:]}, found {args[name]!r}")


@contextmanager
def blaming(key: str, expected: str, found: object) -> Iterator[None]:
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


def nearest(name: str, known: Iterable[str]) -> str:
    """A question about the known name that is most like `name`; empty where none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""
