"""Variants are what was asked for, run as single runs would, and end as rows of one table, whatever becomes of them."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import distgd
from distgd.cli import main
from distgd.compare import Compared, Variant, plan_comparison, run_comparison
from distgd.compare.outcome import outcome
from distgd.compare.variants import target, variants
from distgd.config import Target, load
from distgd.errors import BadInput, Interrupted
from distgd.trainer import Watch

ROOT = Path(__file__).parent.parent
COUNTING = str(ROOT / "configs" / "counting.yaml")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sections(**more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "task": "digits",
        "tracking": {"uri": "none"},
        "stop": {"epochs": 2},
        "batch": {"size": 64, "slots": 4},
        "optimizer": {"name": "adam", "lr": 0.003},
        "cluster": {"backend": "inprocess"},
    }
    for name, section in more.items():
        given[name] = {**given.get(name, {}), **section}
    return given


@contextmanager
def quietly(variant: Variant) -> Iterator[Watch]:
    yield lambda event: None


def compare(given: dict[str, Any], **what: Any) -> Compared:
    return run_comparison(plan_comparison(given, **what), quietly)


def rows(compared: Compared) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = compared.as_dict()["rows"]
    return found


# What is compared.


def overrides(modes: str | None, *settings: str) -> list[tuple[str, ...]]:
    return [variant.overrides for variant in variants(modes, settings)]


def test_several_keys_give_every_combination() -> None:
    found = variants("sync,async", ["optimizer.lr=0.1,1e-2", "batch.size=full,8"])
    assert len(found) == len({variant.name for variant in found}) == 8
    assert [variant.label for variant in found][:3] == [
        "sync lr=0.1 size=full",
        "sync lr=0.1 size=8",
        "sync lr=0.01 size=full",
    ]
    assert load(sections(), found[2].overrides).optimizer.lr == 0.01


def test_values_are_yaml() -> None:
    settings = ["optimizer.betas=[0.9, 0.99],[0.8, 0.9]", "eval.every={steps: 5},{epochs: 1}", "stop.steps=null"]
    found = [load(sections(), variant.overrides) for variant in variants(None, settings)]
    assert [config.optimizer.arguments["betas"][0] for config in found] == [0.9, 0.9, 0.8, 0.8]
    assert [config.eval.every.steps for config in found] == [5, None, 5, None]


@pytest.mark.parametrize("own", ["sync", "bounded", "async"])
def test_a_mode_leaves_out_what_only_another_one_has(own: str) -> None:
    """Whatever mode the config has, with all that it may say there, every mode can be its variant."""
    keys = {"sync": {"quorum": 3}, "bounded": {"staleness": 4, "scale_lr": True}, "async": {"scale_lr": True}}
    given = sections(consistency={"mode": own, **keys[own]})
    modes = [load(given, each).consistency for each in overrides("sync,bounded,async")]
    assert [mode.mode for mode in modes] == ["sync", "bounded", "async"]
    (kept,) = [mode for mode in modes if mode.mode == own]
    assert kept == load(given).consistency, "its own mode is as it was"


def test_keys_that_end_alike_are_told_apart() -> None:
    (variant,) = variants(None, ["optimizer.name=sgd", "schedule.name=step"])
    assert variant.label == "optimizer.name=sgd schedule.name=step"


def test_folder_names_are_names_that_a_run_may_have_and_differ() -> None:
    paths = ["data.path=" + ",".join(["'/a/b'", "'/a?b'", "''", "'..'", f"'{'x' * 300}'", f"'{'x' * 301}'"])]
    found = variants(None, paths)
    assert len({variant.name for variant in found}) == 6
    for variant in found:
        assert load(sections(run={"name": variant.name})).run.name == variant.name
        assert len(variant.name) < 100
    (same,) = variants(None, ["a.b=report"])
    assert same.name != "report"
    assert [variant.name for variant in variants("report,sync", [])] == ["values", "sync"], "the page's own folder"


@pytest.mark.parametrize(
    ("modes", "settings", "message"),
    [
        (None, [], "expected --modes or --set"),
        ("", [], "--modes consistency.mode: expected one value or more"),
        ("sync,sync", [], "expected different values, found 'sync'"),
        ("sync", ["consistency.mode=async"], "expected each key once"),
        (None, ["optimizer.lr"], "--set: expected section.key=value,value, found 'optimizer.lr'"),
        (None, ["optimizer.lr=[1"], "--set optimizer.lr"),
        (None, ["run.name=a,b"], "expected a key other than those of run.name, run.storage, tracking"),
        (None, ["tracking.uri=a,b"], "expected a key other than those of"),
    ],
)
def test_bad_axes(modes: str | None, settings: Sequence[str], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        variants(modes, settings)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"modes": "sync,synk"}, "variant synk: consistency.mode: expected one of"),
        ({"settings": ["optimizer.lr=0.1,-1"]}, "variant lr=-1: optimizer.lr"),
        ({"settings": ["optimiser.lr=0.1"]}, "variant lr=0.1: optimiser: expected a section"),
        ({"settings": ["batch.size=32,100000"]}, "variant size=100000: batch.size: expected at most the 1437 samples"),
        (
            {"settings": ["consistency.staleness=1,2"], "modes": "sync"},
            "variant sync staleness=1: consistency.staleness",
        ),
        ({"modes": "sync", "target": "eval/acc>=0.9"}, "expected one of eval/accuracy, eval/loss, found 'eval/acc'"),
        ({"modes": "sync", "target": "accuracy>=0.9"}, "--target: expected METRIC>=NUMBER"),
        ({"modes": "sync", "target": "eval/loss<=few"}, "--target: expected METRIC>=NUMBER"),
        ({"modes": "sync", "target": "eval/loss<=.nan"}, "--target: expected METRIC>=NUMBER"),
    ],
)
def test_bad_variants_are_found_before_anything_is_started(tmp_path: Path, what: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        plan_comparison(sections(), **what)
    assert not list(tmp_path.iterdir())


# What becomes of them.


def test_a_variant_is_the_run_that_it_would_be_alone(tmp_path: Path) -> None:
    compared = compare(sections(), modes="sync,async", settings=["optimizer.lr=0.003,0.001"], name="mine")
    alone = distgd.train(sections(), "optimizer.lr=0.001", "run.storage=alone")
    assert rows(compared)[1]["weights_sha256"] == alone.weights_sha256
    assert compared.folder.parent == tmp_path / "runs" and compared.folder.name.startswith("mine-compare-")
    names = {path.name for path in compared.folder.iterdir()}
    assert names == {"sync-lr-0.003", "sync-lr-0.001", "async-lr-0.003", "async-lr-0.001", "report"}
    assert (compared.folder / "sync-lr-0.003" / "report" / "index.html").exists()


def test_the_table_is_printed_written_and_on_the_page() -> None:
    compared = compare(sections(), modes="sync,bounded", target="eval/accuracy>=0.5")
    written = json.loads((compared.folder / "report" / "comparison.json").read_text())
    assert written["rows"] == json.loads(json.dumps(rows(compared)))
    html = compared.page.read_text(encoding="utf-8")
    for row in compared.table.rows:
        assert all(f">{cell}<" in html for cell in row)
    assert [row[0] for row in compared.table.rows] == ["sync", "bounded"]
    assert {"eval/loss", "eval/accuracy", "steps to target"} <= set(compared.table.columns)
    assert html.count("data:image/png") == 2 == len(list((compared.folder / "report").glob("*.png")))


def test_one_that_diverges_is_a_row_and_the_others_go_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps(sections()))
    given = [
        "compare",
        "mine.yaml",
        "--set",
        "optimizer.lr=1e35,0.003",
        "optimizer.name=sgd",
        "run.name=here",
        "--json",
    ]
    assert main(given) == 1
    shown = capsys.readouterr()
    said = json.loads(shown.out)
    assert [row["status"] for row in said["rows"]] == ["diverged", "completed"]
    assert (said["status"], said["variants"], said["failed"]) == ("failed", 2, 1)
    assert "step" in said["rows"][0]["message"] and said["rows"][0]["message"] in shown.err
    page = Path(said["report"]).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "What went wrong" in page and "1 of 2 failed" in page


def test_the_command_prints_the_table_and_where_the_page_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", COUNTING, "--modes", "sync,async", "cluster.backend=inprocess", "run.name=here"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^sync +completed +12 +192 ", out, re.M) and re.search(r"^async +completed +12 +192 ", out, re.M)
    assert "2 of 2: async" in out and f"{Path('runs/here/report/index.html').absolute()}" in out


def test_a_folder_with_files_in_it_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "here").mkdir(parents=True)
    (tmp_path / "runs" / "here" / "precious").write_text("x")
    assert main(["compare", COUNTING, "--modes", "sync", "cluster.backend=inprocess", "run.name=here"]) == 2
    assert "choose another with run.name=" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_comparison_and_the_page_says_how_far_it_came(tmp_path: Path, number: int) -> None:
    @contextmanager
    def begin(variant: Variant) -> Iterator[Watch]:
        wanted = variant.label == "bounded"
        yield lambda event: os.kill(os.getpid(), number) if wanted and event.get("step") == 3 else None

    handler = signal.getsignal(number)
    given = sections(run={"name": "here"})
    with pytest.raises(Interrupted):
        run_comparison(plan_comparison(given, modes="sync,bounded,async"), begin)
    folder = tmp_path / "runs" / "here"
    written = json.loads((folder / "report" / "comparison.json").read_text())
    ended = {signal.SIGINT: "interrupted", signal.SIGTERM: "preempted"}[signal.Signals(number)]
    assert [row["status"] for row in written["rows"]] == ["completed", ended]
    assert "Not run yet: async" in (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert not (folder / "async").exists()
    assert signal.getsignal(number) == handler


# Time to target.


def events(folder: Path, *given: tuple[str, int, int, dict[str, Any]]) -> dict[str, Any]:
    lines = [
        {"event": kind, "step": step, "samples": samples, "seconds": samples / 10, "metrics": metrics}
        for kind, step, samples, metrics in given
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"run_dir": str(folder), "status": "completed"}


def test_the_target_counts_at_the_step_that_was_evaluated(tmp_path: Path) -> None:
    """The evaluation of step 1 is known when 3 steps of 8 samples are done."""
    steps = [("step", at, 8 * at, {"train/loss": 0.0}) for at in (1, 2, 3)]
    late = [("eval", 1, 24, {"eval/loss": 0.5}), ("step", 4, 32, {}), ("eval", 4, 32, {"eval/loss": 0.1})]
    result = events(tmp_path, *steps, *late)
    (variant,) = variants("sync", [])
    reached = outcome(variant, None, result, Target(metric="eval/loss", at_most=0.5)).reached
    assert reached is not None and (reached.step, reached.samples, reached.seconds) == (1, 8, 2.4)
    assert outcome(variant, None, result, Target(metric="eval/loss", at_most=0.05)).reached is None
    assert outcome(variant, None, result, None).reached is None


def test_a_value_that_is_not_a_number_reaches_nothing() -> None:
    for limit in ({"at_least": -1e9}, {"at_most": 1e9}):
        assert not Target(metric="eval/loss", **limit).met_by(float("nan"))
        assert Target(metric="eval/loss", **limit).met_by(0.0)


def test_targets_are_read_as_they_are_written() -> None:
    assert target("eval/accuracy>=0.95") == Target(metric="eval/accuracy", at_least=0.95)
    assert target(" eval/loss <= 1e-3 ") == Target(metric="eval/loss", at_most=0.001)
    assert target(None) is None


def test_the_configs_own_target_counts_where_none_is_given() -> None:
    own = sections(stop={"target": {"metric": "eval/accuracy", "at_least": 0.3}})
    assert plan_comparison(own, modes="sync").target == Target(metric="eval/accuracy", at_least=0.3)
    given = plan_comparison(own, modes="sync", target="eval/loss<=1")
    assert given.target == Target(metric="eval/loss", at_most=1.0)
    assert given.first.stop.target == Target(metric="eval/accuracy", at_least=0.3), "when a run ends is the config's"


# MLflow.


def mlflow_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW")}


@pytest.mark.filterwarnings("ignore")  # MLflow's own, on import
def test_variants_are_children_of_one_parent_run(tmp_path: Path) -> None:
    import mlflow

    settings, uri = mlflow_settings(), f"sqlite:///{tmp_path}/store/mlflow.db"
    given = sections(tracking={"uri": uri, "experiment": "ours"}, run={"name": "here"}, stop={"epochs": 1})
    compared = compare(given, modes="sync,async")
    client = mlflow.MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    (parent,) = [run for run in found if run.info.run_id == compared.mlflow_run_id]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(found) == 3 and {run.info.run_name for run in children} == {"sync", "async"}
    assert {run.info.status for run in found} == {"FINISHED"}
    assert parent.info.run_name == "here" and parent.data.params["consistency.mode"] == "sync, async"
    assert (parent.data.tags["result.variants"], parent.data.tags["result.failed"]) == ("2", "0")
    logged = {file.path for file in client.list_artifacts(parent.info.run_id, "report")}
    assert {"report/index.html", "report/comparison.json", "report/eval-accuracy.png"} <= logged
    assert mlflow.active_run() is None and mlflow_settings() == settings


@pytest.mark.filterwarnings("ignore")
def test_mlflow_out_of_reach_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    given = sections(tracking={"uri": "http://127.0.0.1:1"}, stop={"epochs": 1})
    compared = compare(given, modes="sync")
    assert compared.mlflow_run_id is None and compared.outcomes[0].good
    assert any("the parent run could not be written" in record.getMessage() for record in caplog.records)


@pytest.mark.filterwarnings("ignore")
def test_a_parent_run_of_a_comparison_that_failed_says_so(tmp_path: Path) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    given = sections(tracking={"uri": uri}, optimizer={"name": "sgd", "lr": 1e35}, stop={"epochs": 1})
    compared = compare(given, modes="sync")
    assert mlflow.MlflowClient(uri).get_run(compared.mlflow_run_id).info.status == "FAILED"


# Ray.


@pytest.mark.ray
@pytest.mark.slow
def test_ray_is_started_once_and_ended() -> None:
    import ray

    seen = []

    @contextmanager
    def begin(variant: Variant) -> Iterator[Watch]:
        seen.append(ray.get_runtime_context().gcs_address)
        yield lambda event: None

    given = sections(cluster={"backend": "ray"}, stop={"epochs": 1})
    compared = run_comparison(plan_comparison(given, modes="sync,async", settings=["cluster.workers=1,3"]), begin)
    assert all(each.good for each in compared.outcomes), [str(each.error) for each in compared.outcomes]
    assert len(seen) == 4 and len(set(seen)) == 1
    assert not ray.is_initialized()
    first, second = rows(compared)[:2]
    assert first["weights_sha256"] == second["weights_sha256"], "sync: the same bits for 1 and 3 workers"


def test_where_nothing_is_evaluated_the_training_loss_is_compared(tmp_path: Path) -> None:
    (variant,) = variants("sync", [])
    result = {"status": "completed", "metrics": {"train/loss": 0.25, "lr": 0.1}}
    assert outcome(variant, None, result, None).evaluated == {"train/loss": 0.25}
    result["metrics"] |= {"eval/loss": 0.5}
    assert outcome(variant, None, result, None).evaluated == {"eval/loss": 0.5}
