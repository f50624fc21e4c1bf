"""The built-in tasks' mathematics, and how a task is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distgd.config import Data, TaskSection
from distgd.errors import BadInput
from distgd.sources import open_source
from distgd.tasks import BUILT_IN, Task, build, load


def named(name: str, path: Path | None = None, /, **args: Any) -> Any:
    return load(TaskSection(name=name, args=args), Data(path=str(path) if path else None))


def gradient(task: Task, model: nn.Module, batch: Any) -> torch.Tensor:
    model.zero_grad()
    loss = task.loss(model, batch)
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a worker; and two threads on two busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40 + "naïve ☃ " * 30, encoding="utf-8")
    return path


SMALL = {
    "char-lm": {"context": 8, "width": 8, "depth": 1, "heads": 2, "limit_bytes": 4000},
    "synthetic": {"parameters": 10},
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_gradients_of_built_ins_agree_with_finite_differences(name: str) -> None:
    task = named(name, **SMALL.get(name, {}))
    model = build(task, seed=0).double().eval()
    batch = open_source(task.train_data()).batch(np.arange(3))
    if name in ("digits", "tabular"):
        batch = (batch[0].double(), batch[1])
    if name == "synthetic":
        batch = batch.double()
    grad = gradient(task, model, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    towards = [torch.randn_like(p) for p in parameters]
    eps, values = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, v in zip(parameters, towards, strict=True):
                p += sign * eps * v
            values.append(float(task.loss(model, batch)))
    slope = float(grad @ torch.cat([v.flatten() for v in towards]))
    assert (values[0] - values[1]) / (2 * eps) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_is_the_same_every_time(name: str) -> None:
    def bits() -> list[torch.Tensor]:
        task = named(name, **SMALL.get(name, {}))
        batch = open_source(task.train_data()).batch(np.arange(4))
        return [*build(task, seed=3).state_dict().values(), *(batch if isinstance(batch, tuple) else [batch])]

    assert all(torch.equal(one, other) for one, other in zip(bits(), bits(), strict=True))


def test_the_seed_decides_the_initial_weights() -> None:
    task = named("digits")
    one, same, other = (build(task, seed).state_dict()["0.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@given(st.integers(0, 5), st.data())
def test_the_gradient_of_counting_is_minus_one_over_n_at_its_samples(power: int, data: st.DataObject) -> None:
    n, task = 2**power, named("counting", samples=64)
    chosen = data.draw(st.lists(st.integers(0, 63), min_size=n, max_size=n, unique=True))
    grad = gradient(task, build(task, seed=0), open_source(task.train_data()).batch(np.array(chosen)))
    expected = torch.zeros(64)
    expected[chosen] = -1 / n
    assert torch.equal(grad, expected)
    assert not grad.is_sparse


def test_counting_counts() -> None:
    task = named("counting", samples=64)
    model = build(task, seed=0)
    for _ in range(3):
        for part in task.train_data().split(16):
            grad = gradient(task, model, part)
            next(model.parameters()).data -= 16 * grad
    assert torch.equal(model.state_dict()["w"], torch.full((64,), 3.0))


@pytest.mark.parametrize(("dim", "condition", "noise", "samples"), [(10, 10, 0, 64), (30, 1e3, 2, 33), (1, 5, 1, 1)])
def test_the_quadratic_is_the_mean_of_its_samples(dim: int, condition: float, noise: float, samples: int) -> None:
    task = named("quadratic", dim=dim, condition=condition, noise=noise, samples=samples)
    model = build(task, seed=1)
    x = model.state_dict()["x"]
    assert torch.allclose(gradient(task, model, task.train_data()), task.A @ x - task.b, rtol=1e-12, atol=1e-12)
    one_by_one = torch.stack([task.loss(model, xi[None]).detach() for xi in task.train_data()])
    assert float(one_by_one.mean()) == pytest.approx(float(x @ task.A @ x / 2 - task.b @ x), rel=1e-12, abs=1e-12)
    if noise and samples > 1:
        assert one_by_one.std() > 0


def test_the_quadratic_knows_its_constants() -> None:
    task = named("quadratic", dim=6, condition=50)
    eigenvalues = torch.linalg.eigvalsh(task.A)
    assert float(eigenvalues[0]) == pytest.approx(task.mu)
    assert float(eigenvalues[-1]) == pytest.approx(task.L)
    assert task.L / task.mu == pytest.approx(50)


@given(st.integers(1, 50), st.integers(1, 50))
def test_synthetic_has_the_parameters_that_were_asked_for(parameters: int, tensors: int) -> None:
    if tensors > parameters:
        with pytest.raises(BadInput, match="tensors"):
            named("synthetic", parameters=parameters, tensors=tensors)
        return
    task = named("synthetic", parameters=parameters, tensors=tensors)
    model = build(task, seed=0)
    sizes = [p.numel() for p in model.parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)
    assert torch.equal(gradient(task, model, torch.tensor([1.0, 2.0])), torch.full((parameters,), 1.5))


def test_digits_are_split_without_overlap() -> None:
    task = named("digits")
    (train, labels), (held_out, _) = task.train_data(), task.eval_data()
    assert (len(train), len(held_out)) == (1437, 360)
    assert (float(train.min()), float(train.max())) == (0, 1)
    assert labels.bincount().min() > 100
    assert not {*map(tuple, train.tolist())} & {*map(tuple, held_out.tolist())}


def test_digits_accuracy_is_a_number_a_sample() -> None:
    task = named("digits", batchnorm=True, dtype="float64")
    pixels, digits = task.eval_data()
    model = build(task, seed=0).eval()
    right = task.metrics(model, (pixels, digits))["accuracy"]
    assert right.shape == (360,)
    assert torch.equal(right.bool(), model(pixels).argmax(1) == digits)
    assert any(isinstance(module, nn.BatchNorm1d) for module in model.modules())


def test_digits_learns() -> None:
    task = named("digits")
    pixels, digits = task.train_data()
    model = build(task, seed=0)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        gradient(task, model, (pixels, digits))
        adam.step()
    assert task.metrics(model.eval(), task.eval_data())["accuracy"].mean() > 0.9


def decoded(task: Any, windows: torch.Tensor) -> str:
    return "".join((*task.vocabulary, "?")[place] for place in windows.flatten().tolist())


def test_windows_of_a_text_are_its_characters(text: Path) -> None:
    task = named("char-lm", text, context=16)
    whole = text.read_text(encoding="utf-8")
    cut = len(whole) * 9 // 10
    train, held_out = task.train_data(), task.eval_data()
    assert train.shape[1] == held_out.shape[1] == 17
    joined = decoded(task, train[:, :-1])  # windows share one character: the target of one starts the next
    assert joined == whole[: len(joined)]
    assert cut - len(joined) <= 16
    start = decoded(task, held_out[0])
    assert start == whole[cut : cut + 17]


def test_a_character_that_training_has_not_seen_is_the_unknown_one(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab" * 900 + "☃" * 200)
    task = named("char-lm", path, context=8)
    assert task.vocabulary == "ab"
    assert decoded(task, task.eval_data()) == "?" * task.eval_data().numel()
    model = build(task, seed=0)
    assert torch.isfinite(task.loss(model, task.eval_data()))


def test_windows_overlap_with_a_stride_and_are_not_copied(text: Path) -> None:
    task = named("char-lm", text, context=16, stride=1)
    windows = task.train_data()
    assert torch.equal(windows[0, 1:], windows[1, :-1])
    assert windows.untyped_storage().nbytes() < windows.numel() / 10


def test_a_prediction_sees_no_later_character(text: Path) -> None:
    task = named("char-lm", text, context=8, width=16, heads=2)
    model = build(task, seed=0).eval()
    window = task.train_data()[:1, :-1].long()
    changed = window.clone()
    changed[0, 5] += 1
    same = (model(window) == model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_the_default_text_is_a_megabyte_of_the_standard_library() -> None:
    task = named("char-lm")
    assert 13_000 < len(task.train_data()) <= 900_000 // 64  # less where a character has several bytes
    assert "def __" in decoded(task, task.train_data()[:200])


def test_char_lm_learns_a_sentence(text: Path) -> None:
    task = named("char-lm", text, context=16, width=32, depth=1)
    model = build(task, seed=0)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    windows = task.train_data()
    first = float(task.loss(model, windows).detach())
    for _ in range(60):
        gradient(task, model, windows[:32])
        adam.step()
    assert float(task.loss(model, windows).detach()) < first / 3


@pytest.mark.parametrize(
    ("name", "args", "path", "words"),
    [
        ("digit", {}, None, ["task.name", "digits, quadratic, synthetic", "did you mean digits?"]),
        ("digits", {"hiden": 3}, None, ["task.args.hiden", "hidden, dropout", "did you mean hidden?"]),
        ("digits", {"hidden": "many"}, None, ["task.args.hidden", "integer", "'many'"]),
        ("digits", {"dropout": 1.0}, None, ["task.args.dropout", "less than 1", "1.0"]),
        ("digits", {"dtype": "bfloat16"}, None, ["task.args.dtype", "float32", "float64", "'bfloat16'"]),
        ("char-lm", {"heads": 3}, None, ["task.args.width", "multiple of task.args.heads = 3", "128"]),
        ("digits", {}, "some.csv", ["data.path", "some.csv", "remove it"]),
    ],
)
def test_a_wrong_built_in_is_refused_with_what_is_allowed(
    name: str, args: dict[str, Any], path: str | None, words: list[str]
) -> None:
    with pytest.raises(BadInput) as refused:
        named(name, Path(path) if path else None, **args)
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_text_that_is_not_there_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data\.path.*missing\.txt.*No such file"):
        named("char-lm", tmp_path / "missing.txt").train_data()
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(BadInput, match=r"data\.path.*found 9;"):
        named("char-lm", tmp_path / "short.txt").train_data()


GOOD = """
import torch

class Line:
    def __init__(self, width, data_path=None):
        self.width, self.data_path = width, data_path
        if width < 0:
            raise RuntimeError("width below zero")
    def model(self): return torch.nn.Linear(self.width, 1)
    def loss(self, model, batch): return model(batch).mean()
    def train_data(self): return torch.zeros(4, self.width)

class Empty:
    def model(self): ...
    def loss(self, model, batch): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules of a user's own in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "mine_good.py").write_text(GOOD)
    (tmp_path / "mine_syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "mine_failing.py").write_text("def f():\n    return 1 / 0\nf()\n")
    (tmp_path / "mine_needing.py").write_text("import a_package_that_nobody_has\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("mine_"):
            del sys.modules[name]


def test_a_class_of_ones_own_is_loaded_from_the_current_folder(folder: Path) -> None:
    task: Any = load(TaskSection(path="mine_good:Line", args={"width": 3}), Data(path="rows.csv"))
    assert task.data_path == "rows.csv"
    assert gradient(task, build(task, seed=0), task.train_data()).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("path", "args", "words"),
    [
        ("mine_god:Line", {}, ["task.path", "a module in ", "'mine_god'", "did you mean mine_good?"]),
        ("mine_good:Lin", {}, ["task.path", "mine_good.py", "'Lin'", "did you mean Line?"]),
        ("mine_good:torch", {}, ["task.path", "class", "'torch'"]),
        ("mine_syntax:X", {}, ["task.path", "mine_syntax.py", "line 2", "SyntaxError"]),
        ("mine_failing:X", {}, ["task.path", "mine_failing.py", "line 2", "line 3", "ZeroDivisionError"]),
        ("mine_needing:X", {}, ["task.path", "mine_needing.py", "line 1", "a_package_that_nobody_has"]),
        ("mine_good:Line", {}, ["task.args", "width"]),
        ("mine_good:Line", {"widht": 3}, ["task.args.widht", "did you mean width?"]),
        ("mine_good:Line", {"width": -1}, ["task.args", "mine_good.py", "line 8", "RuntimeError: width below zero"]),
        ("mine_good:Empty", {}, ["task.path", "mine_good:Empty", "add train_data"]),
        ("builtins:dict", {}, ["task.path", "builtins:dict"]),
        ("builtins:dictt", {}, ["task.path", "builtins", "did you mean dict?"]),
    ],
)
def test_a_wrong_class_of_ones_own_is_refused_with_its_own_lines(
    folder: Path, path: str, args: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(BadInput) as refused:
        load(TaskSection(path=path, args=args), Data())
    message = str(refused.value)
    assert [word for word in words if word not in message] == []
    assert "importlib" not in message
    assert "distgd/tasks" not in message


def test_a_model_that_cannot_be_trained_is_refused(folder: Path) -> None:
    task: Any = load(TaskSection(path="mine_good:Line", args={"width": 3}), Data())
    task.model = lambda: "a model"
    with pytest.raises(BadInput, match=r"torch\.nn\.Module, found str"):
        build(task, seed=0)
    task.model = lambda: nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(BadInput, match="at least one trainable parameter"):
        build(task, seed=0)
