"""The scripts set a fresh machine up once, keep what is there, and get out of the way.

What would download gigabytes is a stand-in here: a `python` on the PATH that writes down what it is asked for. The rest
(scripts, lock, stamp) is real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ["bash", "cat", "chmod", "cp", "cut", "dirname", "flock", "grep", "mkdir", "readlink", "rm", "sed", "sha256sum"]

PYTHON = """#!/usr/bin/env bash
case "$1 ${2-}" in
    "-c "*) exit "$UNUSABLE" ;;
    "- "*) echo "$TORCH" ;;
    "--version "*) echo "Python 3.11.0" ;;
    "-m venv") echo "$*" >>"$CALLS"
        dir="${@: -1}"; mkdir -p "$dir/bin"; cp "$0" "$dir/bin/python"
        printf '#!/usr/bin/env bash\\necho "distgd $* in $PWD" >>"$CALLS"\\n' >"$dir/bin/distgd"
        chmod +x "$dir/bin/distgd" ;;
    "-m pip") [[ "$3" == --version ]] || { echo "$*" >>"$CALLS"; exit "$OFFLINE"; } ;;
esac
"""


class Machine:
    """A copy of the scripts on a PATH that holds nothing but TOOLS and the python above."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls = folder / "a copy", folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.calls.touch()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        (self.bin / "python3").write_text(PYTHON)
        (self.bin / "python3").chmod(0o755)
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "distgd").mkdir()
        for name in ("pyproject.toml", "constraints.txt", "distgd/__init__.py"):
            shutil.copy(ROOT / name, self.root / name)
        self.environment = {
            "PATH": str(self.bin), "CALLS": str(self.calls), "TORCH": "", "UNUSABLE": "0", "OFFLINE": "0",
        }  # fmt: skip

    def start(self, script: str, *arguments: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "scripts" / script), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=self.environment | more,
        )  # fmt: skip

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **more: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, cwd=cwd, **more)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def asked(self) -> list[str]:
        """What was asked of python since the last time."""
        lines = self.calls.read_text().splitlines()
        self.calls.write_text("")
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_train_sets_up_once_and_runs_in_the_current_folder(machine: Machine, tmp_path: Path) -> None:
    code, out, err = machine.run("train", "mine.yaml", "run.seed=1", cwd=tmp_path)
    assert (code, out) == (0, "")
    assert "set-up: done" in err
    venv, torch, rest, ran = machine.asked()
    assert "--system-site-packages" not in venv
    assert " torch==" in torch
    assert rest.endswith(f"-e {machine.root}")
    assert ran == f"distgd train mine.yaml run.seed=1 in {tmp_path}"

    assert machine.run("train", "mine.yaml", cwd=tmp_path) == (0, "", "")
    assert machine.asked() == [f"distgd train mine.yaml in {tmp_path}"]


def test_train_without_a_config_says_how(machine: Machine) -> None:
    code, out, err = machine.run("train")
    assert (code, out) == (2, "")
    assert err.startswith("usage: scripts/train CONFIG")
    assert machine.asked() == []


def test_a_torch_that_is_there_is_kept(machine: Machine) -> None:
    assert machine.run("setup", "dev", TORCH="2.12.0+cu130")[0] == 0
    venv, rest = machine.asked()
    assert "--system-site-packages" in venv
    assert rest.endswith("[dev]")
    assert "torch==2.12.0+cu130\n" in (machine.root / ".venv/constraints.txt").read_text()


def test_what_is_set_up_for_the_tests_is_enough_to_train_but_not_the_other_way_round(machine: Machine) -> None:
    for extra, installs in (("train", True), ("dev", True), ("train", False), ("dev", False)):
        assert machine.run("setup", extra)[0] == 0
        assert bool(machine.asked()) == installs


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed(machine: Machine, name: str) -> None:
    machine.run("setup", "dev")
    machine.asked()
    (machine.root / name).write_text((machine.root / name).read_text() + "# changed\n")
    assert machine.run("setup", "dev")[0] == 0
    assert len(machine.asked()) == 2


def test_two_at_a_time_set_up_once(machine: Machine) -> None:
    both = [machine.start("setup", "dev") for _ in range(2)]
    for process in both:
        process.communicate(timeout=60)
    assert [process.returncode for process in both] == [0, 0]
    assert len(machine.asked()) == 3


def test_a_set_up_that_failed_says_what_to_do_and_goes_on_the_next_time(machine: Machine) -> None:
    code, out, err = machine.run("train", "mine.yaml", OFFLINE="1")
    assert (code, out) == (1, "")
    assert "Check the network" in err
    assert len(machine.asked()) == 2
    assert machine.run("train", "mine.yaml")[0] == 0
    assert [line.split()[1] for line in machine.asked()] == ["pip", "pip", "train"]


def test_no_python_that_is_new_enough(machine: Machine) -> None:
    code, _, err = machine.run("test", UNUSABLE="1")
    assert code == 1
    assert "no Python >= 3.11" in err
    assert "apt install" in err
    assert machine.asked() == []


APT = """#!/usr/bin/env bash
echo "apt-get $*" >>"$CALLS"
[[ "$*" != *install* ]] || cp "$0" "${0%/*}/chromium"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may install")
def test_a_browser_is_installed_for_the_tests_where_there_is_none(machine: Machine) -> None:
    (machine.bin / "apt-get").write_text(APT)
    (machine.bin / "apt-get").chmod(0o755)
    machine.run("setup", "train")
    assert not any(call.startswith("apt-get") for call in machine.asked()), "a run needs no browser"
    machine.run("setup", "dev")
    update, install = (call for call in machine.asked() if call.startswith("apt-get"))
    assert update.endswith(" update") and install.endswith(" chromium")
    shutil.rmtree(machine.root / ".venv")
    code, _, err = machine.run("setup", "dev")
    assert code == 0 and "warning" not in err
    assert not any(call.startswith("apt-get") for call in machine.asked()), "it is there already"


@pytest.mark.parametrize("apt", [None, "#!/usr/bin/env bash\nexit 100\n"])
def test_without_a_browser_and_a_way_to_install_one_the_set_up_warns_and_is_done(
    machine: Machine, apt: str | None
) -> None:
    if apt:
        (machine.bin / "apt-get").write_text(apt)
        (machine.bin / "apt-get").chmod(0o755)
    code, _, err = machine.run("setup", "dev")
    assert code == 0
    assert "apt install chromium" in err and "set-up: done" in err
    assert machine.run("setup", "dev") == (0, "", ""), "and says so once"
