"""YAML in and out, without its surprises.

Scalars follow the core schema of YAML 1.2: `1e-3` is a number, `no` and `12:30` are text, `010` is ten. A key that is
given twice, a tag and a document that grows without bound through aliases are errors that name the line. Nothing but
null, booleans, numbers, text, lists and mappings comes out, and no object is ever constructed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import yaml

from distgd.errors import BadInput

MOST_NODES, DEEPEST = 10_000, 40
Built = TypeVar("Built")

_CORE = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


_WAYS_OUT = {  # words of PyYAML's, and what to do
    "'\\t'": "indent with spaces",
    "another document": "leave one document, without lines of ---",
    "undefined alias": "put text that begins with * in quotes",
}


class _Refused(yaml.MarkedYAMLError):
    """YAML that is sound and not taken here: what was found, and what to do."""

    def __init__(self, found: str, do: str, at: Any) -> None:
        super().__init__(problem=found, problem_mark=at.start_mark, note=do)


class _Composer(yaml.SafeLoader):
    """Builds nodes with the core schema's types, and refuses tags."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, Any]] = {}  # type: ignore[misc]  # as PyYAML declares it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"the tag {event.tag}", "remove it: values are text, numbers, lists and mappings", event)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever any version of YAML could take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'  # only this style escapes every kind of line break
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)
for _type, _pattern in _CORE.items():
    for _class in (_Composer, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_pattern})$"), None)


def parse(text: str, where: str) -> Any:
    """The value that a YAML document holds; None for an empty one.

    Raises:
        BadInput: not YAML, or one of the things that this module refuses; the message begins with `where`.
    """
    return _composed(text, where, lambda node: None if node is None else _Builder().build(node, 0))


def parse_list(text: str, where: str) -> list[tuple[Any, dict[str, int]]] | None:
    """The values of a document that is a list, each with the line of each of its keys: `a.b` in `a`, "" for itself.

    None for any other document.
    """

    def build(node: yaml.Node | None) -> list[tuple[Any, dict[str, int]]] | None:
        if not isinstance(node, yaml.SequenceNode):
            return None
        builder = _Builder()
        return [(builder.build(item, 1), dict(_lines(item, ""))) for item in node.value]

    return _composed(text, where, build)


def _lines(node: yaml.Node, key: str) -> Iterator[tuple[str, int]]:
    yield key, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = f"{key}.{name.value}".lstrip(".")
            yield from _lines(value, inner)
            yield inner, name.start_mark.line + 1


def _composed(text: str, where: str, build: Callable[[yaml.Node | None], Built]) -> Built:
    try:
        return build(yaml.compose(text, Loader=_Composer))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise BadInput.described(f"{where}{line}", "plain YAML", *_told(error)) from None
    except yaml.reader.ReaderError as error:
        found = f"the character {chr(error.character)!r} at place {error.position}"
        raise BadInput.described(where, "text", found, "look whether it is a YAML file") from None
    except RecursionError:
        raise BadInput.described(where, f"at most {DEEPEST} levels of nesting", "more", "flatten it") from None


def _told(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    """What was found, and what to do."""
    if isinstance(error, _Refused):
        return str(error.problem), str(error.note)
    said = str(error.problem or error.context)
    known = (do for words, do in _WAYS_OUT.items() if words in said)
    return f"a mistake: {said}", next(known, "look at brackets, quotes, colons and indentation")


def dump(value: Any) -> str:
    """The YAML document that `parse` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Builder:
    """Turns nodes into values; an alias counts as often as it is used."""

    def __init__(self) -> None:
        self._left = MOST_NODES

    def build(self, node: yaml.Node, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _Refused(f"more than {MOST_NODES:,} values", "use fewer aliases and shorter lists", node)
        if depth > DEEPEST:
            raise _Refused(f"more than {DEEPEST} levels of nesting", "flatten it", node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, depth + 1) for item in node.value]
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key that is not text", "give it a name", key)
            if key.value in values:
                raise _Refused(f"the key {key.value!r} twice", "remove one of them", key)
            values[key.value] = self.build(value, depth + 1)
        return values


def _scalar(node: yaml.Node) -> Any:
    kind, text = node.tag.rsplit(":", 1)[-1], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return _integer(node, text)
    if kind == "float":
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


def _integer(node: yaml.Node, text: str) -> int:
    if len(text) > 100:
        raise _Refused("a number of more than 100 digits", "shorten it, or put it in quotes", node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
