"""The config: what loads, what is refused and how that is said, and that what is written down is read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distgd.config import Config, Every, Feature, TargetColumn, docs_markdown, json_schema, load, schema_rows
from distgd.errors import BadInput

ROOT = Path(__file__).parent.parent
SMALL = {"task": "digits", "stop": {"epochs": 1}}


def complaint(*overrides: str, **sections: Any) -> str:
    with pytest.raises(BadInput) as caught:
        load({**SMALL, **sections}, overrides)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# What loads.


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_fix_what_decides_the_bits(path: Path) -> None:
    config = load(path)
    assert config.batch.slots is not None
    assert config.cluster.address is None and config.data.path is None


def test_file_gives_way_to_overrides_and_defaults_to_both(tmp_path: Path) -> None:
    path = written(tmp_path, "task: digits\nstop: {epochs: 3}\nbatch: {size: 8, slots: 2}\n")
    config = load(path, ["batch.size=16", "batch.size=64"])
    assert (config.batch.size, config.batch.slots, config.stop.epochs, config.cluster.workers.max) == (64, 2, 3, 2)


def test_overrides_reach_below_the_short_form_of_task() -> None:
    config = load({"task": "counting", "stop": {"epochs": 1}}, ["task.args.samples=64"])
    assert (config.task.name, config.task.args) == ("counting", {"samples": 64})


def test_overrides_reach_below_the_short_forms_of_data() -> None:
    data = {"target": "income", "features": {"age": "numeric", "*": "auto"}}
    overrides = ["data.target.trim=.", "data.features.age.clip=5", "data.features.id=drop"]
    config = load({**SMALL, "data": data}, overrides).data
    assert config.target == TargetColumn(column="income", trim=".")
    assert config.feature("age") == Feature(kind="numeric", clip=5)
    assert (config.feature("id"), config.feature("job")) == (Feature(kind="drop"), Feature())


def test_override_of_an_every_takes_the_place_of_the_old_one() -> None:
    assert load({**SMALL, "eval": {"every": {"epochs": 2}}}, ["eval.every.steps=5"]).eval.every == Every(steps=5)


def test_a_loaded_config_can_be_overridden_again() -> None:
    config = load(SMALL, ["consistency.mode=bounded", "tracking.every.steps=3"])
    assert load(config) == config
    assert load(config, ["batch.size=full"]).batch.size == "full"


def test_the_source_is_left_as_it_was() -> None:
    source: dict[str, Any] = {"task": "digits", "stop": {"epochs": 1}}
    load(source, ["stop.epochs=2", "task.args.x=1"], {"RAY_ADDRESS": "auto"})
    assert source == SMALL


def test_environment_counts_where_the_config_is_silent() -> None:
    environ = {"RAY_ADDRESS": "host:1", "MLFLOW_TRACKING_URI": "http://m", "MLFLOW_EXPERIMENT_NAME": "e"}
    silent = load(SMALL, (), environ)
    assert (silent.cluster.address, silent.tracking.uri, silent.tracking.experiment) == ("host:1", "http://m", "e")
    spoken = load({**SMALL, "cluster": {"address": None}}, ["tracking.uri=none"], environ)
    assert (spoken.cluster.address, spoken.tracking.uri, spoken.tracking.experiment) == (None, "none", "e")
    assert load(SMALL, ["cluster.backend=inprocess"], environ).cluster.address is None
    assert load(SMALL, (), {"RAY_ADDRESS": ""}).cluster.address is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("3", 3.0), ("+2.", 2.0), ("0x10", 16.0), ("010", 10.0)],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: float) -> None:
    assert load(SMALL, [f"optimizer.lr={text}"]).optimizer.lr == value


@pytest.mark.parametrize("text", ["no", "on", "12:30", "2024-01-01", "1_000", "=", "sqlite:///a.db"])
def test_what_yaml_1_1_reads_as_something_else_is_text(text: str) -> None:
    assert load(SMALL, [f"tracking.experiment={text}"]).tracking.experiment == text


def test_optimizer_and_groups_keep_what_they_do_not_know() -> None:
    config = load(SMALL, ["optimizer.betas=[0.9, 0.95]", "optimizer.groups=[{match: '*.bias', lr: 0.5}]"])
    assert config.optimizer.arguments == {"betas": [0.9, 0.95]}
    assert [(group.match, group.arguments) for group in config.optimizer.groups] == [("*.bias", {"lr": 0.5})]


def test_bounded_has_a_staleness_and_the_others_have_none() -> None:
    assert load(SMALL, ["consistency.mode=bounded"]).consistency.staleness == 2
    assert load(SMALL, ["consistency.mode=bounded", "consistency.staleness=0"]).consistency.staleness == 0
    assert load(SMALL).consistency.staleness is None


@pytest.mark.parametrize(
    ("overrides", "device", "seconds"),
    [
        ([], "cpu", 90.0),
        (["cluster.gpus=0.5", "cluster.address=auto"], "cuda", 600.0),
        (["cluster.device=cpu", "cluster.gpus=1", "cluster.start_timeout=7"], "cpu", 7.0),
    ],
)
def test_what_the_cluster_resolves(overrides: list[str], device: str, seconds: float) -> None:
    cluster = load(SMALL, overrides).cluster
    assert (cluster.compute_device, cluster.start_seconds) == (device, seconds)


def test_a_config_is_frozen() -> None:
    config = load(SMALL)
    with pytest.raises(pydantic.ValidationError):
        config.batch.size = 3


# What is refused. A message names the key, what is allowed, and what was found.

BAD: list[tuple[list[str], list[str]]] = [
    (["batch.size=0"], ["batch.size: expected an integer >= 1 or full, found 0"]),
    (["batch.size=half"], ["batch.size: expected an integer >= 1 or full, found 'half'"]),
    (["batch.size=1.5"], ["batch.size", "found 1.5"]),
    (["batch.size=true"], ["batch.size", "found true"]),
    (["batch.size='4'"], ["batch.size", "found '4'"]),
    (["batch.slots=33"], ["batch.slots", "at most batch.size=32", "found 33"]),
    (["batch.slot=4"], ["batch.slot:", "size, slots", "4", "did you mean batch.slots?"]),
    (["optimiser.lr=1"], ["optimiser:", "did you mean optimizer?"]),
    (["lr=1"], ["lr:", "did you mean optimizer.lr?"]),
    (["workers=1"], ["workers:", "did you mean cluster.workers?"]),
    (["optimizer.lr=0"], ["optimizer.lr: expected a number > 0 or null, found 0"]),
    (["optimizer.lr=.nan"], ["optimizer.lr", "finite", "nan"]),
    (["optimizer.lr=1e999"], ["optimizer.lr", "finite", "inf"]),
    (["optimizer.betas=[0.9, .inf]"], ["optimizer.betas[1]", "finite", "inf"]),
    (["optimizer.clip.norms=1"], ["optimizer.clip.norms", "did you mean optimizer.clip.norm?"]),
    (["optimizer.clip=1"], ["optimizer.clip: expected a mapping with the keys norm, slot_norm, found 1"]),
    (["optimizer.groups=[{lr: 1}]"], ["optimizer.groups[0].match: expected text, found nothing"]),
    (["optimizer.groups={match: a}"], ["optimizer.groups: expected a list, found {'match': 'a'}"]),
    (["schedule.name=cosin"], ["schedule.name", "one-cycle", "'cosin'", "did you mean cosine?"]),
    (["schedule.warmup=-1"], ["schedule.warmup: expected an integer >= 0, found -1"]),
    (["schedule.pct_start=1"], ["schedule.pct_start: expected a number > 0 and < 1, found 1"]),
    (["consistency.mode=asynch"], ["consistency.mode", "sync, bounded, async", "did you mean async?"]),
    (["consistency.staleness=3"], ["consistency.staleness: expected null with consistency.mode=sync, found 3"]),
    (["consistency.mode=async", "consistency.quorum=1"], ["consistency.quorum", "consistency.mode=async", "found 1"]),
    (["consistency.quorum=5", "batch.slots=4"], ["consistency.quorum", "at most batch.slots=4", "found 5"]),
    (["consistency.scale_lr=true"], ["consistency.scale_lr", "found true"]),
    (["consistency.scale_lr=1"], ["consistency.scale_lr: expected true or false, found 1"]),
    (["cluster.address=ray://h:1"], ["cluster.address: expected host:port or auto, found 'ray://h:1'"]),
    (["cluster.address=auto", "cluster.backend=inprocess"], ["cluster.address", "cluster.backend=inprocess"]),
    (["cluster.device=gpu"], ["cluster.device: expected one of auto, cpu, cuda, found 'gpu'"]),
    (["cluster.server_device=auto"], ["cluster.server_device: expected one of cpu, cuda, found 'auto'"]),
    (["cluster.server_device=cuda", "cluster.server_gpus=2"], ["cluster.server_gpus: expected", "<= 1", "found 2"]),
    (["cluster.server_device=cuda"], ["cluster.server_gpus: expected more than 0", "found 0.0"]),
    (["cluster.server_gpus=1"], ["cluster.server_gpus: expected 0 with cluster.server_device=cpu"]),
    (["eval.every={steps: 1, epochs: 1}"], ["eval.every: expected exactly one of {steps: N}", "'epochs': 1"]),
    (["eval.every.steps=0"], ["eval.every.steps", ">= 1", "found 0"]),
    (["eval.every.step=1"], ["eval.every.step:", "did you mean eval.every.steps?"]),
    (["tracking.every=5"], ["tracking.every: expected exactly one of {steps: N}", "found 5"]),
    (["run.name=a/b"], ["run.name: expected text of letters, digits, . _ -", "found 'a/b'"]),
    (["run.name=.."], ["run.name", "found '..'"]),
    (["run.name=7"], ["run.name", "found 7", "put it in quotes"]),
    (["run.seed=-1"], ["run.seed: expected an integer >= 0 and < 2**63, found -1"]),
    (["run.seed=9223372036854775808"], ["run.seed", "< 2**63", "found 9223372036854775808"]),
    (["run=null"], ["run: expected a mapping with the keys name, storage, seed, bits, found null"]),
    (["task.path=m:C"], ["task: expected exactly one of name, path", "'m:C'"]),
    (["task={path: module.Class}"], ["task.path", "module:name", "found 'module.Class'"]),
    (["stop.epochs=null"], ["stop: expected at least one of epochs, steps"]),
    (["data.features.age.clp=3"], ["data.features.age.clp:", "kind, clip", "did you mean data.features.age.clip?"]),
    (["data.features.age=number"], ["data.features.age.kind: expected one of auto, numeric", "found 'number'"]),
    (
        ["data.features.age={kind: hashed, clip: 2}"],
        ["data.features.age: expected buckets beside kind: hashed", "clip"],
    ),
    (["data.features.age.size=0"], ["data.features.age.size: expected an integer >= 1 and <= 16,777,214", "found 0"]),
    (["data.features=[age]"], ["data.features: expected a mapping or null, found ['age']"]),
    (["data.csv.delimiter=', '"], ["data.csv.delimiter: expected one character, found ', '"]),
    (["data.csv.columns=[a, b, a]"], ["data.csv.columns: expected one name or more, each once"]),
    (["data.csv.columns=[1]"], ["data.csv.columns[0]: expected text, found 1"]),
    (["data.held_out={path: a, fraction: 0.5}"], ["data.held_out.fraction: expected null with data.held_out.path"]),
    (["data.held_out.fraction=1"], ["data.held_out.fraction: expected a number > 0 and < 1 or null, found 1"]),
    (["data.held_out.skip_rows=1"], ["data.held_out.skip_rows: expected null without data.held_out.path, found 1"]),
    (["batch.size"], ["expected section.key=value, found 'batch.size'"]),
    (["=3"], ["expected section.key=value, found '=3'"]),
    (["batch..size=3"], ["expected section.key=value"]),
    (["batch.size=[1"], ["batch.size, line 1: expected plain YAML"]),
]


@pytest.mark.parametrize(("overrides", "fragments"), BAD, ids=lambda value: value[0] if value else "")
def test_bad_config_is_one_message(overrides: list[str], fragments: list[str]) -> None:
    message = complaint(*overrides)
    assert [fragment for fragment in fragments if fragment not in message] == []
    assert "\n" not in message
    assert "pydantic" not in message and "Input should" not in message


def test_several_problems_are_a_line_each() -> None:
    lines = complaint("batch.size=0", "cluster.workers=x", "optimizer.clip.norm=-1").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["batch.size", "optimizer.clip.norm", "cluster.workers"]


def test_task_and_stop_are_required() -> None:
    with pytest.raises(BadInput, match=r"task: .*set task=digits\nstop: .*set stop.epochs=10"):
        load({})


def test_a_dotted_key_in_a_file_is_told_to_be_nested() -> None:
    assert "nest the key" in complaint(**{"optimizer.lr": 0.1})


def test_only_what_yaml_can_hold_is_taken() -> None:
    assert "task.args.f: expected null, true" in complaint(task={"name": "digits", "args": {"f": print}})
    assert "keys that are text, found 1" in complaint(batch={1: 2})
    assert load({**SMALL, "data": {"path": Path("a/b")}}).data.path == "a/b"


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["expected sections", "an empty file"]),
        ("# nothing\n", ["an empty file"]),
        ("- 1\n", ["expected sections", "[1]"]),
        ("task: digits\nstop: {epochs: 1}\ntask: quadratic\n", ["line 3", "'task' twice"]),
        ("task: digits\nstop:\n  epochs: 1\n  epochs: 2\n", ["line 4", "'epochs' twice"]),
        ("task: !!python/object/apply:os.getcwd []\n", ["line 1", "the tag tag:yaml.org,2002:python"]),
        ("task: !!str digits\n", ["the tag"]),
        ("task: digits\n  stop: 1\n", ["line 2", "expected plain YAML"]),
        ("task: a\n---\ntask: b\n", ["line 2", "expected plain YAML"]),
        ("task: &a {args: {b: *a}}\n", ["levels of nesting"]),
        ("a: " + "[" * 5000, ["nesting"]),
        ("a: &a [1, 1, 1]\nb: &b [" + "*a, " * 99 + "]\nc: [" + "*b, " * 99 + "]\n", ["more than 10,000 values"]),
        ("? [a]\n: 1\n", ["line 1", "a key that is not text"]),
        ("task: " + "9" * 5000, ["digits"]),
        ("task: \0", ["expected text"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, fragments: list[str]) -> None:
    with pytest.raises(BadInput) as caught:
        load(written(tmp_path, text))
    assert [fragment for fragment in ["config.yaml", *fragments] if fragment not in str(caught.value)] == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"task: \xe9")
    for name, fragment in [("none.yaml", "found nothing there"), ("", "found a folder"), ("latin.yaml", "UTF-8")]:
        with pytest.raises(BadInput, match=fragment):
            load(tmp_path / name)


# What is written down.

counts = st.none() | st.integers(1, 10**6)
amounts = st.none() | st.floats(1e-300, 1e300)
words = st.text(min_size=1, max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
everys = st.sampled_from([{"steps": 3}, {"seconds": 0.1}, {"epochs": 2}])
sources = st.fixed_dictionaries(
    {
        "task": st.fixed_dictionaries({"name": words, "args": st.dictionaries(words, plain, max_size=3)}),
        "stop": st.fixed_dictionaries({"steps": st.integers(1, 10**9), "epochs": counts}),
        "run": st.fixed_dictionaries({"seed": st.integers(0, 2**63 - 1), "storage": words}),
        "batch": st.fixed_dictionaries({"size": st.just("full") | st.integers(1, 2**40)}),
        "optimizer": st.fixed_dictionaries(
            {
                "name": words,
                "lr": amounts,
                "betas": st.lists(st.floats(0, 1)),
                "groups": st.lists(st.fixed_dictionaries({"match": words, "lr": amounts})),
            }
        ),
        "consistency": st.sampled_from([{"mode": "async", "scale_lr": True}, {"mode": "bounded"}, {"quorum": 1}]),
        "eval": st.fixed_dictionaries({"every": everys}),
        "tracking": st.fixed_dictionaries({"every": st.none() | everys, "uri": words, "experiment": words}),
    }
)


@settings(deadline=None, max_examples=50)
@given(source=sources)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, source: dict[str, Any]) -> None:
    config = load(source)
    path = written(tmp_path_factory.getbasetemp(), config.to_yaml())
    assert load(path) == config
    environ = {"RAY_ADDRESS": "auto", "MLFLOW_TRACKING_URI": "u", "MLFLOW_EXPERIMENT_NAME": "e"}
    assert load(path, (), environ) == config, "a resolved config leaves nothing to the environment"
    assert all(value is None or isinstance(value, str | int | float) for value in config.flat().values())


def test_flat_has_dotted_keys_and_scalars() -> None:
    flat = load(SMALL, ["optimizer.lr=0.1", "optimizer.betas=[0.9, 0.99]", "task.args.a.b=true"]).flat()
    assert (flat["optimizer.lr"], flat["eval.every.epochs"], flat["task.args.a.b"]) == (0.1, 1, True)
    assert flat["optimizer.betas"] == "[0.9, 0.99]"


# What is said about the keys.


def test_docs_are_what_the_schema_says() -> None:
    expected = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert expected == docs_markdown(), "docs/config.md is old: write distgd.config.docs_markdown() into it"


def test_every_key_of_a_config_has_a_row_with_its_default() -> None:
    rows = {row.key: row for row in schema_rows() if ".COLUMN." not in row.key}
    flat = load(SMALL).flat()
    assert rows.keys() == {key.replace("every.epochs", "every").replace("every.seconds", "every") for key in flat}
    given = {"task.name", "stop.epochs", "eval.every.epochs", "checkpoint.every.seconds"}
    assert rows["checkpoint.every"].default == '{"seconds": 60.0}'
    shown = {"task.args": "{}", "optimizer.groups": "[]", "tracking.also": "[]", "data.csv.missing": '["", "?"]'}
    assert {key: rows[key].default for key in flat.keys() - given} == {
        key: shown.get(key, json.dumps(flat[key])) for key in flat.keys() - given
    }
    assert all(row.description.endswith(".") for row in schema_rows())


def test_json_schema_names_the_sections() -> None:
    assert list(json_schema()["properties"]) == list(Config.model_fields)


def test_config_imports_neither_torch_nor_ray() -> None:
    code = "import sys, distgd.config; sys.exit(bool({'torch', 'ray', 'mlflow', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
