"""Every mistake that was made once: of ours, with what it did to a run, and of users, with what they are told."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulate import OddTask, Smooth, simulate
from torch import Tensor, nn

import distgd
from distgd.errors import BadInput
from distgd.inprocess import InProcessCluster
from distgd.sources import Order, TensorSource, to_device
from distgd.trainer import launch
from distgd.worker import Worker

PARTS = {"batch": {"size": 16, "slots": 4}}


class Masked(Smooth):
    """The loss weighs its samples by a mask, as padding does; some slots have nothing left, and no mean."""

    def __init__(self, nothing: float = 0.0) -> None:
        super().__init__()
        self.nothing = nothing

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        x, y, mask = batch
        loss = ((model(x) - y).square().mean(1) * mask).sum()
        return (loss / mask.sum(), float(mask.sum())) if mask.any() else (loss * self.nothing, 0.0)

    def train_data(self) -> tuple[Tensor, ...]:
        x, y = super().train_data()
        return x[:64], y[:64], (torch.arange(64) % 5 == 0).double()


@pytest.mark.parametrize("nothing", [0.0, float("nan")], ids=["zero", "nan"])
@pytest.mark.parametrize("mode", ["sync", "bounded", "async"])
def test_a_slot_without_weight_adds_nothing_and_harms_nothing(mode: str, nothing: float) -> None:
    done = simulate(Masked(nothing), consistency={"mode": mode}, stop={"epochs": 3}, batch={"size": 16, "slots": 8})
    assert done.error is None
    assert all(bool(tensor.isfinite().all()) for tensor in done.state.values())
    assert done.driver.tally.samples == 3 * 64


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_that_can_weigh(weight: float) -> None:
    class Weighed(Smooth):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            return super().loss(model, batch), weight

    with pytest.raises(BadInput, match=r"task\.loss: expected a weight >= 0"):
        simulate(Weighed(), **PARTS)


@pytest.mark.parametrize("mode", ["bounded", "async"])
def test_the_schedule_goes_by_the_slots_step_also_where_epochs_end_short(mode: str) -> None:
    """33 samples in batches of 32 in 8 slots: every other step has one slot, so versions // slots is not the step."""
    done = simulate(
        builtin={"name": "counting", "args": {"samples": 33}},
        consistency={"mode": mode},
        batch={"size": 32, "slots": 8},
        stop={"epochs": 10},
        optimizer={"name": "sgd", "lr": 1.0},
        schedule={"name": "linear"},
        cluster={"workers": 1},
    )
    (weights,) = done.state.values()
    order, factor = done.plan.order, done.plan.schedule.factor
    expected = torch.zeros(33)
    for step in range(20):
        for slot in range(order.filled(step)):
            samples = order.indices(step, slot)
            expected[samples] += factor(step) / len(samples)
    assert torch.allclose(weights, expected, atol=1e-5)


class OneNet(Smooth):
    """Gives out the same module every time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.net = Smooth.model(self)

    def model(self) -> nn.Module:
        return self.net


def test_a_task_that_returns_one_module_each_time_trains_right() -> None:
    task = OneNet()
    before = {name: tensor.clone() for name, tensor in task.net.state_dict().items()}
    seen = {simulate(task, cluster={"workers": w, "servers": 2}, **PARTS).sha256 for w in (1, 2, 3)}
    assert len(seen) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.net.state_dict().items())


def test_empty_slots_do_not_fill_a_quorum() -> None:
    """10 samples, batches of 8: two samples and two empty slots in every second step, and one slow worker."""
    done = simulate(
        builtin={"name": "counting", "args": {"samples": 10}},
        batch={"size": 8, "slots": 4},
        consistency={"quorum": 2},
        stop={"epochs": 3},
        cluster={"workers": 4},
        pace=lambda incarnation: 0.05 if incarnation == 2 else 0.001,
    )
    applied = dict.fromkeys(range(6), 0)
    for line in done.lines:
        applied[line["step"]] += line["state"] == "applied"
    assert min(applied.values()) == 2, "a step is made of samples"


class Counted(nn.Module):
    """A buffer that counts the slots it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(12, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.line(x)


class CountedTask(Smooth):
    def __init__(self) -> None:
        super().__init__(torch.float32)

    def model(self) -> nn.Module:
        return Counted()


@pytest.mark.parametrize("seed", range(5))
def test_buffers_of_a_slot_that_was_dropped_are_dropped(seed: int) -> None:
    pace = lambda incarnation: 0.0012 if incarnation == 2 else 0.001  # noqa: E731 - slot 0's worker is late at times
    how: dict[str, Any] = {"consistency": {"quorum": 3}, "stop": {"steps": 60}, **PARTS}
    how |= {"cluster": {"workers": 4, "servers": 3}}  # while shard 0 waits for the others the late slot may come
    done = simulate(CountedTask(), seed=seed, pace=pace, **how)
    first = [line for line in done.lines if line["slot"] == 0 and line["state"] == "applied"]
    assert float(done.state["seen"]) == len(first)


def test_an_abandoned_slot_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A straggler under a quorum goes on with the newest step instead of finishing old ones."""
    in_vain: list[int] = []
    compute = Worker.perform

    def spy(self: Worker, work: Any, emit: Any) -> Any:
        done = compute(self, work, emit)
        if work.token != self.work.token and done.gradient.stats.samples:
            in_vain.append(work.step)
        return done

    monkeypatch.setattr(Worker, "perform", spy)
    done = simulate(
        CountedTask(),
        pace=lambda incarnation: 0.02 if incarnation == 2 else 0.001,
        consistency={"quorum": 2},
        batch={"size": 16, "slots": 8},
        stop={"steps": 30},
        cluster={"workers": 2},
    )
    assert done.error is None
    assert not in_vain


@pytest.mark.parametrize("samples", [1, 7, 33, 64])
def test_versions_and_steps_are_counted_without_going_through_them(samples: int) -> None:
    plan = simulate(
        builtin={"name": "counting", "args": {"samples": samples}},
        consistency={"mode": "async"},
        batch={"size": min(samples, 8), "slots": min(samples, 3)},
        stop={"epochs": 2},
    ).plan
    order, assignment = plan.order, plan.assignment()
    for steps in range(2 * order.steps_per_epoch + 1):
        version = sum(order.filled(step) for step in range(steps))
        assert assignment.versions(steps) == version
        assert assignment.steps_of(version) == steps


Pair = namedtuple("Pair", "x y")


def test_named_tuples_stay_what_they_are() -> None:
    batch = TensorSource(Pair(torch.arange(6.0), torch.arange(6))).batch(Order(6, 2, 1, 0).indices(0, 0))
    assert type(batch) is type(to_device(batch, "cpu")) is Pair


# What users are told.


class Complex(Smooth):
    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        return model


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class WithExtra(Smooth):
    def model(self) -> nn.Module:
        return nn.Sequential(Extra(12, 3)).double()


class Typo(Smooth):
    def eval_data(self) -> Any:
        return self.train_data()

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"accuracy": batch.no_such_thing}


class OwnBackward(Smooth):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        loss.backward(retain_graph=True)
        return loss


class NotANumber(Smooth):
    def model(self) -> nn.Module:
        model = super().model()
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")  # type: ignore[index]
        return model


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Complex(), r"task\.model: phase: expected a tensor of a plain dtype, found torch\.complex64"),
        (WithExtra(), r"task\.model: 0\._extra_state: expected a tensor of a plain dtype, found dict"),
        (Typo(), r"(?s)task: expected loss and metrics to take samples of eval_data.*no_such_thing.*test_mistakes\.py"),
        (OwnBackward(), r"task\.loss: expected a loss that leaves gradients alone"),
        (NotANumber(), r"task\.model: expected finite initial weights, found NaN or infinity in 0\.weight"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_cannot_work_is_said_before_anything_starts(task: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        simulate(task, **PARTS)


def test_a_short_last_batch_that_is_never_reached_is_no_matter() -> None:
    """33 samples with BatchNorm: one sample is left for the third step."""
    how: dict[str, Any] = {"batch": {"size": 16, "slots": 2}}
    assert simulate(OddTask(33), stop={"steps": 2}, **how).error is None
    with pytest.raises(BadInput, match="two samples or more in every slot"):
        simulate(OddTask(33), stop={"steps": 3}, **how)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: distgd.train(None), "train: expected a path, a mapping or a Config"),  # type: ignore[arg-type]
        (lambda: distgd.train({}, 3), "train: expected a path, a mapping or a Config"),  # type: ignore[arg-type]
        (lambda: distgd.train({"stop": {"steps": 1}}, task=OddTask), r"task: expected an object, found 'OddTask'"),
    ],
)
def test_wrong_arguments_of_train(call: Callable[[], object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        call()


def test_a_task_object_takes_the_place_of_the_configs(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("task: digits\nstop: {steps: 2}\ntracking: {uri: none}\ncluster: {backend: inprocess}\n")
    result = distgd.train(file, f"run.storage={tmp_path}", task=OddTask(64))
    assert "digits" not in (Path(result.run_dir) / "config.yaml").read_text()
    assert "OddTask" in (Path(result.run_dir) / "config.yaml").read_text()


class Late(OddTask):
    """An error that shows only after steps were committed."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        return loss if model.training or len(batch[0]) < 10 else loss.expand(2)

    def eval_data(self) -> Any:
        return self.train_data()


def test_bad_input_in_mid_run_keeps_what_was_committed(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"cluster": {"backend": "inprocess"}, "tracking": {"uri": "none"}}
    given = {**sections, **PARTS, "run": {"storage": str(tmp_path)}, "stop": {"epochs": 3}}
    with pytest.raises(distgd.RunFailed, match=r"task\.loss: expected a scalar tensor") as caught:
        distgd.train(given, task=Late(112))
    lines = (Path(caught.value.result.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "end"
    assert caught.value.result.steps > 0


def test_an_error_that_nobody_foresaw_ends_the_run_properly(tmp_path: Path) -> None:
    class Breaks(InProcessCluster):
        def receive(self, timeout: float) -> Any:
            raise OSError("no such luck")

    from simulate import config

    plan = config(OddTask(64), run={"storage": str(tmp_path)})
    with pytest.raises(distgd.RunFailed, match="OSError: no such luck") as caught:
        launch(plan, "run", lambda event: None, task=OddTask(64), cluster=Breaks())
    lines = (Path(caught.value.result.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["status"] == "failed"


class Huge(Smooth):
    """A finite gradient whose multiple by the samples of a slot is not finite in float32."""

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return 2e37 * model[0].weight[0, 0] + 0.0 * super().loss(model, batch)  # type: ignore[index]


def test_a_gradient_that_overflows_by_its_weight_is_not_applied() -> None:
    done = simulate(Huge(), batch={"size": 64, "slots": 2}, stop={"steps": 2})
    assert isinstance(done.error, distgd.Diverged)
    assert done.driver.tally.samples == 0
