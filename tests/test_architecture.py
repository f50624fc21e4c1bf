"""The shape of the package, proven from its source: who imports whom, who imports what, and which names may not be.

For the reader: a *room* is a module of `distgd`, or a folder of modules that acts as one. Every room has a *floor*; it
imports only from rooms on its own floor or below, and imports form no cycle. A *fence* keeps an outside package in its
rooms, so that replacing or upgrading it touches nothing else. Rooms that decide (floors 0 and 1) do not act: they have
no network, no thread, no clock. Imports inside functions and under `TYPE_CHECKING` count too.

A new room gets a line in FLOORS. A rule that is in the way is changed here, with a line in docs/decisions.md.
Each rule has a twin below that breaks it on purpose.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import distgd

FLOORS = {
    room: floor
    for floor, rooms in enumerate(
        (
            "errors config events",  # words
            "layout optim policy ledger reduce codecs faults diagnostics rules staging returning recording "  # pure
            "snapshots shard stopping features cost norms shares",
            "memory machine wire transport device canary tasks sources table checkpoint records tracking "  # doors
            "progress report audit weights updates injected",
            "server worker adder evaluator driver assignment evaluations saving gradients replica mirror "  # actors
            "tally effects membership promise suspicion",
            "cluster process inprocess resources reaper standby rehearsed",  # the engine
            "trainer plan prepare forecast keeping resume result runfolder runinfo signals export compare "  # the story
            "runstore replay run starting rehearsal cli __main__ __init__",
        )
    )
    for room in rooms.split()
}
FENCES = {  # outside package -> the rooms that may import it
    "ray": {"cluster"},
    "mlflow": {"tracking"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "click": {"cli"},
    "rich": {"cli", "progress"},
}
ACTING = {"ray", "mlflow", "socket", "selectors", "threading", "time"}
FORBIDDEN = {room: ACTING for room, floor in FLOORS.items() if floor <= 1}
FORBIDDEN |= {room: ACTING | {"datetime", "random", "logging"} for room in ("policy", "ledger", "reduce", "shard")}
FORBIDDEN |= {room: ACTING | {"torch"} for room in ("errors", "config", "events")}
BANNED_WORDS = {"manager", "helper", "util", "base", "common", "misc", "handler", "engine"}


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, the room it is in, its source, and every dotted name that it imports anywhere."""

    name: str
    room: str
    tree: ast.Module
    imports: frozenset[str]


def read_package(folder: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        inside = parts[:-1] if parts[-1] == "__init__" else parts
        name = ".".join(["distgd", *inside])
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        package = name if parts[-1] == "__init__" else name.rpartition(".")[0]
        modules[name] = Module(name, parts[0], tree, frozenset(imported_names(tree, package)))
    return modules


def imported_names(tree: ast.Module, package: str) -> Iterator[str]:
    """`import a.b` gives a.b; `from a import b` gives a.b; so does `import_module("a.b")`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                origin = ".".join([*above, *([module] if module else [])])
                yield from (f"{origin}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def edges(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    return {
        module.name: {target for name in module.imports if (target := resolve(name, modules))} - {module.name}
        for module in modules.values()
    }


def resolve(name: str, modules: Mapping[str, Module]) -> str | None:
    """The module that an imported name is, or is in."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name if name in modules else None


def homeless(modules: Mapping[str, Module]) -> list[str]:
    return [f"{room} is on no floor" for room in sorted({module.room for module in modules.values()} - set(FLOORS))]


def upward(modules: Mapping[str, Module]) -> list[str]:
    return [
        f"{name} imports {target}, which is on a floor above"
        for name, targets in edges(modules).items()
        for target in sorted(targets)
        if FLOORS.get(modules[target].room, 0) > FLOORS.get(modules[name].room, 0)
    ]


def over_fences(modules: Mapping[str, Module]) -> list[str]:
    return [
        f"{module.name} imports {name}, which belongs in {', '.join(sorted(FENCES[top]))}"
        for module in modules.values()
        for name in sorted(module.imports)
        if (top := name.partition(".")[0]) in FENCES and module.room not in FENCES[top]
    ]


def forbidden(modules: Mapping[str, Module]) -> list[str]:
    return [
        f"{module.name} imports {name}, and its room may not"
        for module in modules.values()
        for name in sorted(module.imports)
        if name.partition(".")[0] in FORBIDDEN.get(module.room, ())
    ]


def cycles(modules: Mapping[str, Module]) -> list[str]:
    """A cycle of files, or of rooms that no cycle of files shows."""
    files = edges(modules)
    rooms: dict[str, set[str]] = {module.room: set() for module in modules.values()}
    for name, targets in files.items():
        rooms[modules[name].room] |= {modules[target].room for target in targets} - {modules[name].room}
    return [found for graph in (files, rooms) for found in first_cycle(graph)]


def first_cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def badly_named(modules: Mapping[str, Module]) -> list[str]:
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [(module.name, module.name.rpartition(".")[2]) for module in modules.values()]
    for module in modules.values():
        found += [(module.name, node.name) for node in ast.walk(module.tree) if isinstance(node, kinds)]
    return [f"{name} in {where} says nothing" for where, name in found if words(name) & BANNED_WORDS]


def words(name: str) -> set[str]:
    """The words of a name in snake_case or CamelCase, in the singular.

    >>> sorted(words("_IOHelpers_for_queue"))
    ['for', 'helper', 'io', 'queue']
    """
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return {part.lower().removesuffix("s") for part in parts}


Rule = Callable[[Mapping[str, Module]], list[str]]
RULES: tuple[Rule, ...] = (
    homeless,
    upward,
    over_fences,
    forbidden,
    cycles,
    badly_named,
)


@pytest.fixture(scope="module")
def package() -> dict[str, Module]:
    return read_package(Path(distgd.__file__).parent)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule, package: dict[str, Module]) -> None:
    assert rule(package) == []


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        (homeless, {"attic.py": ""}),
        (upward, {"layout.py": "def f():\n    from distgd import tasks", "tasks.py": ""}),
        (upward, {"config/__init__.py": "", "config/text.py": "from ..shard import Shard", "shard.py": ""}),
        (over_fences, {"trainer.py": "def f():\n    import ray.util"}),
        (over_fences, {"report.py": "from importlib import import_module\nx = import_module('mlflow.pytorch')"}),
        (forbidden, {"policy.py": "from random import random"}),
        (forbidden, {"config/__init__.py": "import torch.nn"}),
        (cycles, {"server.py": "from . import worker", "worker.py": "from distgd.server import Server"}),
        (cycles, {"tasks/a.py": "import distgd.sources", "tasks/b.py": "", "sources.py": "import distgd.tasks.b"}),
        (badly_named, {"shard.py": "class A:\n    def load_utils(self): ..."}),
        (badly_named, {"optim/__init__.py": "class OptimizerBase: ..."}),
    ],
)
def test_a_broken_rule_is_seen(rule: Rule, files: Mapping[str, str], tmp_path: Path) -> None:
    for name, source in {"__init__.py": "", **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    modules = read_package(tmp_path)
    assert [each for each in RULES if each(modules)] == [rule]


def imported_by(*arguments: str) -> set[str]:
    """The top-level packages that `python ARGUMENTS` imports, from the interpreter's own record."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    lines = (line for line in run.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_help_answers_without_anything_heavy() -> None:
    loaded = imported_by("-m", "distgd", "--help")
    assert {"distgd", "click"} <= loaded
    assert not loaded & {"ray", "torch", "mlflow", "matplotlib", "numpy", "pandas", "pyarrow"}


def test_importing_the_package_imports_nothing_outside_the_standard_library() -> None:
    loaded = imported_by("-c", "import distgd")
    assert "distgd" in loaded
    assert not loaded & {"click", "pydantic", "yaml", "numpy", "ray", "torch", "mlflow", "matplotlib"}


def test_an_unknown_public_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"'trian'.*train"):
        _ = distgd.trian


def test_every_public_name_exists() -> None:
    for name in distgd.__all__:
        assert getattr(distgd, name) is not None
