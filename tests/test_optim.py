"""Optimizers on pieces against torch on whole tensors, schedules against torch's, and what the config may say."""

from __future__ import annotations

import inspect
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import lr_scheduler

from distgd.config.sections import Group, Optimizer, Schedule
from distgd.errors import BadInput
from distgd.layout import Layout
from distgd.optim import OptimizerSpec, PieceOptimizer, check_groups, clip_scale, resolve_optimizer, resolve_schedule
from distgd.optim.optimizers import ELEMENTWISE, REFUSED
from distgd.optim.schedules import SHAPES as SCHEDULES
from distgd.optim.schedules import USED_KEYS

SHAPES = {"w": (257, 33), "w.bias": (257,), "v": (1003, 7), "v.bias": (3,)}
STEPS = 20


def optimizer_section(
    name: str, lr: float | None = None, arguments: Mapping[str, Any] | None = None, groups: Sequence[Group] = ()
) -> Optimizer:
    return Optimizer(name=name, lr=lr, groups=tuple(groups), **(arguments or {}))


def group(match: str, **arguments: Any) -> Group:
    return Group(match=match, **arguments)


class Shards:
    """Random weights in a flat vector, cut into shards, each with its own optimizer."""

    def __init__(self, spec: OptimizerSpec, weights: Mapping[str, Tensor], shards: int) -> None:
        dtype = "float64" if weights["w"].dtype == torch.float64 else "float32"
        self.layout = Layout.of(((name, tuple(w.shape)) for name, w in weights.items()), dtype)
        self.flat = self.layout.flatten(weights)
        self.slices = self.layout.slices(shards)
        self.optimizers = [
            PieceOptimizer(spec, [(p.name, self.flat[s.start + p.start :][: p.size]) for p in s.pieces])
            for s in self.slices
        ]

    def step(self, grads: Mapping[str, Tensor], scale: float) -> None:
        flat = self.layout.flatten(grads)
        for s, optimizer in zip(self.slices, self.optimizers, strict=True):
            optimizer.step([flat[s.start + p.start :][: p.size] for p in s.pieces], scale)

    def weights(self) -> dict[str, Tensor]:
        return self.layout.views(self.flat)


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def scale_at(step: int) -> float:
    return 1.0 / (1 + step)


def train_whole(spec: OptimizerSpec, steps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference: torch's optimizer on the tensors as the model has them."""
    weights = random_tensors(0, dtype)
    cls = getattr(torch.optim, spec.name)
    fused = {"fused": True} if "fused" in inspect.signature(cls).parameters else {}
    own = {
        name: spec.groups[spec.group_of(name)][1] if spec.group_of(name) < len(spec.groups) else {} for name in SHAPES
    }
    groups = [{"params": [weight], **own[name]} for name, weight in weights.items()]
    optimizer = cls(groups, **{**fused, **spec.arguments})
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for name, grad in random_tensors(1 + step, dtype).items():
            weights[name].grad = grad
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * scale_at(step)
        optimizer.step()
    return weights


def train_pieces(shards: Shards, first: int, last: int, dtype: torch.dtype) -> None:
    for step in range(first, last):
        shards.step(random_tensors(1 + step, dtype), scale_at(step))


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    differing = {name: int((found[name] != expected[name]).sum()) for name in expected}
    assert differing == dict.fromkeys(expected, 0)


CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ELEMENTWISE] + [
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "fused": False, "maximize": True}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "betas": [0.8, 0.99]}),
    ("AdamW", {"fused": False}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("ASGD", {"t0": 3}),
]
every_case = pytest.mark.parametrize(("name", "arguments"), CASES)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pieces_step_to_the_bits_of_whole_tensors(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    groups = [group("*.bias", lr=0.02)]
    spec = resolve_optimizer(optimizer_section(name, 0.05, arguments, groups))
    expected = train_whole(spec, STEPS, dtype)
    for count in (1, 2, 3):
        shards = Shards(spec, random_tensors(0, dtype), count)
        train_pieces(shards, 0, STEPS, dtype)
        assert_same_bits(shards.weights(), expected)


@every_case
@pytest.mark.parametrize("pause", [0, STEPS // 2])
def test_a_restored_state_continues_to_the_same_bits(name: str, arguments: dict[str, Any], pause: int) -> None:
    spec = resolve_optimizer(optimizer_section(name, 0.05, arguments))
    through = Shards(spec, random_tensors(0), 2)
    train_pieces(through, 0, pause, torch.float32)
    restored = Shards(spec, random_tensors(0), 2)
    train_pieces(restored, 0, 3, torch.float32)  # a state to be replaced, as in a rollback
    restored.flat.copy_(through.flat)
    for ours, theirs in zip(restored.optimizers, through.optimizers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    for shards in (through, restored):
        train_pieces(shards, pause, STEPS, torch.float32)
    assert_same_bits(restored.weights(), through.weights())


@every_case
def test_state_is_labelled_by_shape(name: str, arguments: dict[str, Any]) -> None:
    one = torch.zeros(1)  # the piece for which the two labels are easiest to confuse
    optimizer = PieceOptimizer(resolve_optimizer(optimizer_section(name, None, arguments)), [("one", one)])
    optimizer.step([torch.ones(1)])
    state = optimizer.state_dict()
    assert all(value.shape == (1,) for value in state["elementwise"].get("one", {}).values())
    assert all(value.shape == () for value in state["scalar"].get("one", {}).values())
    assert "step" in state["scalar"].get("one", {}) or name == "SGD"


def test_elementwise_state_is_cut_like_the_weights() -> None:
    """Joined over three shards, each entry is the entry of one shard: what restoring to another count rests on."""
    spec = resolve_optimizer(optimizer_section("adam"))
    joined = {}
    for count in (1, 3):
        shards = Shards(spec, random_tensors(0), count)
        train_pieces(shards, 0, STEPS, torch.float32)
        states = [optimizer.state_dict() for optimizer in shards.optimizers]
        joined[count] = {
            name: torch.cat([s["elementwise"][name]["exp_avg"] for s in states if name in s["elementwise"]])
            for name in SHAPES
        }
        assert {float(s["scalar"][name]["step"]) for s in states for name in s["scalar"]} == {STEPS}
    assert_same_bits(joined[3], joined[1])


def test_torch_has_no_optimizer_that_is_neither_proved_nor_refused() -> None:
    found = {
        name
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    assert found == {*ELEMENTWISE, *REFUSED}


def test_a_shard_without_pieces_does_nothing() -> None:
    optimizer = PieceOptimizer(resolve_optimizer(optimizer_section("adam")), [])
    optimizer.step([], 0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict() == {"elementwise": {}, "scalar": {}}


@every_case
def test_a_step_writes_the_piece_and_nothing_else(name: str, arguments: dict[str, Any]) -> None:
    weights, grad = torch.zeros(128), torch.ones(3)
    piece = weights[:3]
    PieceOptimizer(resolve_optimizer(optimizer_section(name, 0.1, arguments)), [("a", piece)]).step([grad])
    assert piece.grad is None
    assert torch.equal(grad, torch.ones(3))
    assert bool((weights[:3] != 0).all())
    assert bool((weights[3:] == 0).all())


@pytest.mark.parametrize("grads", [[], [torch.ones(3), torch.ones(3)]], ids=["fewer", "more"])
def test_one_gradient_for_each_piece(grads: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=f"expected 1 gradients, found {len(grads)}"):
        PieceOptimizer(OptimizerSpec("SGD", {"lr": 0.1}), [("a", torch.zeros(3))]).step(grads)


@pytest.mark.parametrize(
    "pieces",
    [[("a", torch.zeros(2, 2))], [("a", torch.zeros(4)[::2])], [("a", torch.zeros(2)), ("a", torch.zeros(2))]],
    ids=["matrix", "strided", "twice"],
)
def test_pieces_that_are_no_pieces_are_refused(pieces: list[tuple[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match="piece"):
        PieceOptimizer(OptimizerSpec("SGD", {"lr": 0.1}), pieces)


@pytest.mark.parametrize(
    "state",
    [
        {"elementwise": {"b": {"exp_avg": torch.zeros(3)}}},
        {"elementwise": {"a": {"exp_avg": torch.zeros(4)}}},
        {"elementwise": {"a": {"step": torch.tensor(1.0)}}},
        {"scalar": {"a": {"exp_avg": torch.zeros(3)}}},
    ],
    ids=["unknown", "length", "label", "other label"],
)
def test_a_state_that_does_not_fit_is_refused_whole(state: Any) -> None:
    optimizer = PieceOptimizer(resolve_optimizer(optimizer_section("adam")), [("a", torch.zeros(3))])
    optimizer.step([torch.ones(3)])
    with pytest.raises(BadInput, match="optimizer state"):
        optimizer.load_state_dict(state)
    assert float(optimizer.state_dict()["scalar"]["a"]["step"]) == 1


def test_defaults_and_numbers_are_torchs() -> None:
    spec = resolve_optimizer(optimizer_section("ADAMW", None, {"betas": [0, 0.9], "eps": "1e-8"}))
    assert (spec.name, spec.arguments) == ("AdamW", {"betas": (0.0, 0.9), "eps": 1e-8, "lr": 0.001})
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_the_first_matching_group_takes_a_parameter() -> None:
    groups = [group("head.*", lr=0.5), group("*.bias", weight_decay=0)]
    spec = resolve_optimizer(optimizer_section("sgd", 0.1, {}, groups))
    assert [spec.group_of(name) for name in ("head.bias", "body.bias", "body.weight", "HEAD.x")] == [0, 1, 2, 2]
    assert spec.lrs(0.5) == {"head.*": 0.25, "*.bias": 0.05, "*": 0.05}
    check_groups(spec, ["head.bias", "body.bias"])


@pytest.mark.parametrize("names", [["body.weight", "head.weight"], ["head.bias"]], ids=["no match", "taken before"])
def test_a_group_that_takes_nothing_is_refused(names: list[str]) -> None:
    spec = OptimizerSpec("SGD", {"lr": 0.1}, (("head.*", {}), ("*.bias", {})))
    with pytest.raises(BadInput, match=rf"optimizer\.groups\[1\]\.match.*'\*\.bias'.*{names[0]}"):
        check_groups(spec, names)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (optimizer_section("adm"), r"optimizer\.name: .*adamw.*'adm'; did you mean adam\?"),
        (optimizer_section("LBFGS"), r"optimizer\.name: .*LBFGS .*loss again"),
        (optimizer_section("sparseadam"), "dense"),
        (optimizer_section("Adafactor"), "whole matrices"),
        (optimizer_section("muon"), "whole matrices"),
        (optimizer_section("lrscheduler"), r"optimizer\.name"),
        (optimizer_section("adam", None, {"weight_decay": -1}), r"optimizer\.weight_decay: .*found -1\.0; torch says"),
        (optimizer_section("adam", None, {"eps": math.nan}), r"optimizer\.eps: expected a finite number"),
        (optimizer_section("sgd", None, {"momentun": 0.9}), r"optimizer\.momentun: .*did you mean momentum\?"),
        (optimizer_section("adam", None, {"betas": [0.9, 1.5]}), r"optimizer\.betas: .*found \(0\.9, 1\.5\)"),
        (optimizer_section("adam", None, {"betas": 0.9}), r"optimizer\.betas: expected a list of 2 numbers"),
        (optimizer_section("adam", None, {"betas": [0.9]}), r"optimizer\.betas: expected a list of 2 numbers"),
        (optimizer_section("adam", None, {"eps": "x"}), r"optimizer\.eps: expected a finite number"),
        (optimizer_section("adam", None, {"amsgrad": 1}), r"optimizer\.amsgrad: expected true or false"),
        (optimizer_section("adam", None, {"eps": True}), r"optimizer\.eps: expected a finite number"),
        (optimizer_section("adam", None, {"foreach": True}), r"optimizer\.foreach: expected no such key"),
        (optimizer_section("rprop", None, {"fused": True}), r"optimizer\.fused: expected an argument of torch"),
        (optimizer_section("sgd", 0.1, {"momentum": -1, "nesterov": True}), r"optimizer\.momentum"),
        (optimizer_section("sgd", 0.1, {"nesterov": True}), r"optimizer\.nesterov: .*requires a momentum"),
        (optimizer_section("sgd", 0.1, {}, [group("*", lr=-1)]), r"optimizer\.groups\[0\]\.lr"),
        (
            optimizer_section("sgd", 0.1, {}, [group("*", weigth_decay=1)]),
            r"groups\[0\]\.weigth_decay.*mean weight_decay",
        ),
        (optimizer_section("sgd", 0.1, {}, [group("*", fused=True)]), r"groups\[0\]\.fused"),
        (
            optimizer_section("adagrad", 0.1, {}, [group("*", initial_accumulator_value=1)]),
            r"groups\[0\]\.initial_accumulator_value",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value.name} {value.arguments}",
)
def test_bad_optimizers_are_named(section: Optimizer, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve_optimizer(section)


def torch_factors(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("section", "make"),
    [
        (Schedule(name="step", gamma=0.5, step_size=7), lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
        (Schedule(name="exponential", gamma=0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        (Schedule(name="linear", final=0.1), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 40)),
        (Schedule(name="cosine", final=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, 40, 0.1)),
        (
            Schedule(name="one-cycle", final=0.001, pct_start=0.33, div_factor=10.0),
            lambda o: lr_scheduler.OneCycleLR(
                o, 1.0, 40, pct_start=0.33, div_factor=10.0, final_div_factor=100.0, cycle_momentum=False
            ),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else "",
)
def test_schedules_are_torchs(
    section: Schedule, make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    schedule = resolve_schedule(section, 40)
    assert [schedule.factor(step) for step in range(40)] == pytest.approx(torch_factors(make, 40), rel=1e-9, abs=1e-12)


def test_every_name_in_the_config_has_a_shape() -> None:
    names = get_args(Schedule.model_fields["name"].annotation)
    assert set(names) == SCHEDULES.keys() == USED_KEYS.keys()


def every_schedule(warmup: int, final: float) -> list[Schedule]:
    return [
        Schedule(name="constant", warmup=warmup),
        Schedule(name="step", warmup=warmup, gamma=0.5, step_size=3),
        Schedule(name="exponential", warmup=warmup, gamma=0.9),
        Schedule(name="linear", warmup=warmup, final=final),
        Schedule(name="cosine", warmup=warmup, final=final),
        Schedule(name="inverse-sqrt", warmup=warmup),
        Schedule(name="one-cycle", warmup=warmup, final=final),
    ]


@given(warmup=st.integers(0, 20), remaining=st.integers(1, 60), final=st.floats(0, 1))
def test_factors_rise_to_the_top_and_stay_within_bounds(warmup: int, remaining: int, final: float) -> None:
    for section in every_schedule(warmup, final):
        schedule = resolve_schedule(section, warmup + remaining)
        factors = [schedule.factor(step) for step in range(warmup + remaining + 2)]
        assert all(0 <= factor <= 1 for factor in factors)
        top = schedule.factor(warmup - 1) if warmup else 1.0
        assert factors[:warmup] == pytest.approx([top * (step + 1) / warmup for step in range(warmup)])
        assert factors[max(0, warmup - 1)] == 1.0 or section.name == "one-cycle"
        if section.name != "one-cycle":
            assert all(later <= earlier + 1e-12 for earlier, later in pairwise(factors[max(0, warmup - 1) :]))


@given(warmup=st.integers(1, 20), final=st.floats(0, 1))
def test_smooth_schedules_do_not_jump(warmup: int, final: float) -> None:
    for name in ("linear", "cosine", "one-cycle"):
        schedule = resolve_schedule(Schedule(name=name, warmup=warmup, final=final), warmup + 1000)
        after = [schedule.factor(step) for step in range(warmup - 1, warmup + 1010)]
        assert max(abs(later - earlier) for earlier, later in pairwise(after)) < 0.006


def test_the_last_value_holds() -> None:
    for name in ("linear", "cosine", "one-cycle"):
        schedule = resolve_schedule(Schedule(name=name, warmup=5, steps=25, final=0.125), 1000)
        assert [schedule.factor(step) for step in (25, 26, 10**9)] == [0.125] * 3


@given(steps=st.integers(2, 50), pct_start=st.floats(0.01, 0.99))
def test_one_cycle_ends_at_final_on_its_last_step(steps: int, pct_start: float) -> None:
    schedule = resolve_schedule(Schedule(name="one-cycle", final=0.25, pct_start=pct_start), steps)
    assert schedule.factor(steps - 1) == 0.25


def test_one_cycle_peaks_at_the_base_rate() -> None:
    schedule = resolve_schedule(Schedule(name="one-cycle", final=0.25, pct_start=0.5), 20)
    assert (schedule.factor(0), schedule.factor(9), schedule.factor(19)) == (0.04, 1.0, 0.25)


@given(warmup=st.integers(1, 100), step=st.integers(0, 10_000))
def test_inverse_sqrt_is_vaswanis(warmup: int, step: int) -> None:
    schedule = resolve_schedule(Schedule(name="inverse-sqrt", warmup=warmup), None)
    number = step + 1
    paper = min(number**-0.5, number * warmup**-1.5) * math.sqrt(warmup)
    assert schedule.factor(step) == pytest.approx(paper)


@pytest.mark.parametrize(
    ("section", "total", "message"),
    [
        (Schedule(name="exponential"), 10, r"schedule\.gamma"),
        (Schedule(name="step", gamma=0.5), 10, r"schedule\.step_size"),
        (Schedule(name="linear"), None, r"schedule\.steps"),
        (Schedule(name="cosine"), None, r"schedule\.steps"),
        (Schedule(name="one-cycle"), None, r"schedule\.steps"),
        (Schedule(name="cosine", gamma=0.5), 10, r"schedule\.gamma: .*cosine.*0\.5; remove"),
        (Schedule(name="exponential", gamma=0.5, final=0.1), 10, r"schedule\.final"),
        (Schedule(name="cosine", pct_start=0.5), 10, r"schedule\.pct_start"),
        (Schedule(name="linear", div_factor=5.0), 10, r"schedule\.div_factor"),
        (Schedule(name="constant", steps=5), 10, r"schedule\.steps"),
        (Schedule(name="exponential", gamma=0.5, step_size=3), 10, r"schedule\.step_size"),
        (Schedule(name="cosine", warmup=10), 10, r"schedule\.warmup: expected less than .*10"),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else "",
)
def test_bad_schedules_are_named(section: Schedule, total: int | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve_schedule(section, total)


@given(norm=st.floats(0, 1e100), limit=st.floats(1e-6, 1e6))
def test_a_clipped_norm_is_the_limit_and_others_are_left(norm: float, limit: float) -> None:
    scale = clip_scale(norm * norm, limit)
    assert scale == 1.0 if math.sqrt(norm * norm) <= limit else scale * norm == pytest.approx(limit)
    assert clip_scale(norm * norm, None) == 1.0


def test_clipping_never_hides_a_nan() -> None:
    assert math.isnan(clip_scale(math.nan, 1.0))


def test_no_optimizer_loads_torchs_compiler() -> None:
    """It takes a second and 70 MB of each process. In a process of its own, as other tests may have loaded it."""
    program = """
import sys, torch
from distgd.optim import PieceOptimizer
from distgd.optim.optimizers import ELEMENTWISE, OptimizerSpec, resolve_optimizer
from distgd.config.sections import Optimizer
for name in ELEMENTWISE:
    resolve_optimizer(Optimizer(name=name, lr=0.1))
    PieceOptimizer(OptimizerSpec(name, {"lr": 0.1}), [("a", torch.zeros(64))]).step([torch.ones(64)])
    assert "torch._dynamo" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("more", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.1}, {"fused": False}])
def test_blocks_in_groups_under_a_schedule_are_stepped_to_the_bits_of_torch(name: str, more: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    names, sizes = ["a.weight", "a.bias", "b.weight"], [300, 10, 200]
    whole = [torch.randn(size, generator=generator) for size in sizes]
    groups: tuple[tuple[str, dict[str, Any]], ...] = (("*.bias", {"lr": 0.3, "weight_decay": 0.5}),)
    spec = OptimizerSpec(name, {"lr": 0.1, **more}, groups)
    pieces = [value.clone() for value in whole]
    ours = PieceOptimizer(spec, list(zip(names, pieces, strict=True)), block=128)
    theirs = getattr(torch.optim, name)(
        [{"params": [whole[1]], **groups[0][1]}, {"params": [whole[0], whole[2]]}], **{"fused": True, "lr": 0.1, **more}
    )
    for scale in (1.0, 0.5, 0.25, 2.0):
        grads = [torch.randn(size, generator=generator) for size in sizes]
        ours.step(grads, scale)
        for param, grad in zip(whole, grads, strict=True):
            param.grad = grad
        theirs.param_groups[0]["lr"], theirs.param_groups[1]["lr"] = 0.3 * scale, 0.1 * scale
        theirs.step()
        assert all(map(torch.equal, pieces, whole))
    assert all(ready is not None for ready in ours._ready) == more.get("fused", True)
