"""What README and docs print runs as it is printed, and comes to what the words beside it say.

A block that begins with a file's name is written to that file in an empty current folder. Blocks of distgd run in
process and without MLflow, one of them on Ray too. Lightning's, Transformers' and Ray Train's are only compiled.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

import distgd
from distgd.config import Config, load
from distgd.errors import BadInput

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"# (\S+\.(?:py|yaml))\n")
QUICK = ("cluster.backend=inprocess", "tracking.uri=none")

Train = Callable[..., distgd.Result]
State = dict[str, Tensor]


class Block(NamedTuple):
    language: str
    text: str

    @property
    def name(self) -> str | None:
        found = NAME.match(self.text)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def every(language: str) -> list[Any]:
    found = [(page, block) for page in PAGES for block in blocks(page) if block.language == language]
    return [pytest.param(block, id=f"{page.name}-{number}") for number, (page, block) in enumerate(found)]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Write a page's files into an empty current folder, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(page: str) -> None:
        for block in blocks(ROOT / page):
            if block.name:
                (tmp_path / block.name).write_text(block.text, encoding="utf-8")

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a worker has it; two make so small a model slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Train:
    """`distgd.train`, for scripts too, in process and without MLflow."""
    public = distgd.train

    def quick(config: Any, *overrides: str, **given: Any) -> distgd.Result:
        return public(config, *overrides, *QUICK, **given)

    monkeypatch.setattr(distgd, "train", quick)
    return quick


def state_of(scope: dict[str, Any]) -> State:
    state: State = scope["net"].state_dict()
    return state


def apart(one: State, other: State) -> float:
    """The norm of the difference, as a fraction of the norm."""
    flat = [torch.cat([tensor.double().flatten() for tensor in state.values()]) for state in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


# Everything that is printed.


@pytest.mark.parametrize("block", every("python"))
def test_python_compiles_under_warnings(block: Block) -> None:
    compile(block.text, "block", "exec")


@pytest.mark.parametrize("block", every("yaml"))
def test_keys_in_yaml_are_keys_of_a_config(block: Block) -> None:
    load({"task": "digits", "stop": {"steps": 1}, **yaml.safe_load(block.text)})


def test_keys_in_the_table_of_what_became_of_are_keys_of_a_config() -> None:
    table = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8").partition("## What became of")[2]
    right = "".join(line.split("|")[2] for line in table.splitlines() if line.startswith("|"))
    written = re.findall(r"`([a-z]+\.[a-z_.]+)(?:(?:: |=)([^`]+))?`", right)
    keys = {key: value for key, value in written if key.partition(".")[0] in Config.model_fields}
    assert len(keys) >= 12
    how = {"task": "digits", "stop": {"steps": 1}}
    for key, value in keys.items():
        if value:
            load(how, [f"{key}={value}"])
        else:  # a key that is there answers what it expects; one that is not, what it might be
            with pytest.raises(BadInput, match=rf"^{key}\S*: expected (?!a key of)"):
                load(how, [f"{key}=[[]]"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_and_headings_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


# README: your own task.


def test_arguments_names_and_class_mean_the_same(written: Callable[[str], None], train: Train) -> None:
    written("README.md")
    script = runpy.run_path("line.py")["run"]
    assert f"{script.metrics['eval/loss']:.4f}" == "0.0101"
    by_name = train("mine.yaml")
    by_path = train("mine.yaml", 'task={path: "line_task:Line", args: {samples: 1024}}')
    by_object = train("mine.yaml", task=runpy.run_path("line_task.py")["Line"](1024))
    assert {run.weights_sha256 for run in (script, by_name, by_path, by_object)} == {script.weights_sha256}
    model = torch.nn.Linear(1, 1)
    model.load_state_dict(script.state_dict)


@pytest.mark.ray
@pytest.mark.slow
def test_the_script_runs_on_ray_in_an_empty_folder(
    written: Callable[[str], None], train: Train, tmp_path: Path
) -> None:
    written("README.md")
    done = subprocess.run([sys.executable, "line.py"], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.0101")
    (end,) = (json.loads(path.read_text().splitlines()[-1]) for path in tmp_path.glob("runs/*/metrics.jsonl"))
    assert end["result"]["weights_sha256"] == train("mine.yaml").weights_sha256


# docs/coming-from.md.


def test_our_script_and_our_config_mean_the_same(written: Callable[[str], None], train: Train) -> None:
    written("docs/coming-from.md")
    script = runpy.run_path("ours.py")
    assert apart(script["result"].state_dict, state_of(script)) == 0.0
    assert train("mine.yaml").weights_sha256 == script["result"].weights_sha256


def loop(order: str | None) -> dict[str, Any]:
    """The plain loop, with its own batches or with those that `order` makes."""
    own = "batches = DataLoader(TensorDataset(*mine.train_data()), batch_size=32, shuffle=True)\n"
    text = Path("loop.py").read_text(encoding="utf-8")
    assert text.count(own) == text.count("range(10)") == 1
    if order is not None:
        text = text.replace(own, order).replace("range(10)", "range(1)")
    scope: dict[str, Any] = {}
    exec(compile(text, "loop.py", "exec"), scope)
    return scope


def test_the_loop_ends_near_ours_and_not_at_the_same_point(written: Callable[[str], None], train: Train) -> None:
    written("docs/coming-from.md")
    ours, theirs = train("mine.yaml"), loop(order=None)
    found = theirs["mine"].metrics(theirs["net"], theirs["mine"].eval_data())["accuracy"].mean().item()
    assert found == pytest.approx(ours.metrics["eval/accuracy"], abs=0.05)
    assert apart(ours.state_dict, state_of(theirs)) > 1e-2


@pytest.mark.parametrize(("double", "limit"), [(False, 1e-5), (True, 1e-12)], ids=["float32", "float64"])
def test_in_our_order_the_loop_and_ours_differ_by_rounding(
    written: Callable[[str], None], train: Train, double: bool, limit: float
) -> None:
    written("docs/coming-from.md")
    if double:
        shared = Path("mine.py").read_text(encoding="utf-8")
        shared = shared.replace("nn.Linear(32, 10))", "nn.Linear(32, 10)).double()").replace("float32", "float64")
        Path("mine.py").write_text(shared, encoding="utf-8")
    theirs = state_of(loop(Path("same_order.py").read_text(encoding="utf-8")))
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float64 if double else torch.float32}
    assert apart(train("mine.yaml").state_dict, theirs) < limit


def test_callbacks_the_best_weights_and_a_metric_over_the_whole_set(
    written: Callable[[str], None], train: Train
) -> None:
    written("docs/coming-from.md")
    result = runpy.run_path("watched.py")["result"]
    assert result.ended_by == "stopped: the training loss is small enough"
    events = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step" and e["metrics"]["train/loss"] < 0.02] == [result.steps]
    assert result.best["metrics"]["eval/auc"] == max(e["metrics"]["eval/auc"] for e in events if e["event"] == "eval")
    assert (Path(result.run_dir) / "best.safetensors").exists()


def test_tokens_count_the_same_in_whichever_slot(written: Callable[[str], None], train: Train) -> None:
    pytest.importorskip("transformers")
    written("docs/coming-from.md")
    names = {name: f"transformer:{name}" for name in ("model", "loss", "train_data")}
    how = {"task": names, "batch": {"size": 16, "slots": 4}, "stop": {"steps": 3}}
    assert train(how).status == "completed"
    shared = runpy.run_path("transformer.py")
    model, data = shared["model"]().eval(), shared["train_data"]()
    with torch.no_grad():
        whole, tokens = shared["loss"](model, data)
        parts = [shared["loss"](model, {k: v[rows] for k, v in data.items()}) for rows in (slice(3), slice(3, None))]
    assert sum(weight for _, weight in parts) == tokens
    assert float(sum(mean * weight for mean, weight in parts) / tokens) == pytest.approx(float(whole), rel=1e-5)


# docs/trackers.md.


def test_tensorboard_shows_every_number(written: Callable[[str], None], train: Train) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written("docs/trackers.md")
    result = train({"task": "digits", "stop": {"steps": 20}}, "tracking.also=[board:TensorBoard]")
    lines = (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()
    expected = {
        (name, event["step"]): value
        for event in map(json.loads, lines)
        if event["event"] in ("step", "eval")
        for name, value in event["metrics"].items()
    }
    board = EventAccumulator(str(Path(result.run_dir) / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {(name, point.step): point.value for name in board.Tags()["scalars"] for point in board.Scalars(name)}
    assert found == pytest.approx(expected, rel=1e-6)  # it keeps float32
    assert {"config/text_summary", "status/text_summary"} <= set(board.Tags()["tensors"])
