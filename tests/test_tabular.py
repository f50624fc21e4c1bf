"""The task `tabular`: from a CSV file to a trained model, and what is said about data that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distgd
from distgd.config import Data, TaskSection
from distgd.errors import BadInput
from distgd.tasks import build, load

ADULT = Path(__file__).parent.parent.parent / "shared" / "data"
COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation"),
    *("relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a worker; and two threads on two busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tabular(data: dict[str, Any], /, **args: Any) -> Any:
    target = data.get("target", "y")
    section = Data.model_validate({**data, "target": target})
    return load(TaskSection(name="tabular", args=args), section)


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def houses(tmp_path: Path) -> str:
    """60 rows: a number, a category with gaps, and a price that follows from both."""
    chance = np.random.RandomState(0)
    sizes, towns = chance.uniform(50, 200, 60), chance.randint(0, 3, 60)
    rows = [
        f"{size!r}, {'ABC'[town] if row % 7 else '?'}, {3 * size + 100 * town + 0.5!r}"
        for row, (size, town) in enumerate(zip(sizes.tolist(), towns.tolist(), strict=True))
    ]
    return written(tmp_path / "houses.csv", "size, town, price", *rows)


def trained(task: Any, steps: int, batch: int, lr: float) -> nn.Module:
    model = build(task, seed=0)
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    inputs, targets = task.train_data()
    chance = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (batch,), generator=chance)
        adam.zero_grad()
        task.loss(model, (inputs[rows], targets[rows])).backward()
        adam.step()
    return model.eval()


@torch.no_grad()
def scores(task: Any, model: nn.Module) -> dict[str, float]:
    found: dict[str, Tensor] = task.metrics(model, task.eval_data())
    assert all(values.shape == (len(task.eval_data()[0]),) for values in found.values())
    return {name: float(values.double().mean()) for name, values in found.items()}


@pytest.mark.skipif(not (ADULT / "adult-train.csv").exists(), reason="UCI's Adult is not in ../shared/data")
def test_adult_is_learnt_with_the_defaults() -> None:
    data = {
        "path": str(ADULT / "adult-train.csv"),
        "held_out": {"path": str(ADULT / "adult-test.csv")},
        "csv": {"columns": COLUMNS},
        "target": {"column": "income", "trim": "."},
    }
    task = tabular(data)
    (train, _), (held_out, labels) = task.train_data(), task.eval_data()
    assert (len(train), len(held_out)) == (32_561, 16_281)
    assert labels.bincount().tolist() == [12_435, 3_846]  # as UCI's description says: 76.38 % and 23.62 %
    said = task.describe()
    assert said["target"]["labels"] == ["<=50K", ">50K"]
    assert said["features"]["sex"] == {"kind": "categorical", "vocabulary": ["Male", "Female"]}
    assert len(said["features"]["native-country"]["vocabulary"]) == 41
    model = trained(task, steps=256, batch=256, lr=0.003)
    assert scores(task, model)["accuracy"] >= 0.84


def test_the_default_file_is_learnt() -> None:
    task = load(TaskSection(name="tabular"), Data())
    assert [len(task.train_data()[0]), len(task.eval_data()[0])] == [455, 114]  # type: ignore[attr-defined]
    assert scores(task, trained(task, steps=100, batch=32, lr=0.003))["accuracy"] >= 0.92


def test_the_default_file_has_other_columns_to_predict() -> None:
    task = load(TaskSection(name="tabular"), Data.model_validate({"target": "worst area"}))
    assert task.describe()["target"]["kind"] == "number"  # type: ignore[attr-defined]


def test_numbers_are_predicted_and_measured_in_their_own_unit(houses: str) -> None:
    task = tabular({"path": houses, "target": "price"}, dropout=0.0, dtype="float64")
    model = trained(task, steps=300, batch=48, lr=0.01)
    found, said = scores(task, model), task.describe()["target"]
    inputs, targets = task.eval_data()
    with torch.no_grad():
        errors = (model(inputs).squeeze(1) - targets) * said["std"]
    assert found["mae"] == pytest.approx(float(errors.abs().mean()))
    assert found["mse"] == pytest.approx(float(errors.square().mean()))
    assert found["mae"] < said["std"] / 3
    prices = {round(float(line.split(",")[2]), 6) for line in Path(houses).read_text().splitlines()[1:]}
    assert {round(price, 6) for price in (targets * said["std"] + said["mean"]).tolist()} <= prices


def test_a_share_is_held_out_by_its_own_seed_and_nothing_is_learnt_from_it(houses: str) -> None:
    def parts(**held_out: Any) -> tuple[Any, Any, Any]:
        task = tabular({"path": houses, "target": "price", "held_out": held_out}, dtype="float64")
        return task.train_data()[1], task.eval_data()[1], task.describe()["target"]

    train, held_out, said = parts()
    assert (len(train), len(held_out)) == (48, 12)
    assert float(train.mean()) == pytest.approx(0, abs=1e-12)
    assert not set(train.tolist()) & set(held_out.tolist())
    again, other, more = parts(), parts(seed=1), parts(fraction=0.5)
    assert torch.equal(again[1], held_out) and again[2] == said
    assert other[2] != said
    assert len(more[1]) == 30


def test_the_same_file_held_out_gives_the_same_inputs(houses: str) -> None:
    task = tabular({"path": houses, "target": "price", "held_out": {"path": houses}})
    assert all(torch.equal(one, other) for one, other in zip(task.train_data(), task.eval_data(), strict=True))


def test_columns_are_what_is_said_of_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "id,a1,a2,b,y", "7,1,5,x,no", "8,2,6,y,yes", "9,3,7,x,no", "6,4,8,z,yes")
    features = {"id": "drop", "a*": {"kind": "numeric", "clip": 1}, "a2": "categorical", "*": "auto"}
    said = tabular({"path": path, "features": features}).describe()["features"]
    assert {name: each["kind"] for name, each in said.items()} == {
        "a1": "numeric",
        "a2": "categorical",
        "b": "categorical",
    }
    assert said["a1"]["clip"] == 1
    only = tabular({"path": path, "features": {"b": {"kind": "hashed", "buckets": 4}}})
    assert only.describe()["features"] == {"b": {"kind": "hashed", "buckets": 4}}
    json.dumps(only.describe())


def test_labels_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "x,y", *(f"{row},{row % 12}" for row in range(48)))
    target = {"column": "y", "kind": "label"}
    task = tabular({"path": path, "target": target})
    labels = [int(label) for label in task.describe()["target"]["labels"]]
    assert all(one < other for one, other in pairwise(labels))
    assert tabular({"path": path, "target": {**target, "kind": "number"}}).describe()["target"]["kind"] == "number"


def test_what_labels_end_in_is_cut_off_in_both_files(tmp_path: Path) -> None:
    train = written(tmp_path / "a.csv", "x,y", "1,no", "2,yes.", "3,yes")
    later = written(tmp_path / "b.csv", "x,y", "1,yes.", "2,no..")
    task = tabular({"path": train, "held_out": {"path": later}, "target": {"column": "y", "trim": "."}})
    assert task.describe()["target"]["labels"] == ["no", "yes"]
    assert (task.train_data()[1].tolist(), task.eval_data()[1].tolist()) == ([0, 1, 1], [1, 0])


def test_a_value_that_training_has_not_seen_says_nothing(tmp_path: Path) -> None:
    train = written(tmp_path / "a.csv", "x,c,y", "1,a,no", "2,b,yes", "3,a,no")
    later = written(tmp_path / "b.csv", "y,c,x", "no,never,2", "no,?,2", "no,a,2")
    task = tabular({"path": train, "held_out": {"path": later}}, hidden=[8])
    model = trained(task, steps=20, batch=3, lr=0.01)
    inputs, _ = task.eval_data()
    assert inputs[:, 1].tolist() == [1, 0, 2]
    unseen, missing, seen = model(inputs)
    assert torch.equal(unseen, missing)
    assert not torch.equal(unseen, seen)


@pytest.mark.parametrize("args", [{}, {"hidden": []}, {"hidden": [4, 4, 4], "embedding": 3, "dtype": "float64"}])
def test_the_model_takes_one_tensor_of_each_width(houses: str, args: dict[str, Any]) -> None:
    task = tabular({"path": houses, "target": "price"}, **args)
    model = build(task, seed=0)
    inputs, _ = task.train_data()
    assert model(inputs).shape == (48, 1)
    assert inputs.dtype == next(model.parameters()).dtype
    assert len([each for each in model.modules() if isinstance(each, nn.Linear)]) == 1 + len(args.get("hidden", "ab"))


TRAIN = ("x,c,y", "1,a,no", "2,b,yes", "3,a,no", "4,b,yes")
BAD: list[tuple[tuple[str, ...], tuple[str, ...], dict[str, Any], list[str]]] = [
    (
        TRAIN,
        (),
        {"target": {}},
        ["data.target.column: expected the column to predict (x, c, y), found null", "data.target="],
    ),
    (TRAIN, (), {"target": "z"}, ["train.csv: expected a column z, found x, c, y"]),
    (TRAIN, ("x,y", "1,no"), {}, ["later.csv: expected a column c, found x, y"]),
    (TRAIN, ("x,c,y", "1,a,maybe"), {}, ["later.csv, line 2, column y", "(no, yes)", "'maybe'", "trim"]),
    (TRAIN, ("x,c,y", "1,a,no", "1,a,?"), {}, ["later.csv, line 3, column y: expected a value to predict", "None"]),
    (TRAIN, ("x,c,y", "1,a,no", "old,a,no"), {}, ["later.csv, line 3, column x: expected a number", "'old'"]),
    (TRAIN, ("x,c,y",), {}, ["later.csv: expected at least one row", "data.held_out.path"]),
    (TRAIN, (), {"features": {"c": "numeric"}}, ["train.csv, line 2, column c: expected a number, found 'a'"]),
    (TRAIN, (), {"features": {"cc": "auto"}}, ["data.features.cc: expected a column of", "(x, c, y)"]),
    (TRAIN, (), {"features": {"z*": "auto"}}, ["data.features.z*: expected a column of", "a pattern"]),
    (TRAIN, (), {"features": {"y": "auto"}}, ["data.features.y: expected a column that is not the target"]),
    (TRAIN, (), {"features": {"*": "drop"}}, ["data.features: expected at least one column beside the target"]),
    (TRAIN[:2], (), {}, ["train.csv: expected more rows than the 1 that are held out, found 1"]),
    (("x,y", "1,?", "2,yes", "3,no"), TRAIN, {}, ["train.csv, line 2, column y: expected a value to predict"]),
    (("x,y", "?,no", "?,yes"), TRAIN, {}, ["train.csv, column x: expected at least one value", "x=drop"]),
    (("x,y", "1,no", "2,no"), TRAIN, {}, ["train.csv, column y: expected two labels or more, found ['no']"]),
    (("x,y", "1,0", "2,1"), TRAIN, {}, ["data.target.kind: expected label or number", "y holds whole numbers"]),
    (("x,y", "1,.5", "2,.5"), TRAIN, {}, ["train.csv, column y: expected numbers that differ, found 0.5"]),
    (TRAIN, (), {"target": {"column": "c", "kind": "number"}}, ["column c: expected a number, found"]),
    (("x,y", "1,.5", "2,?"), TRAIN, {}, ["train.csv, line 3, column y: expected a value to predict"]),
    (TRAIN, (), {"csv": {"columns": ["x", "y"]}}, ["data.csv.columns: expected 3 names"]),
    (TRAIN, ("x,c,y", "1,a"), {}, ["later.csv, line 2: expected 3 values, found 2"]),
]


@pytest.mark.parametrize(("train", "later", "data", "words"), BAD, ids=range(len(BAD)))
def test_data_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, train: tuple[str, ...], later: tuple[str, ...], data: dict[str, Any], words: list[str]
) -> None:
    held_out = {"path": written(tmp_path / "later.csv", *later)} if later else {}
    with pytest.raises(BadInput) as refused:
        tabular({"path": written(tmp_path / "train.csv", *train), "held_out": held_out, **data}).train_data()
    message = str(refused.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_a_run_has_the_same_bits_for_any_number_of_workers(houses: str, tmp_path: Path) -> None:
    def run(workers: int) -> distgd.Result:
        config = {
            "task": "tabular",
            "data": {"path": houses, "target": "price"},
            "run": {"storage": str(tmp_path / "runs")},
            "batch": {"size": 16, "slots": 4},
            "stop": {"epochs": 1},
            "cluster": {"backend": "inprocess", "workers": workers},
            "tracking": {"uri": "none"},
        }
        return distgd.train(config)

    one, three = run(1), run(3)
    assert one.weights_sha256 == three.weights_sha256
    assert {"train/loss", "eval/loss", "eval/mae", "eval/mse"} <= one.metrics.keys()


def test_what_is_said_about_a_file_needs_one() -> None:
    for data in ({"csv": {"skip_rows": 1}}, {"held_out": {"path": "a.csv"}}):
        with pytest.raises(BadInput, match=r"expected nothing without data\.path"):
            load(TaskSection(name="tabular"), Data.model_validate(data)).train_data()


def test_the_section_is_not_an_argument() -> None:
    with pytest.raises(BadInput, match=r"task\.args\.data: expected nothing, as it comes from the section data"):
        load(TaskSection(name="tabular", args={"data": 3}), Data())


def test_a_task_that_reads_no_columns_refuses_what_is_said_about_them() -> None:
    with pytest.raises(BadInput, match=r"data\.features: expected nothing, as this task does not read it"):
        load(TaskSection(name="digits"), Data.model_validate({"features": {"*": "auto"}}))
