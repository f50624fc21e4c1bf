"""What the config's JSON schema says, in words: for error messages, `distgd config schema` and `docs/config.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from distgd.config.sections import Config

_WORDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

_INTRODUCTION = """\
# The config

Made from the schema by `distgd.config.docs_markdown()`; `distgd config schema` prints the same.

A config is a YAML file with the sections below; `distgd train CONFIG section.key=value` changes single keys. Defaults
give way to the file, and the file to the command line. Where both are silent, the environment variables `RAY_ADDRESS`
(`cluster.address`), `MLFLOW_TRACKING_URI` (`tracking.uri`) and `MLFLOW_EXPERIMENT_NAME` (`tracking.experiment`) count.
An unknown key is an error.
Relative paths start at the current folder.
"""


class Row(NamedTuple):
    """One key of the config; `default` is JSON text, or "required"."""

    key: str
    type: str
    default: str
    description: str


@cache
def json_schema() -> dict[str, Any]:
    """The config's JSON schema (draft 2020-12)."""
    return Config.model_json_schema()


def schema_rows() -> list[Row]:
    """Every key, in the order of the sections.

    >>> [row.default for row in schema_rows() if row.key == "batch.size"]
    ['32']
    """
    return list(_rows("", json_schema()))


def docs_markdown() -> str:
    """The text of `docs/config.md`."""
    parts = [_INTRODUCTION]
    for section in known_keys(()):
        schema = at((section,))
        parts.append(
            f"## {section}\n\n{schema['description']}\n\n| key | type | default | meaning |\n|---|---|---|---|"
        )
        parts.extend(_line(row) for row in _rows(section, schema))
        parts.append("")
    return "\n".join(parts)


def at(path: Sequence[str | int]) -> dict[str, Any]:
    """The schema of the key at `path`, or of the deepest key on it that has one; its reference is resolved."""
    schema = json_schema()
    for part in path:
        inner = _below(schema, part)
        if inner is None:
            break
        schema = _resolved(inner)
    return schema


def holds_others(schema: dict[str, Any]) -> bool:
    """Whether keys, places or entries below it have a schema of their own."""
    return any(
        "properties" in option or "items" in option or isinstance(option.get("additionalProperties"), dict)
        for option in (schema, *schema.get("anyOf", ()))
    )


def _below(schema: dict[str, Any], part: str | int) -> dict[str, Any] | None:
    """The schema of one key, of a list's items, or of a mapping's entries; also of what may be null."""
    for option in (schema, *schema.get("anyOf", ())):
        found = option.get("items") if isinstance(part, int) else option.get("properties", {}).get(part)
        found = found or (None if isinstance(part, int) else option.get("additionalProperties"))
        if isinstance(found, dict):
            return found
    return None


def known_keys(path: Sequence[str | int]) -> list[str]:
    """The names of the keys below `path`; none where the value is no section."""
    return list(at(path).get("properties", {}))


def in_words(schema: dict[str, Any]) -> str:
    """What a value may be: `an integer >= 1 or full`."""
    if "expected" in schema:
        return str(schema["expected"])
    if "anyOf" in schema:
        return " or ".join(in_words(_resolved(option)) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return _one_of(schema.get("enum") or [schema["const"]])
    words = _WORDS[schema["type"]]
    if "properties" in schema:
        return f"{words} with the keys {', '.join(schema['properties'])}"
    limits = [
        f"{sign} {_number(schema[word])}" if schema[word] != 2**63 else "< 2**63"
        for word, sign in _LIMITS.items()
        if word in schema
    ]
    return " ".join([words, " and ".join(limits)]).strip()


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself in place of a reference to it, also of one that may be null."""
    options = [option for option in schema.get("anyOf", [schema]) if "$ref" in option]
    if not options:
        return schema
    target = json_schema()["$defs"][options[0]["$ref"].rsplit("/", 1)[-1]]
    nullable = {"expected": f"{in_words(target)} or null"} if "anyOf" in schema else {}
    return {**target, **{key: value for key, value in schema.items() if key == "default"}, **nullable}


def _rows(prefix: str, schema: dict[str, Any]) -> Iterator[Row]:
    for name, given in schema["properties"].items():
        key, inner = f"{prefix}.{name}".lstrip("."), _resolved(given)
        if "properties" in inner and "expected" not in inner:
            yield from _rows(key, inner)
        else:
            default = json.dumps(given["default"]) if "default" in given else "required"
            yield Row(key, in_words(inner), default, given.get("description", inner.get("description", "")))
        if "each" in inner:
            yield from _rows(f"{key}.{inner['each']}", at((*key.split("."), inner["each"])))


def _line(row: Row) -> str:
    return f"| `{row.key}` | {row.type} | `{row.default}` | {row.description} |".replace("\n", " ")
