"""The first promise: in sync mode the weights are a pure function of config, seed and data.

The same bits for any number of workers and servers, and the right ones: those of a plain torch loop.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from simulate import OddTask, Smooth, config, simulate
from torch import Tensor, nn

from distgd.prepare import prepare
from distgd.reduce import split
from distgd.sources import Order, open_source, seed_everything, slot_seed
from distgd.weights import fingerprint

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "adam": {"name": "adam", "lr": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "rmsprop": {"name": "rmsprop", "lr": 0.001},
}
DIGITS = {"name": "digits", "args": {"hidden": 33, "batchnorm": True, "dropout": 0.3}}


@pytest.mark.parametrize("slots", [3, 4, 5, 8])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_fingerprint_for_all_workers_and_servers(optimizer: str, slots: int) -> None:
    """The last batch of an epoch is short: 10 or 16 samples instead of 32."""
    task = OddTask(samples=106 if slots < 8 else 112)
    seen = {
        simulate(
            task,
            seed=workers * 10 + servers,
            optimizer=OPTIMIZERS[optimizer],
            batch={"size": 32, "slots": slots},
            stop={"steps": 5},
            cluster={"workers": workers, "servers": servers},
        ).sha256
        for workers, servers in product((1, 2, 3, 4), (1, 2, 3))
    }
    assert len(seen) == 1


@pytest.mark.parametrize("slots", [3, 4, 5, 8])
def test_one_fingerprint_on_digits(slots: int) -> None:
    seen = {
        simulate(
            builtin=DIGITS,
            seed=workers,
            optimizer={"name": "adam", "lr": 0.01, "clip": {"norm": 0.5, "slot_norm": 2.0}},
            schedule={"name": "cosine", "warmup": 3},
            batch={"size": 450, "slots": slots},
            stop={"epochs": 2},
            cluster={"workers": workers, "servers": servers},
        ).sha256
        for workers, servers in [(1, 1), (2, 3), (3, 2), (4, 1), (4, 3)]
    }
    assert len(seen) == 1


def test_another_number_of_slots_gives_other_bits() -> None:
    one, other = (simulate(OddTask(106), batch={"size": 32, "slots": slots}).sha256 for slots in (2, 4))
    assert one != other


def plain_loop(task: Any, optimizer: torch.optim.Optimizer, model: nn.Module, order: Order, steps: int) -> None:
    """Plain torch, one process: a step's slots are added in the tree's order."""
    source = open_source(task.train_data())

    def slot_sum(step: int, first: int, stop: int) -> tuple[list[Tensor] | None, float]:
        if stop - first > 1:
            middle = split(first, stop)
            (left, a), (right, b) = slot_sum(step, first, middle), slot_sum(step, middle, stop)
            if left is None or right is None:
                return left or right, a + b
            return [x + y for x, y in zip(left, right, strict=True)], a + b
        indices = order.indices(step, first)
        if not len(indices):
            return None, 0.0
        model.load_state_dict(buffers, strict=False)
        seed_everything(slot_seed(order.seed, order.epoch_of(step), step, first))
        optimizer.zero_grad()
        task.loss(model, source.batch(indices)).backward()
        if first == 0:
            after.update({name: b.clone() for name, b in model.named_buffers()})
        return [p.grad * len(indices) for p in model.parameters() if p.grad is not None], float(len(indices))

    model.train()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    for step in range(steps):
        after: dict[str, Tensor] = {}
        total, weight = slot_sum(step, 0, order.slots)
        assert total is not None
        for parameter, grad in zip(model.parameters(), total, strict=True):
            parameter.grad = grad / weight
        optimizer.step()
        buffers = after
    model.load_state_dict(buffers, strict=False)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01, fused=True)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.001)),
    ],
)
def test_the_bits_are_those_of_a_plain_loop(name: str, make: Any) -> None:
    task = OddTask(samples=106)
    done = simulate(
        task,
        optimizer=OPTIMIZERS[name],
        batch={"size": 32, "slots": 5},
        stop={"steps": 10},
        cluster={"workers": 3, "servers": 2},
    )
    torch.manual_seed(0)
    model = task.model()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain_loop(task, make(model.parameters()), model, done.plan.order, steps=10)
    torch.set_num_threads(threads)
    assert done.sha256 == fingerprint(model.state_dict())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_slots_are_the_mathematics_of_the_whole_batch(dtype: torch.dtype, limit: float) -> None:
    task = Smooth(dtype)
    done = simulate(
        task,
        optimizer={"name": "adam", "lr": 0.01},
        batch={"size": 32, "slots": 5},
        stop={"steps": 100},
        cluster={"workers": 3, "servers": 2},
    )
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    source, order = open_source(task.train_data()), done.plan.order
    for step in range(100):
        optimizer.zero_grad()
        batch = source.batch(np.concatenate([order.indices(step, k) for k in range(order.slots)]))
        task.loss(model, batch).backward()
        optimizer.step()
    ours = torch.cat([done.state[name].reshape(-1) for name, _ in model.named_parameters()])
    theirs = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert float((ours - theirs).norm() / theirs.norm()) <= limit


class Peculiar(nn.Module):
    """Tied, frozen, and unused in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.rare = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(self.two(self.one(x).tanh()).tanh())
        return hidden + self.rare(x) if float(x.sum()) > 0 else hidden


class PeculiarTask(Smooth):
    def model(self) -> nn.Module:
        return Peculiar().to(self.dtype)

    def train_data(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(3), dtype=self.dtype)
        return x, x.cos()


def test_tied_frozen_and_unused_parameters_train_as_in_plain_torch() -> None:
    task = PeculiarTask()
    done = simulate(
        task,
        optimizer={"name": "sgd", "lr": 0.1},
        batch={"size": 16, "slots": 1},
        stop={"steps": 12},
        cluster={"workers": 1, "servers": 2},
    )
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    source = open_source(task.train_data())
    unused = 0
    for step in range(12):
        optimizer.zero_grad()
        task.loss(model, source.batch(done.plan.order.indices(step, 0))).backward()
        unused += model.rare.weight.grad is None  # type: ignore[union-attr]
        optimizer.step()
    assert 0 < unused < 12
    assert torch.equal(done.state["two.weight"], done.state["one.weight"])
    assert done.sha256 == fingerprint(model.state_dict())


def test_bits_are_promised_in_full_sync_mode_on_a_cpu_alone() -> None:
    def bits(**sections: Any) -> str:
        return prepare(config(OddTask(106), batch={"size": 32, "slots": 4}, **sections), OddTask(106)).bits

    assert bits() == "promised"
    assert bits(consistency={"quorum": 3}) == "not promised"
    assert bits(consistency={"mode": "async"}) == "not promised"
    assert bits(cluster={"gpus": 1, "backend": "ray"}) == "not promised"
    assert bits(cluster={"server_device": "cuda", "server_gpus": 0.5, "backend": "ray"}) == "not promised"
