"""What a person is told who gives bad input, and that nothing of it is left. The cases are in `bad_inputs.yaml`.

A case runs in this process, on the in-process cluster, unless it needs a place of its own (`WHERE`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from distgd.cli import main
from distgd.errors import DistgdError

LIST: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("bad_inputs.yaml").read_text(encoding="utf-8"))
WITH_JSON = {"train", "report", "compare", "config"}  # commands that take --json
COMMAND = [sys.executable, "-m", "distgd"]


@dataclass(frozen=True)
class Case:
    """One bad input; `bad_inputs.yaml` says what its keys mean."""

    name: str
    says: str
    exit: int = 2
    config: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    code: str = ""
    files: dict[str, str | None] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] = ("train", "run.yaml")
    script: str | None = None
    where: str = "here"
    frames: str = "own"

    def arguments(self) -> list[str]:
        return [*self.command, *self.overrides, *(["--json"] if self.command[:1][0] in WITH_JSON else [])]


@dataclass(frozen=True)
class Told:
    """How it ended, the message, and everything that a person saw on stderr."""

    exit: int
    message: str
    shown: str = ""


CASES = [Case(**case) for case in LIST["cases"]]


# The folder that a person stands in.


def merged(given: Any, changes: Any) -> Any:
    """`given` with `changes` put in key by key; ABSENT takes a key away."""
    if not isinstance(given, dict) or not isinstance(changes, dict):
        return changes
    whole = {**given, **{key: merged(given.get(key), value) for key, value in changes.items()}}
    return {key: value for key, value in whole.items() if value != "ABSENT"}


def furnish(case: Case, folder: Path) -> None:
    """Write run.yaml, mine.py and the case's own files."""
    good = copy.deepcopy(LIST["good"])
    text = yaml.safe_dump(merged(good["run.yaml"], case.config)) if case.text is None else case.text
    files = {"run.yaml": text, "mine.py": good["mine.py"] + case.code, **case.files}
    if case.script is not None:
        files["script.py"] = case.script
    for name, content in files.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content.encode("latin-1" if name.endswith(".bin") else "utf-8"))


def contents(folder: Path) -> set[str]:
    """Everything below, without Python's own cache and torch's."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return {str(path) for path in found if not any(re.match("__pycache__|torchinductor_", part) for part in path.parts)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of this test alone, with a name so short that Ray's sockets fit into it."""
    place = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    shutil.rmtree(place)


# Where a case runs.


def here(case: Case, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Told:
    """In this process."""
    if case.script is not None:
        sys.path.insert(0, str(Path.cwd()))  # as Python does for a script
        with pytest.raises(DistgdError) as caught:
            runpy.run_path("script.py", run_name="__main__")
        return Told(caught.value.exit_code, str(caught.value))
    code = main(case.arguments())
    out, err = capsys.readouterr()
    if code == 0:
        return Told(code, "\n".join(record.getMessage() for record in caplog.records), err)
    if "--json" not in case.arguments():
        return Told(code, err.removeprefix("distgd: ").rstrip(), err)
    said = json.loads(out)
    assert said["status"] == {1: "failed", 2: "bad_input", 3: "diverged"}[code]
    return Told(code, said["error"], err)


def process(case: Case, wrapper: list[str], **options: Any) -> Told:
    """In a process of its own, behind the words of a wrapper."""
    words = [*wrapper, *COMMAND, *case.arguments()]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100, **options)
    return Told(done.returncode, json.loads(done.stdout)["error"], done.stderr)


@cache
def can_mount() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "-m", "true"], check=False).returncode


def on_a_disk(case: Case, options: str, before: str = "true", blocks: int | None = None) -> Told:
    """With a small disk of its own at `disk`, which nobody else sees and which is gone with the process.

    Who may not mount one gets files of so many `blocks` at most.
    """
    Path("disk").mkdir()
    if not can_mount():
        if blocks is None:
            pytest.skip("needs to mount a disk: run it as root, where unshare is allowed")
        told = process(case, ["sh", "-c", f'ulimit -f {blocks} && exec "$@"', "sh"])
        shutil.rmtree("disk")
        return Told(told.exit, told.message.replace("File too large", "No space left on device"), told.shown)
    script = f'mount -t tmpfs -o {options} none disk && {before} && exec "$@"'
    told = process(case, ["unshare", "-m", "sh", "-c", script, "sh"])
    Path("disk").rmdir()  # fails where something was written beside the disk
    return told


def with_a_taken_port(case: Case, capsys: Any, caplog: Any) -> Told:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = tuple(port if word == "PORT" else word for word in case.command)
        told = here(Case(case.name, case.says, command=command), capsys, caplog)
        return Told(told.exit, told.message.replace(port, "PORT"), told.shown)


WHERE: dict[str, Callable[..., Told]] = {
    "here": here,
    "ray": here,
    "a taken port": with_a_taken_port,
    "a full disk": lambda case, *_: on_a_disk(case, "size=64k", "head -c 65536 /dev/zero > disk/full", 1),
    "a disk that fills up": lambda case, *_: on_a_disk(case, "size=64k", blocks=64),
    "a machine without room": lambda case, *_: process(case, ["sh", "-c", 'ulimit -f 0 && exec "$@"', "sh"]),
    "a read-only disk": lambda case, *_: on_a_disk(case, "ro"),
}


# What must hold.


def matches(says: str, message: str) -> bool:
    """Whether a message is what the list says: `...` is anything, and any white space is one space."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in says.split("..."))
    return re.fullmatch(pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*"), " ".join(message.split())) is not None


def marked(case: Case) -> Any:
    return pytest.param(case, id=case.name, marks=[pytest.mark.ray] if case.where == "ray" else [])


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_bad_input_is_told_well_and_leaves_nothing(
    case: Case, folder: Path, temporary: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    furnish(case, folder)
    before, children, threads = contents(folder), psutil.Process().children(), threading.active_count()
    told = WHERE[case.where](case, capsys, caplog)
    message = told.message.replace(f"{folder}/", "").replace(str(folder), "HERE")
    assert matches(case.says, message), message
    assert told.exit == case.exit
    assert "Traceback" not in told.shown + message
    frames = re.findall(r'^  File "([^"]+)"', told.message, re.MULTILINE)
    if case.frames == "own":
        assert all((folder / frame).is_relative_to(folder) for frame in frames), "frames of their own code alone"
    left = contents(folder) - before
    assert not left if case.exit == 2 else {Path(name).parts[0] for name in left} <= {"runs", "mlflow.db", "mlruns"}
    assert contents(temporary) == set()
    assert psutil.Process().children() == children
    assert threading.active_count() <= threads


def test_the_list_is_long_and_every_message_says_what_to_do() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 60
    usage = r"No such option|No such command|Missing argument|Invalid value"
    form = rf"expected .*found .*(;|an error in it)|File .* in |{usage}"
    assert [case.name for case in CASES if case.exit in (1, 2) and not re.search(form, case.says, re.DOTALL)] == []


def test_a_message_that_is_another_one_does_not_match() -> None:
    says = "batch.size: expected an integer ..., found 0; correct it"
    assert matches(says, "batch.size: expected an integer >= 1 or full, found 0;\n  correct it")
    assert not matches(says, "batch.size: expected an integer >= 1 or full, found 1; correct it")
    assert not matches(says, "batch.slots: expected an integer >= 1 or full, found 0; correct it")


# Ends that are nobody's mistake.


def started(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    furnish(Case("", ""), folder)
    return subprocess.Popen([*COMMAND, *arguments], text=True, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process_and_no_traceback(folder: Path, temporary: Path, number: int) -> None:
    words = ("train", "run.yaml", "stop.steps=1000000")
    run = started(folder, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("run: ") and run.stdout.readline().startswith("step 1/")
        run.send_signal(number)
        _, err = run.communicate(timeout=60)
    code, word = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (75, "SIGTERM")}[signal.Signals(number)]
    assert (run.returncode, "Traceback" in err) == (code, False)
    assert f"distgd: {word}; what was committed so far is in" in err
    assert "; --resume auto run.name=" in err
    assert contents(temporary) == set()


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "> /dev/full"])
def test_a_run_needs_no_terminal(folder: Path, streams: str) -> None:
    furnish(Case("", ""), folder)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *COMMAND, "train", "run.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_a_reader_that_goes_away_is_no_mistake(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with started(folder, "config", "schema", stdout=writer, stderr=subprocess.PIPE) as schema:
        _, err = schema.communicate(timeout=60)
    os.close(writer)
    assert (schema.returncode, err) == (1, "")


def test_a_folder_that_is_gone_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with contextlib.chdir(gone):
        gone.rmdir()
        assert main(["config", "schema"]) == 2
    assert "the current folder: expected a folder that is there, found one that was removed" in capsys.readouterr().err
