"""The command line: what it prints where, and the exit code of every end."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import distgd.cli
from distgd.cli import main
from distgd.config import json_schema, load, schema_rows
from distgd.errors import BadInput, Diverged, Interrupted, RunFailed

ROOT = Path(__file__).parent.parent
COUNTING = str(ROOT / "configs" / "counting.yaml")
IN_PROCESS = ["cluster.backend=inprocess"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)


def raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train(*_: object) -> None:
        raise error

    monkeypatch.setattr(distgd.cli, "_train", train)


def last_object(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


# Looking.


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from distgd.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'ray', 'mlflow', 'pydantic', 'rich', 'numpy'} & sys.modules.keys();"
        "print(heavy, file=sys.stderr) if heavy else None; sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("train", "config", "ui", "--version"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"distgd {importlib.metadata.version('distgd')}\n"


def test_config_show_is_a_config_with_everything_filled_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert main(["config", "show", COUNTING, "batch.slots=2"]) == 0
    shown = load(yaml.safe_load(capsys.readouterr().out))
    assert shown == load(COUNTING, ["batch.slots=2", "tracking.experiment=mine"])


def test_config_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", COUNTING, "--json"]) == 0
    assert load(last_object(capsys.readouterr().out)) == load(COUNTING)


def test_config_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    text = capsys.readouterr().out
    assert all(f"{row.key}: {row.type}" in text for row in schema_rows())
    assert main(["config", "schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


# Ends. The code, one line for a person on stderr, and one JSON object on stdout when asked.


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (BadInput("batch.size: no"), 2, "bad_input"),
        (RunFailed("a server is gone"), 1, "failed"),
        (Diverged("step 3, slot 1: the loss is nan"), 3, "diverged"),
        (Interrupted("stopped by Ctrl-C"), 130, "interrupted"),
    ],
)
def test_exit_codes_of_our_errors(
    error: BadInput, code: int, status: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raises(monkeypatch, error)
    assert main(["train", COUNTING]) == code
    plain = capsys.readouterr()
    assert (plain.out, plain.err) == ("", f"distgd: {error}\n")
    assert main(["train", COUNTING, "--json"]) == code
    asked = capsys.readouterr()
    assert asked.err == f"distgd: {error}\n"
    assert json.loads(asked.out) == {"status": status, "error": str(error)}


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    raises(monkeypatch, KeyboardInterrupt())
    assert main(["train", COUNTING, "--json"]) == 130
    assert last_object(capsys.readouterr().out)["status"] == "interrupted"


def test_a_mistake_of_ours_shows_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raises(monkeypatch, ZeroDivisionError("by zero"))
    assert main(["train", COUNTING, "--json"]) == 1
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert json.loads(shown.out) == {"status": "failed", "error": "ZeroDivisionError: by zero"}


@pytest.mark.parametrize("arguments", [["train"], ["train", COUNTING, "--no-such"], ["tarin"], ["ui", "--port", "0"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().out == ""
    assert main([*arguments, "--json"]) == 2
    assert last_object(capsys.readouterr().out)["status"] == "bad_input"


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["config", "show"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([COUNTING, "batch.slot=4"], "did you mean batch.slots?"),
        ([COUNTING, "batch.size=0"], "batch.size: expected an integer >= 1 or full, found 0"),
        ([COUNTING, "configs/more.yaml"], "expected section.key=value"),
        (["none.yaml"], "expected a config file"),
    ],
)
def test_bad_input_is_told_without_a_traceback(
    command: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*command, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("distgd: ") and message in shown.err and "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == [], "bad input leaves nothing behind"


# Which MLflow store `ui` opens.


@pytest.mark.parametrize("run", ["runs/mine", "mine"])
def test_ui_of_a_run_reads_its_config(run: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    settings = load(COUNTING, ["tracking.uri=http://its-own"])
    (folder / "config.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    assert main(["ui", run]) == 2, "a store with a server is not served again"
    assert "http://its-own" in capsys.readouterr().err


def test_ui_without_a_run_takes_the_environment_and_then_the_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["ui"]) == 2
    assert "sqlite:///mlflow.db" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://of-all")
    assert main(["ui"]) == 2
    assert "http://of-all" in capsys.readouterr().err


def test_ui_of_no_run_and_of_a_run_without_mlflow(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ui", "nowhere"]) == 2
    assert "expected a run folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(load(COUNTING).to_yaml(), encoding="utf-8")
    assert main(["ui", "."]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


# Training, in process.


def test_train_prints_where_to_look(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", COUNTING, *IN_PROCESS]) == 0
    out = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("counting-")
    assert f"{folder.name}/metrics.jsonl" in out and f"{folder.name}/model.safetensors" in out
    assert "distgd ui" not in out, "counting.yaml turns MLflow off"
    assert "completed: 12 steps, 192 samples" in out


def test_train_with_json_keeps_stdout_for_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", COUNTING, "--json", *IN_PROCESS]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert (result["status"], result["steps"], result["samples"]) == ("completed", 12, 192)
    assert "completed" in shown.err


def test_audit_counts_a_run_and_fails_where_a_sample_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", COUNTING, *IN_PROCESS]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    capsys.readouterr()
    assert main(["audit", folder.name]) == 0
    shown = capsys.readouterr().out
    assert "the run went through 12 steps" in shown and "no sample was counted twice or lost" in shown
    assert "bits promised\n" in shown
    ledger = folder / "ledger.jsonl"
    lines = ledger.read_text(encoding="utf-8").splitlines(keepends=True)
    ledger.write_text("".join(lines[:3] + lines[4:]), encoding="utf-8")
    assert main(["audit", str(folder), "--json"]) == 1
    found = last_object(capsys.readouterr().out)
    assert (found["status"], sum(epoch["lost"] for epoch in found["epochs"]) > 0) == ("failed", True)
    mark = {"state": "bits", "bits": "not promised", "step": 3, "why": "worker 1: on another machine"}
    ledger.write_text("".join([*lines, json.dumps(mark) + "\n"]), encoding="utf-8")
    assert main(["audit", str(folder)]) == 0
    assert "bits not promised: worker 1: on another machine\n" in capsys.readouterr().out


def test_dry_run_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", COUNTING, "--dry-run"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["train", COUNTING, "--dry-run", "--json"]) == 0
    found = last_object(capsys.readouterr().out)
    assert found["predicted"]["step_s"] > 0 and found["predicted"]["bytes_node"]["total"] > 0
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_3_and_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["task=quadratic", "optimizer.lr=1e30", "stop.epochs=null", "stop.steps=50", "batch.size=4"]
    assert main(["train", COUNTING, "--json", *overrides, *IN_PROCESS]) == 3
    shown = capsys.readouterr()
    assert last_object(shown.out)["status"] == "diverged"
    assert "step" in shown.err and "Traceback" not in shown.err


def test_a_metric_that_is_no_number_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from distgd.cli import _show_result

    result = {"run_dir": str(tmp_path), "status": "completed", "steps": 1, "samples": 2, "wall_s": 0.5}
    _show_result({**result, "metrics": {"eval/auc": "NaN", "eval/loss": "Infinity"}, "mlflow_run_id": None})
    shown = capsys.readouterr().out
    assert "eval/auc             nan" in shown and "eval/loss            inf" in shown
