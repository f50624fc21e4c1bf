"""From what is to be compared to the overrides of each variant. Text in, data out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from distgd.config import Target
from distgd.config.text import parse
from distgd.errors import BadInput

MODE = "consistency.mode"

WITHOUT = {
    "sync": ("consistency.staleness=null", "consistency.scale_lr=false"),
    "bounded": ("consistency.quorum=null",),
    "async": ("consistency.staleness=null", "consistency.quorum=null"),
}
"""What a config may say for its own mode, and another mode does not have."""

NOT_COMPARED = ("run.name", "run.storage", "tracking")
"""Keys, and a section, that are the same for every variant."""

LONGEST_NAME = 80  # letters of a folder's name

_TARGET = re.compile(r"\s*(?P<metric>eval/[^<>=\s]+)\s*(?P<how>>=|<=)\s*(?P<value>\S+)\s*")


@dataclass(frozen=True)
class Variant:
    """One of the runs that are compared: its name for people, its folder's, and what it overrides."""

    label: str
    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes."""

    key: str
    values: tuple[Any, ...]


def variants(modes: str | None, settings: Sequence[str]) -> list[Variant]:
    """Every combination of the values, the last axis fastest.

    >>> [variant.label for variant in variants("sync,async", ["optimizer.lr=0.1,0.2"])]
    ['sync lr=0.1', 'sync lr=0.2', 'async lr=0.1', 'async lr=0.2']

    Args:
        modes: `sync,async`.
        settings: `section.key=value,value`, each value in YAML.

    Raises:
        BadInput: nothing to compare, a key twice, a value twice, or a key that belongs to the comparison itself.
    """
    axes = [_axis("--set", setting) for setting in settings]
    if modes is not None:
        axes.insert(0, _axis("--modes", f"{MODE}={modes}"))
    if not axes:
        raise BadInput.described("compare", "--modes or --set", "neither", "such as --modes sync,bounded,async")
    keys = [axis.key for axis in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise BadInput.at("--set", "each key once", twice[0], "list its values behind one --set")
    labels = dict(zip(keys, _short(keys), strict=True))
    found: list[Variant] = []
    for values in product(*(axis.values for axis in axes)):
        chosen = dict(zip(keys, values, strict=True))
        label = " ".join(_said(labels[key], value) for key, value in chosen.items())
        overrides = tuple(override for key, value in chosen.items() for override in _overrides(key, value))
        found.append(Variant(label, _folder_name(label, {each.name for each in found}), overrides))
    return found


def _axis(option: str, setting: str) -> Axis:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise BadInput.at(option, "section.key=value,value", setting, "such as optimizer.lr=0.1,0.01")
    if key in NOT_COMPARED or key.partition(".")[0] in NOT_COMPARED:
        raise BadInput.at(
            option, f"a key other than those of {', '.join(NOT_COMPARED)}", key, "set it for all variants"
        )
    values = parse(f"[{text}]", f"{option} {key}")
    if not isinstance(values, list) or not values:
        do = "such as optimizer.lr=0.1,0.01"
        raise BadInput.at(f"{option} {key}", "one value or more, with commas between", text, do)
    written = [_written(value) for value in values]
    if twice := [value for value in written if written.count(value) > 1]:
        raise BadInput.at(f"{option} {key}", "different values", twice[0], "leave one of them out")
    return Axis(key, tuple(values))


def _short(keys: Sequence[str]) -> Iterator[str]:
    """The last word of each key, the whole key where two end alike; a mode needs no name."""
    last = [key.rpartition(".")[2] for key in keys]
    for key, word in zip(keys, last, strict=True):
        yield "" if key == MODE else word if last.count(word) == 1 else key


def _said(name: str, value: Any) -> str:
    return f"{name}={_written(value)}" if name else _written(value)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _overrides(key: str, value: Any) -> Iterator[str]:
    yield f"{key}={json.dumps(value)}"
    if key == MODE:
        yield from WITHOUT.get(str(value), ())


def _folder_name(label: str, taken: set[str]) -> str:
    """A name that a folder may have, and no other variant has."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:LONGEST_NAME] or "variant"
    name = "values" if name == "report" else name  # where the comparison's own page is
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(each for each in numbered if each not in taken)


def target(text: str | None) -> Target | None:
    """What a run is to reach, from `eval/accuracy>=0.95` or `eval/loss<=0.1`; None of None."""
    if text is None:
        return None
    found = _TARGET.fullmatch(text)
    value = parse(found["value"], "--target") if found else None
    if not found or isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        do = "such as eval/accuracy>=0.95"
        raise BadInput.at("--target", "METRIC>=NUMBER or METRIC<=NUMBER with a metric eval/NAME", text, do)
    return Target(metric=found["metric"], **{"at_least" if found["how"] == ">=" else "at_most": float(value)})
