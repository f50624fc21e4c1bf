"""From a file, a mapping and overrides to a `Config`, and from pydantic's errors to one message."""

from __future__ import annotations

import difflib
import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distgd.config.schema import at, holds_others, in_words, known_keys, schema_rows
from distgd.config.sections import Config
from distgd.config.text import parse
from distgd.errors import BadInput

Key = tuple[str | int, ...]

_FROM_ENVIRONMENT = {
    "RAY_ADDRESS": ("cluster", "address"),
    "MLFLOW_TRACKING_URI": ("tracking", "uri"),
    "MLFLOW_EXPERIMENT_NAME": ("tracking", "experiment"),
}

_FIRST = {"task": "task=digits", "stop": "stop.epochs=10"}  # what to set where a whole section is missing


def load(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = {},
) -> Config:
    """The config that a source, overrides and, where they are silent, the environment make.

    Args:
        source: a YAML file, nested mappings of plain values, or a config.
        overrides: `section.key=value` with the value in YAML; a later one wins.
        environ: `RAY_ADDRESS` (only for the backend ray), `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` are read.

    Raises:
        BadInput: one message with a line for each problem: the key, what is allowed, what was found, what to do.

    >>> load({"task": "digits", "stop": {"epochs": 1}}, ["batch.size=64"]).batch.size
    64
    """
    given = _plain((), _given(source))
    for override in overrides:
        _apply(given, override)
    _fill(given, environ)
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        raise BadInput("\n".join(_messages(error))) from None


def _given(source: str | Path | Mapping[str, Any] | Config) -> Any:
    if isinstance(source, Config):
        return source.model_dump(mode="json", exclude_unset=True)  # what was left open stays open
    if isinstance(source, Mapping):
        return source
    given = parse(_read(Path(source)), str(source))
    if not isinstance(given, dict):
        found = "an empty file" if given is None else reprlib.repr(given)
        do = "write at least task: digits and stop: {epochs: 10}"
        raise BadInput.described(str(source), "sections such as task, batch and stop", found, do)
    return given


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = {file.stem: file for file in path.parent.glob("*.y*ml")}
        close = difflib.get_close_matches(path.stem, there, n=1)
        do = f"did you mean {there[close[0]]}?" if close else f"paths start at {Path.cwd()}"
        raise BadInput.described(str(path), "a config file", "nothing there", do) from None
    except (OSError, UnicodeDecodeError) as error:
        is_folder = isinstance(error, IsADirectoryError)
        found = "a folder" if is_folder else "other bytes" if isinstance(error, ValueError) else str(error.strerror)
        do = "name the file in it" if is_folder else "look whether it is a YAML file that you may read"
        raise BadInput.described(str(path), "a config file in UTF-8", found, do) from None


def _plain(key: Key, value: Any) -> Any:
    """A copy of the value that holds only what YAML can: what goes in can be written down and read again."""
    if isinstance(value, Mapping):
        return {_text(key, name): _plain((*key, name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain((*key, place), inner) for place, inner in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput.at(_dotted(key), "a finite number", value, "give another, or leave the key out")
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # numpy's float64 is a float that YAML cannot write
    if value is None:
        return None
    do = "turn it into plain values"
    raise BadInput.at(_dotted(key), "null, true, false, a number, text, a list or a mapping", value, do)


def _text(key: Key, name: object) -> str:
    if not isinstance(name, str):
        raise BadInput.at(_dotted(key) or "config", "keys that are text", name, "put it in quotes")
    return name


def _apply(given: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into the nested mappings."""
    dotted, equals, text = override.partition("=")
    path = dotted.strip().split(".")
    if not equals or not all(path):
        raise BadInput.at("override", "section.key=value", override, "such as batch.size=64, without spaces")
    value = _plain(tuple(path), parse(text, dotted))
    inner = given
    for place, part in enumerate(path[:-1]):
        inner = _section(inner, part, at(path[: place + 1]).get("short"))
    if len(path) > 1 and path[-2] == "every":  # it holds one key: a new one takes the old one's place
        inner.clear()
    inner[path[-1]] = value


def _section(outer: dict[str, Any], name: str, short: str | None) -> dict[str, Any]:
    """The mapping below a name, there from now on; text that is short for it becomes its key `short`."""
    inner = outer.get(name)
    if not isinstance(inner, dict):
        inner = {short: inner} if short and isinstance(inner, str) else {}
        outer[name] = inner
    return inner


def _fill(given: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Take from the environment what the config does not say."""
    for variable, (section, key) in _FROM_ENVIRONMENT.items():
        inner = given.setdefault(section, {}) if environ.get(variable) else None
        if not isinstance(inner, dict) or key in inner:
            continue
        if section != "cluster" or inner.get("backend", "ray") == "ray":
            inner[key] = environ[variable]


def _messages(error: ValidationError) -> Iterator[str]:
    """One line a key, in the order in which they were found."""
    seen = set()
    for problem in error.errors(include_url=False):
        key, message = _message(problem)
        if key not in seen:
            seen.add(key)
            yield message


def _message(problem: Any) -> tuple[str, str]:
    path, found = _path(problem["loc"]), problem["input"]
    key = _dotted(path)
    if problem["type"] == "refused":
        said = problem["ctx"]
        key = said["key"] or key
        return key, str(BadInput.described(key, said["expected"], _shown(said["found"]), said["do"]))
    if problem["type"] == "extra_forbidden":
        return key, _unknown(path, found)
    if problem["type"] == "missing":
        return key, str(BadInput.described(key, in_words(at(path)), "nothing", f"set {_FIRST.get(key, key)}"))
    return key, str(BadInput.described(key, in_words(at(path)), _shown(found), _advice(path, found)))


def _shown(found: object) -> str:
    """A value, in YAML's words where Python has others."""
    return "null" if found is None else str(found).lower() if isinstance(found, bool) else repr(found)


def _path(loc: tuple[str | int, ...]) -> Key:
    """The key that an error is about: pydantic goes on with the branch of a union."""
    for length in range(len(loc)):
        schema = at(loc[:length])
        if not holds_others(schema):
            return loc[:length]
    return loc


def _unknown(path: Key, found: object) -> str:
    section, name = path[:-1], str(path[-1])
    where = f"a key of {_dotted(section)}" if section else "a section"
    expected = f"{where} ({', '.join(known_keys(section))})"
    return (
        f"{_dotted(path)}: expected {expected}, found an unknown key with the value {reprlib.repr(found)}"
        + _nearest(section, name)
    )


def _nearest(section: Key, name: str) -> str:
    """A known key like the unknown one: in its own section, else one of that name in another."""
    keys = [row.key for row in schema_rows()]
    if name in keys:
        return "; nest the key below its section's name"
    if close := difflib.get_close_matches(name, known_keys(section), n=1):
        return f"; did you mean {_dotted((*section, close[0]))}?"
    elsewhere = [key for key in keys if key.rsplit(".", 1)[-1] == name]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else "; remove it"


def _advice(path: Key, found: object) -> str:
    schema, name = at(path), str(path[-1]) if path else ""
    expected = in_words(schema)
    if schema.get("enum") and isinstance(found, str):
        close = difflib.get_close_matches(found, schema["enum"], n=1)
        return f"did you mean {close[0]}?" if close else "choose one"
    if "properties" in schema and "expected" not in schema:
        return f"write {name}: {{{next(iter(schema['properties']))}: ...}}"
    if "module:name" in expected:
        return "such as mine:Net for Net in mine.py"
    if "text" in expected and isinstance(found, int | float):
        return "put it in quotes"
    if expected.startswith("a list") and isinstance(found, str):
        return f"write [{found}]"
    default = schema.get("default")
    return "correct it" if default is None else f"correct it, or leave it out for {json.dumps(default)}"


def _dotted(key: Key) -> str:
    """A key as people write it, such as `optimizer.groups[0].match`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")
