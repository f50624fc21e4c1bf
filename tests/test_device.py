"""Between a card and host memory: what is copied when, what is registered, and that neither changes a number.

Where there is no GPU the CPU plays the card, and copies are made at the first or at the last moment that is allowed.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distgd import gradients, server
from distgd.device import LEAST, PORTABLE, READ_ONLY, Card, Pins
from distgd.gradients import Watch
from distgd.layout import Layout, tensor_of
from distgd.mirror import MirroredOptimizer
from distgd.optim import OptimizerSpec, PieceOptimizer
from distgd.optim.optimizers import ELEMENTWISE
from distgd.prepare import prepare
from distgd.replica import Replica
from distgd.sources import Order
from distgd.transport.segments import PAGE, SUPPORTED, Segment
from tests.simulate import OddTask, config, simulate

ORDER = Order(samples=64, batch=16, slots=2, seed=5)
CPU = torch.device("cpu")
linux = pytest.mark.skipif(not SUPPORTED, reason="Linux only")


@dataclass
class Copies:
    """Copies at once, or not before somebody waits for them; `log` has what happened in order."""

    late: bool
    log: list[str] = field(default_factory=list)
    begun: int = 0
    pending: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self, into: Tensor, value: Tensor, *, blocking: bool = False) -> Callable[[], None]:
        self.log.append(f"begin {into.numel()}" + (" blocking" if blocking else ""))
        number = self.begun
        self.pending[number] = (into, value)
        self.begun += 1
        if blocking or not self.late:
            self.make(number)
        return lambda: self.wait(number, into.numel())

    def make(self, last: int) -> None:
        for number in [number for number in self.pending if number <= last]:
            into, value = self.pending.pop(number)
            into.copy_(value)

    def join(self) -> None:
        self.log.append("join")
        self.make(self.begun)

    def wait(self, number: int, size: int) -> None:
        self.log.append(f"wait {size}")
        self.make(number)


@dataclass
class Cudart:
    """CUDA's two functions, on paper; it refuses with `error` what has one of the flags in `refuses`."""

    refuses: int = 0
    error: int = 801
    registered: dict[int, tuple[int, int]] = field(default_factory=dict)  # address -> bytes, flags
    calls: int = 0
    forgotten: int = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls += 1
        if flags & self.refuses:
            return self.error
        assert address not in self.registered
        self.registered[address] = (size, flags)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def forget(self) -> None:
        self.forgotten += 1


def a_card(late: bool = True, refuses: int = 0) -> tuple[Card, Copies, Cudart]:
    copies, cudart = Copies(late), Cudart(refuses)
    return Card(CPU, copies, Pins(cudart, cudart.forget)), copies, cudart


class Two(nn.Module):
    """A large parameter that autograd finishes first, another one last, and small ones between."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(4, gradients.LARGE // 4)
        self.norm = nn.LayerNorm(gradients.LARGE // 4)
        self.late = nn.Linear(gradients.LARGE // 4, 5)
        self.unused = nn.Parameter(torch.ones(gradients.LARGE))
        self.lonely = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        return self.late(torch.tanh(self.norm(self.early(x)))).mean(1, keepdim=True)


class Task:
    def model(self) -> nn.Module:
        return Two()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def train_data(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return x, x[:, :1].sin()


def gradient(replica: Replica, out: Tensor | None = None, slot: int = 1) -> tuple[Any, Tensor]:
    out = replica.layout.zeros() if out is None else out
    for view in replica.layout.views(out).values():
        view.fill_(9.0)
    return replica.gradient(replica.train_source(), ORDER, 0, slot, out), out


def shared(layout: Layout) -> Tensor:
    """A flat vector in a segment."""
    return torch.from_numpy(Segment.allocate(layout.size * layout.itemsize).memory.view(layout.dtype)[: layout.size])


class TestPins:
    @linux
    def test_memory_is_registered_once_and_let_go_with_its_holder(self) -> None:
        cudart = Cudart()
        pins = Pins(cudart, cudart.forget)
        one, other = Segment.allocate(LEAST), Segment.allocate(LEAST)
        for _ in range(2):
            assert pins.pin("one", tensor_of(one.memory))
            assert pins.pin("other", tensor_of(other.memory), read_only=True)
        expected = {one.address: (LEAST, PORTABLE), other.address: (LEAST, PORTABLE | READ_ONLY)}
        assert (cudart.registered, cudart.calls) == (expected, 2)
        del pins
        gc.collect()
        assert cudart.registered == {}

    @linux
    def test_other_memory_under_a_key_takes_the_formers_place(self) -> None:
        cudart = Cudart()
        pins = Pins(cudart, cudart.forget)
        former, new = Segment.allocate(LEAST), Segment.allocate(LEAST)
        assert pins.pin(0, tensor_of(former.memory))
        assert pins.pin(0, tensor_of(new.memory))
        assert list(cudart.registered) == [new.address]

    @linux
    def test_a_refusal_is_told_once_and_not_tried_again(self, caplog: pytest.LogCaptureFixture) -> None:
        cudart = Cudart(refuses=READ_ONLY)
        pins = Pins(cudart, cudart.forget)
        segments = [Segment.allocate(LEAST) for _ in range(3)]
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert not any(pins.pin(i, tensor_of(s.memory), read_only=True) for i, s in enumerate(segments[:2]))
        assert [record.getMessage() for record in caplog.records] == [
            "CUDA registers no read-only shared memory (error 801): copies take its own buffers"
        ]
        assert (cudart.calls, cudart.forgotten) == (2, 2), "each asked for once, each error cleared"
        assert pins.pin(2, tensor_of(segments[2].memory)), "what may be written to is another matter"

    def test_memory_that_shares_its_pages_is_left_alone(self) -> None:
        cudart = Cudart()
        pins = Pins(cudart, cudart.forget)
        whole = torch.zeros(LEAST + 2 * PAGE, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE
        assert not pins.pin("small", whole[start : start + LEAST - 1])
        assert not pins.pin("between", whole[start + 1 : start + 1 + LEAST])
        assert cudart.calls == 0
        assert pins.pin("whole", whole[start : start + LEAST])

    def test_the_cpu_is_no_card(self) -> None:
        assert Card.of(CPU) is None
        assert Replica(Task(), 3)._card is None


class TestGradients:
    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("clip", [None, 1e-3])
    def test_they_are_those_of_the_cpu_in_every_bit(self, late: bool, clip: float | None) -> None:
        expected, in_place = gradient(Replica(Task(), 3, clip=clip))
        found, copied = gradient(Replica(Task(), 3, clip=clip, card=a_card(late)[0]))
        if clip is None:
            assert torch.equal(copied, in_place)
        assert torch.allclose(copied, in_place, rtol=1e-5)
        assert found.stats.squared_norm == pytest.approx(expected.stats.squared_norm, rel=1e-5)
        assert (found.stats.loss, found.bad) == (expected.stats.loss, False)

    @pytest.mark.parametrize("late", [False, True])
    def test_slots_one_after_the_other_do_not_mix(self, late: bool) -> None:
        plain, replica = Replica(Task(), 3), Replica(Task(), 3, card=a_card(late)[0])
        found = [gradient(replica, slot=slot)[1] for slot in (0, 1, 0)]
        assert all(torch.equal(out, gradient(plain, slot=slot)[1]) for out, slot in zip(found, (0, 1, 0), strict=True))

    def test_a_large_one_leaves_before_autograd_makes_the_next(self) -> None:
        card, copies, _ = a_card()
        replica = Replica(Task(), 3, card=card)
        weight = replica.model.get_parameter("early.weight")
        weight.register_hook(lambda grad: copies.log.append("autograd makes the last one"))  # type: ignore[no-untyped-call]
        gradient(replica)
        large = gradients.LARGE
        assert copies.log[:3] == [f"begin {5 * large // 4}", "autograd makes the last one", f"begin {large}"]
        assert copies.log[3] == f"begin {large}", "zeros for what the loss does not use"
        begun = [line for line in copies.log if line.startswith("begin")]
        assert sorted(int(line.split()[1]) for line in begun[3:]) == [64, 64, 3 * large // 4], "small ones together"
        waits = [line.replace("begin", "wait") for line in begun]
        assert copies.log[-len(waits) :] == waits, "for nothing before all have begun"

    @pytest.mark.parametrize("late", [False, True])
    def test_what_autograd_finishes_twice_is_added(self, late: bool) -> None:
        from tests.test_replica import Wide, checkpointed_twice

        def of(card: Card | None) -> Tensor:
            replica = Replica(Wide(checkpointed_twice), 3, card=card)
            out = replica.layout.zeros()
            replica.gradient(replica.train_source(), Order(30, 12, 4, 5), 0, 1, out)
            return out

        assert torch.equal(of(a_card(late)[0]), of(None))

    def test_whoever_waits_for_a_range_is_told_when_it_has_arrived(self) -> None:
        card, copies, _ = a_card()
        replica = Replica(Task(), 3, card=card)
        expected, out = gradient(Replica(Task(), 3))[1], replica.layout.zeros().fill_(9.0)
        ranges = [(at, min(at + 20_000, replica.layout.size)) for at in range(0, replica.layout.size, 20_000)]
        told: list[int] = []
        missing: list[int] = []

        def final(number: int) -> None:
            told.append(number)
            missing.append(len(copies.pending))
            first, stop = ranges[number]
            assert torch.equal(out[first:stop], expected[first:stop])

        replica.gradient(replica.train_source(), ORDER, 0, 1, out, Watch(ranges, final))
        assert sorted(told) == list(range(len(ranges))), "each once, from the first time on"
        assert missing[0] > missing[-1] == 0, "and not all at the end"

    def test_what_is_not_finite_is_bad(self) -> None:
        class Endless(Task):
            def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
                loss = super().loss(model, batch)
                return (loss - loss.detach()).sqrt()

        assert gradient(Replica(Endless(), 3, card=a_card()[0]))[0].bad

    @linux
    def test_their_places_in_shared_memory_are_registered_once(self) -> None:
        card, _, cudart = a_card()
        replica = Replica(Task(), 3, card=card)
        places = [shared(replica.layout) for _ in range(2)]
        for out in (*places, *places):
            gradient(replica, out)
        expected = {out.data_ptr(): (replica.layout.size * replica.layout.itemsize, PORTABLE) for out in places}
        assert (cudart.registered, cudart.calls) == (expected, 2)


class TestWeights:
    @linux
    @pytest.mark.parametrize("refuses", [0, READ_ONLY], ids=["pinned", "refused"])
    def test_a_shards_own_memory_is_copied_beside_the_card_where_it_can_be_pinned(self, refuses: int) -> None:
        card, copies, cudart = a_card(refuses=refuses)
        replica = Replica(Task(), 3, card=card)
        slices, weights = self.sent(replica)
        for _ in range(2):
            replica.install(slices, weights, None, shared=True)
        how = " blocking" if refuses else ""
        assert copies.log == 2 * [*(f"begin {part.size}{how}" for part in slices), "join"]
        assert [flags for _, flags in cudart.registered.values()] == ([] if refuses else 2 * [PORTABLE | READ_ONLY])
        assert torch.equal(replica.flat, torch.arange(replica.layout.size, dtype=torch.float32))

    @pytest.mark.parametrize("is_shared", [False, True])
    def test_what_a_message_brought_has_been_read_when_install_returns(self, is_shared: bool) -> None:
        card, copies, cudart = a_card()
        replica = Replica(Task(), 3, card=card)
        slices = replica.layout.slices(2)
        values = np.arange(replica.layout.size, dtype=np.float32)
        brought = {part.index: values[part.start : part.stop].copy() for part in slices}
        replica.install(slices, brought, None, shared=is_shared)
        assert all("blocking" in line for line in copies.log[:2])
        assert copies.log[2:] == ["join"]
        assert cudart.calls == 0
        assert torch.equal(replica.flat, torch.from_numpy(values))

    @staticmethod
    def sent(replica: Replica) -> tuple[Any, dict[int, np.ndarray[Any, Any]]]:
        """Weights 0, 1, 2, ... in two other processes' segments, mapped read-only."""
        slices, weights = replica.layout.slices(2), {}
        for part in slices:
            own = Segment.allocate(part.size * 4)
            own.memory.view(np.float32)[: part.size] = np.arange(part.start, part.stop)
            weights[part.index] = Segment.adopt(os.dup(own.descriptor)).memory.view(np.float32)[: part.size]
        return slices, weights


SHAPES = [("a", (1000,)), ("b", (3, 5)), ("c", (300, 7)), ("d", (70,))]
STEPS = 3


def mirrored(
    name: str, card: Card, scattered: bool = False, load: bool = False
) -> tuple[Tensor, Tensor, MirroredOptimizer]:
    """`STEPS` steps of the second of two shards on the card and beside it on the CPU: both's weights."""
    layout, generator = Layout.of(SHAPES, "float32"), torch.Generator().manual_seed(0)
    part = layout.slices(2)[1]
    weights = torch.zeros(part.size)
    for piece in part.pieces:
        weights[piece.start : piece.start + piece.size].normal_(generator=generator)
    expected, spec = weights.clone(), OptimizerSpec(name, {"lr": 0.05})
    plain = PieceOptimizer(spec, [(p.name, expected[p.start : p.start + p.size]) for p in part.pieces], block=256)
    other = MirroredOptimizer(spec, part, weights, card, block=256)
    for _ in range(STEPS):
        if load:
            other.load_state_dict(plain.state_dict())
        flat = torch.randn(part.size, generator=generator)
        grads = [flat[p.start : p.start + p.size] for p in part.pieces]
        plain.step(grads, 0.5)
        other.step([grad.clone() for grad in grads] if scattered else grads, 0.5)
    return weights, expected, other


class TestShard:
    @pytest.mark.parametrize("name", ELEMENTWISE)
    def test_the_weights_are_those_of_the_cpu_after_every_update(self, name: str) -> None:
        weights, expected, optimizer = mirrored(name, a_card()[0])
        assert len(optimizer.blocks) > 3
        assert torch.equal(weights, expected)

    @pytest.mark.parametrize("how", [{"scattered": True}, {"load": True}], ids=str)
    def test_neither_where_gradients_lie_nor_a_loaded_state_matters(self, how: dict[str, bool]) -> None:
        weights, expected, _ = mirrored("Adam", a_card()[0], **how)
        assert torch.equal(weights, expected)

    def test_a_blocks_weights_are_back_and_its_gradient_may_be_written_to(self) -> None:
        weights = torch.zeros(128)
        part = Layout.of([("a", (128,))], "float32").slices(1)[0]
        optimizer = MirroredOptimizer(OptimizerSpec("SGD", {"lr": 1.0}), part, weights, a_card()[0], block=64)
        scratch = torch.empty(64)
        for number in range(2):
            optimizer.step_block(number, [scratch.fill_(-1.0 - number)])
            assert [set(half.tolist()) for half in weights.split(64)] == [{1.0}, {2.0 * number}]

    @linux
    def test_its_weights_are_registered(self) -> None:
        layout = Layout.of([("a", (LEAST,))], "float32")
        card, _, cudart = a_card()
        weights = shared(layout)
        held = MirroredOptimizer(OptimizerSpec("SGD", {"lr": 1.0}), layout.slices(1)[0], weights, card, block=1 << 15)
        assert list(cudart.registered) == [weights.data_ptr()]
        assert len(held.blocks) == 2

    def test_a_shard_without_a_piece_has_nothing_to_step(self) -> None:
        part = Layout.of([("a", (1,))], "float32").slices(2)[0]
        assert part.size == 0
        MirroredOptimizer(OptimizerSpec("Adam", {"lr": 1.0}), part, torch.zeros(0), a_card()[0], block=64).step([])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("consistency", "machines"),
    [({}, 1), ({}, 2), ({"quorum": 3}, 1), ({"mode": "bounded", "staleness": 1}, 1)],
    ids=str,
)
def test_a_whole_run_on_cards_has_the_bits_of_one_without(
    consistency: dict[str, Any], machines: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"batch": {"size": 32, "slots": 4}, "stop": {"steps": 6}, "consistency": consistency}
    how |= {"optimizer": {"name": "adam", "lr": 0.01}, "cluster": {"workers": 3, "servers": 2}}
    expected = simulate(OddTask(106), **how)
    made: list[Copies] = []  # in the order of the driver, the workers and the servers

    def of(device: torch.device) -> Card:
        card, copies, _ = a_card(late)
        made.append(copies)
        return card

    monkeypatch.setattr(Card, "of", of)
    monkeypatch.setattr(gradients, "LARGE", 1000)
    monkeypatch.setattr(server, "CARD_BLOCK", 512)
    assert simulate(OddTask(106), machines=machines, bucket=1024, **how).sha256 == expected.sha256
    assert len(made) == 1 + 2 + 3 and all(copies.log for copies in made[1:4])


def test_what_lies_on_a_card_is_not_counted_in_the_hosts_memory() -> None:
    def plan(**cluster: Any) -> dict[str, Any]:
        how = {"batch": {"size": 32, "slots": 4}, "optimizer": {"name": "adam"}, "stop": {"steps": 2}}
        return prepare(config(OddTask(106), cluster={"backend": "ray", **cluster}, **how), OddTask(106)).as_dict()

    plain, card = plan(), plan(server_device="cuda", server_gpus=0.5)
    weights = plain["bytes_pulled_per_step"] // plain["workers"]
    assert plain["bytes_shard"] - card["bytes_shard"] == 2 * weights, "Adam's two vectors"
    assert (plain["bytes_shard_card"], card["bytes_shard_card"]) == (0, 3 * weights)


# On a GPU.

CUDA = torch.device("cuda")


def on_the_gpu() -> Card:
    card = Card.of(CUDA)
    assert card is not None
    return card


@pytest.mark.gpu
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_gradient_of_a_gpu_is_the_cpus_but_for_rounding(clip: float | None) -> None:
    plain, replica = Replica(Task(), 3, clip=clip), Replica(Task(), 3, "cuda", clip=clip)
    out = shared(replica.layout)
    for slot in (0, 1, 0):
        expected, in_place = gradient(plain, slot=slot)
        found, _ = gradient(replica, out, slot=slot)
        assert torch.allclose(out, in_place, rtol=1e-3, atol=1e-5)
        assert found.stats.squared_norm == pytest.approx(expected.stats.squared_norm, rel=1e-3)
        assert found.stats.loss == pytest.approx(expected.stats.loss, rel=1e-3)
    assert out.is_pinned()


@pytest.mark.gpu
def test_weights_reach_a_gpu_before_it_computes_with_them() -> None:
    replica = Replica(Task(), 3, "cuda")
    slices, weights = TestWeights.sent(replica)
    for _ in range(3):
        replica.flat.zero_()
        replica.install(slices, weights, None, shared=True)
        assert torch.equal(replica.flat.cpu(), torch.arange(replica.layout.size, dtype=torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("load", [False, True], ids=["fresh", "loaded"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_shard_on_a_gpu_steps_as_on_the_cpu_but_for_rounding(name: str, load: bool) -> None:
    weights, expected, optimizer = mirrored(name, on_the_gpu(), load=load)
    assert torch.allclose(weights, expected, rtol=1e-4, atol=1e-5)
    entries = [entry for own in optimizer.state_dict().values() for each in own.values() for entry in each.values()]
    assert {entry.device for entry in entries} <= {CPU}


@pytest.mark.gpu
def test_a_segment_is_registered_and_let_go() -> None:
    segment = Segment.allocate(LEAST)
    memory, card = tensor_of(segment.memory), on_the_gpu()
    assert card.pins.pin(0, memory)
    assert memory.is_pinned()
    del card
    gc.collect()
    assert not memory.is_pinned()


@pytest.mark.gpu
@pytest.mark.parametrize("twice", [lambda memory: memory, lambda memory: memory[PAGE:]], ids=["same", "part"])
def test_a_refused_registering_is_not_blamed_on_the_next_kernel(twice: Callable[[Tensor], Tensor]) -> None:
    memory, card = tensor_of(Segment.allocate(2 * LEAST).memory), on_the_gpu()
    assert card.pins.pin(0, memory)
    assert not card.pins.pin(1, twice(memory))
    assert torch.ones(3, device=CUDA).add_(1).tolist() == [2.0, 2.0, 2.0]


STRICT = """
import torch
from tests.test_device import Task, gradient
from distgd.replica import Replica
torch.use_deterministic_algorithms(True)
one, other = (gradient(Replica(Task(), 3, "cuda"))[1] for _ in range(2))
print(torch.equal(one, other))
"""


@pytest.mark.gpu
def test_under_torchs_strict_flags_a_gpu_gives_the_same_bits_again() -> None:
    env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run([sys.executable, "-c", STRICT], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.gpu
def test_an_untouched_gap_of_the_flat_vector_stays_zero_on_a_gpu() -> None:
    replica = Replica(Task(), 3, "cuda")
    _, out = gradient(replica)
    ends = [entry.start + entry.size for entry in replica.layout.entries]
    starts = [entry.start for entry in replica.layout.entries[1:]] + [replica.layout.size]
    assert all(not out[end:start].any() for end, start in zip(ends, starts, strict=True))
    assert all(end <= start for end, start in pairwise([0, *starts]))
