"""Five names, three ways: pieces given in Python, named in a config, and methods of a class mean the same."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import distgd
from distgd.config import Data, TaskSection, load
from distgd.errors import BadInput
from distgd.tasks import Pieces
from distgd.tasks import load as load_task

MINE = """
from pathlib import Path

import torch
from torch import nn


class Net(nn.Sequential):
    def __init__(self, hidden=4):
        super().__init__(nn.Linear(3, hidden), nn.Dropout(0.5), nn.Linear(hidden, 1))


def points(samples=60):
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1))
    return {"x": x, "y": x.sum(1, keepdim=True)}


def held_out():
    return points(20)


def error(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def absolute(model, batch):
    return {"mae": (model(batch["x"]) - batch["y"]).abs().squeeze(1)}


def from_file(data_path):
    return points(int(Path(data_path).read_text()))


class Whole:
    def __init__(self, hidden=4):
        self.hidden = hidden

    def model(self):
        return Net(self.hidden)

    def train_data(self):
        return points()

    def eval_data(self):
        return held_out()

    def loss(self, model, batch):
        return error(model, batch)

    def metrics(self, model, batch):
        return absolute(model, batch)
"""
NAMES = {"model": "Net", "loss": "error", "train_data": "points", "eval_data": "held_out", "metrics": "absolute"}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module `mine` in the current folder, as a person has it."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import mine

    yield mine
    del sys.modules["mine"]


def sections(**more: Any) -> dict[str, Any]:
    given = {"stop": {"epochs": 2}, "batch": {"size": 16, "slots": 4}, "optimizer": {"lr": 0.1}, "run": {"seed": 3}}
    return {**given, "cluster": {"backend": "inprocess"}, "tracking": {"uri": "none"}, **more}


def named(**more: Any) -> dict[str, Any]:
    return {piece: f"mine:{name}" for piece, name in NAMES.items()} | more


def test_arguments_names_and_a_class_give_one_fingerprint(mine: Any) -> None:
    arguments = {piece: getattr(mine, name) for piece, name in NAMES.items()}
    results = [
        distgd.train(sections(), **arguments),
        distgd.train(sections(), **{**arguments, "train_data": mine.points(), "eval_data": mine.points(20)}),
        distgd.train(sections(task=named())),
        distgd.train(sections(task={"path": "mine:Whole"})),
        distgd.train(sections(), task=mine.Whole()),
    ]
    assert len({result.weights_sha256 for result in results}) == 1
    assert len({(result.metrics["eval/loss"], result.metrics["eval/mae"]) for result in results}) == 1
    recorded = [load(Path(result.run_dir) / "config.yaml").task for result in results]
    assert recorded[0] == recorded[2] == TaskSection(**named())
    assert recorded[3] == recorded[4]


def test_arguments_of_pieces_are_the_arguments_of_the_class(mine: Any) -> None:
    pieces = distgd.train(sections(task=named()), "task.args.model.hidden=7")
    whole = distgd.train(sections(task={"path": "mine:Whole", "args": {"hidden": 7}}))
    assert pieces.state_dict["0.weight"].shape == (7, 3)
    assert pieces.weights_sha256 == whole.weights_sha256


def test_a_function_that_reads_a_file_gets_the_path_of_the_config(mine: Any, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("32")
    task = load_task(TaskSection(**named(train_data="mine:from_file")), Data(path=str(tmp_path / "many.txt")))
    assert len(task.train_data()["x"]) == 32
    with pytest.raises(BadInput, match=r"data\.path: expected null, as mine:points takes no data_path"):
        load_task(TaskSection(**named()), Data(path="x"))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ({"model": "mine:Nett"}, r"task\.model: expected a name in .*, found 'Nett'; did you mean Net\?"),
        ({"loss": "nowhere:error"}, r"task\.loss: expected a module in .*found 'nowhere'"),
        ({"args": {"model": {"hiden": 3}}}, r"task\.args\.model\.hiden: expected one of .*did you mean hidden"),
        ({"args": {"loss": {"x": 3}}}, r"task\.args\.loss: expected nothing, as this piece is not called to be made"),
        ({"args": {"model": 3}}, r"task\.args\.model: expected a mapping of arguments, found 3"),
        ({"loss": "mine:torch"}, r"loss: expected a function, found <module 'torch'"),
    ],
)
def test_a_wrong_name_is_told_with_its_key(mine: Any, pieces: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_task(TaskSection(**named(**pieces)), Data()).model()


def test_a_task_and_pieces_exclude_each_other(mine: Any) -> None:
    with pytest.raises(BadInput, match=r"task: expected either task= or the pieces of one, found \['task', 'model'\]"):
        distgd.train(sections(), task=mine.Whole(), model=mine.Net)
    with pytest.raises(BadInput, match=r"task: expected model, loss and train_data, found \['model'\]; give loss, tr"):
        distgd.train(sections(), model=mine.Net)


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        if not 0 <= index < 40:
            raise IndexError(index)
        return torch.full((3,), index / 40), index / 40


def test_a_dataset_trains_as_its_tensors_do(mine: Any) -> None:
    x, y = (torch.stack([Numbers()[i][0] for i in range(40)]), torch.arange(40, dtype=torch.float64) / 40)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]).squeeze(1) - batch[1].float()).square().mean()

    runs = [distgd.train(sections(), model=mine.Net, loss=loss, train_data=data) for data in (Numbers(), (x, y))]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    assert load(Path(runs[0].run_dir) / "config.yaml").task.train_data == f"{__name__}:Numbers"


def test_collate_makes_the_batch(mine: Any) -> None:
    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([x for x, _ in samples]), "y": torch.tensor([[y] for _, y in samples])}

    result = distgd.train(sections(), model=mine.Net, loss=mine.error, train_data=Numbers(), collate=collate)
    assert result.status == "completed"


def test_a_memory_mapped_array_travels_as_the_place_of_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(300_000, dtype=">f4").reshape(-1, 3))
    whole = np.load(tmp_path / "x.npy", mmap_mode="r")
    part = whole[70_001:]
    pieces = Pieces(model=nn.Linear(3, 1), loss=print, train_data={"whole": whole, "part": part, "odd": whole[::2]})
    raw = cloudpickle.dumps(pieces)
    assert len(raw) < 50_000 * 3 * 4 + 20_000, "only the part that is no contiguous piece of the file"
    again = pickle.loads(raw).train_data()
    assert isinstance(again["whole"], np.memmap)
    for name, array in {"whole": whole, "part": part, "odd": whole[::2]}.items():
        assert np.array_equal(again[name], array)
    (tmp_path / "x.npy").unlink()
    with pytest.raises(BadInput, match=r"data: expected the memory-mapped file .*x\.npy"):
        pickle.loads(raw)
