"""The fingerprint covers every bit and nothing else; files load back strictly in plain torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distgd import weights
from distgd.weights import fingerprint


def state() -> dict[str, Tensor]:
    return {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3, dtype=torch.int64)}


def test_it_is_the_written_formula() -> None:
    text = b"a\0I64\0[]\0" + (3).to_bytes(8, "little")
    text += b"b.weight\0F32\0[2,3]\0" + torch.arange(6.0).numpy().tobytes()
    assert fingerprint(state()) == hashlib.sha256(text).hexdigest()


def test_the_order_of_names_and_the_memory_layout_do_not_count() -> None:
    other = dict(reversed(state().items()))
    other["b.weight"] = torch.arange(6.0).reshape(2, 3).t().contiguous().t()
    assert fingerprint(other) == fingerprint(state())


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {**s, "b.weight": s["b.weight"].double()},
        lambda s: {**s, "b.weight": s["b.weight"].reshape(3, 2)},
        lambda s: {**s, "b.weight": s["b.weight"] + 1e-6},
        lambda s: {**s, "b.weight": s["b.weight"] * torch.tensor([-1.0, 1.0, 1.0])},  # -0.0 is another bit
        lambda s: {"c": s["a"], "b.weight": s["b.weight"]},
        lambda s: {"a": s["a"]},
    ],
)
def test_every_bit_name_dtype_and_shape_counts(change: Any) -> None:
    assert fingerprint(change(state())) != fingerprint(state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int16])
def test_any_dtype_has_one(dtype: torch.dtype) -> None:
    assert len(fingerprint({"x": torch.ones(3).to(dtype)})) == 64


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def test_tied_tensors_count_once_under_their_first_name() -> None:
    tied = Tied().state_dict()
    assert fingerprint(tied) == fingerprint({"first.weight": tied["first.weight"]})
    untied = {name: tensor.clone() for name, tensor in tied.items()}
    assert fingerprint(untied) != fingerprint(tied)


def test_empty_tensors_are_tied_to_nothing() -> None:
    empty = {"a": torch.zeros(0), "b": torch.zeros(0)}
    assert fingerprint(empty) != fingerprint({"a": torch.zeros(0)})


def test_a_copy_has_its_own_memory_and_the_same_ties() -> None:
    model = Tied()
    copied = weights.copy(model.state_dict())
    before = fingerprint(copied)
    with torch.no_grad():
        model.first.weight.zero_()
    assert fingerprint(copied) == before != fingerprint(model.state_dict())
    assert copied["first.weight"] is copied["second.weight"]


def test_a_file_loads_back_strictly_with_every_name(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    path = weights.save(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(path), strict=True)
    assert fingerprint(other.state_dict()) == fingerprint(model.state_dict())


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for value in (1.0, 2.0):
        weights.save({"w": torch.full((3, 3), value).t()}, path)
    assert set(load_file(path)["w"].flatten().tolist()) == {2.0}
    assert list(tmp_path.iterdir()) == [path]
