"""One slot's gradient is a pure function of (weights, buffers, task, seed, step, slot); metrics are means of a set."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distgd.errors import BadInput, users_error
from distgd.gradients import LARGE, Watch
from distgd.layout import BufferLayout, block_squares, squared_norm
from distgd.replica import Replica
from distgd.sources import Order, open_source

ORDER = Order(samples=30, batch=12, slots=4, seed=5)
SHORT = Order(samples=14, batch=12, slots=4, seed=5)  # the second batch has 2 samples: slots 2 and 3 are empty


class Noisy:
    """Dropout, BatchNorm and both of the other generators."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        noise = random.random() + float(np.random.rand())
        return (model(batch[0] + noise) - batch[1]).square().mean()

    def train_data(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
        return x, x[:, :1]


class Line:
    """w @ x without chance; `answer` makes what the loss returns from the mean."""

    def __init__(self, answer: Any = lambda loss: loss) -> None:
        self.answer = answer

    def model(self) -> nn.Module:
        return nn.Linear(5, 1, bias=False)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        return self.answer((model(batch[0]) - batch[1]).square().mean())

    def train_data(self) -> tuple[Tensor, Tensor]:
        return Noisy().train_data()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor | float]:
        error = (model(batch[0]) - batch[1])[:, 0]
        return {"each": error, "mean": float(error.mean())}


def slot(replica: Replica, step: int, k: int, order: Order = ORDER) -> tuple[Any, Tensor]:
    out = replica.layout.zeros()
    return replica.gradient(replica.train_source(), order, step, k, out), out


class TestPurity:
    def test_neither_history_nor_generators_matter(self) -> None:
        one, other = Replica(Noisy(), seed=3), Replica(Noisy(), seed=3)
        expected, grad = slot(one, 1, 2)
        for step, k in [(0, 0), (2, 1), (1, 2)]:
            torch.manual_seed(step)
            random.seed(step)
            np.random.seed(step)
            found, other_grad = slot(other, step, k)
        assert torch.equal(other_grad, grad)
        assert (found.stats, found.bad) == (expected.stats, expected.bad)
        assert np.array_equal(found.buffers, expected.buffers)

    def test_slots_and_seeds_have_chances_of_their_own(self) -> None:
        grads = [slot(Replica(Noisy(), seed=3), *place)[1] for place in [(0, 0), (0, 1), (1, 0)]]
        assert not any(torch.equal(a, b) for a, b in [(grads[0], grads[1]), (grads[0], grads[2])])
        model = Replica(Noisy(), seed=3)
        model.seed = 4
        assert not torch.equal(slot(model, 0, 0)[1], grads[0])

    def test_buffers_start_at_their_committed_value_and_stay_there(self) -> None:
        replica = Replica(Noisy(), seed=3)
        committed = replica.buffers.copy()
        new = slot(replica, 0, 0)[0].buffers
        assert np.array_equal(replica.buffers, committed), "only a commit changes them"
        assert new is not None and not np.array_equal(new, committed)
        replica.buffers = new
        again = slot(replica, 0, 0)[0].buffers
        assert not np.array_equal(again, new), "the running mean moved on from the committed one"

    def test_a_model_without_buffers_sends_none(self) -> None:
        assert slot(Replica(Line(), seed=3), 0, 0)[0].buffers is None


class TestGradient:
    def test_it_is_the_slots_weight_times_its_mean_gradient(self) -> None:
        replica = Replica(Line(), seed=3)
        found, out = slot(replica, 0, 1)
        x, y = open_source(Line().train_data()).batch(ORDER.indices(0, 1))
        weight = replica.flat[:5].clone().requires_grad_()
        loss = (x @ weight - y[:, 0]).square().mean()
        loss.backward()
        assert torch.allclose(out[:5], weight.grad * 3)  # type: ignore[operator]
        assert (found.stats.samples, found.stats.weight) == (3, 3.0)
        assert found.stats.loss == pytest.approx(float(loss.detach()))
        assert found.stats.squared_norm == pytest.approx(float(weight.grad.square().sum()))  # type: ignore[union-attr]

    @pytest.mark.parametrize("weight", [7.0, torch.tensor(7)])
    def test_a_loss_may_say_its_own_weight(self, weight: Any) -> None:
        found, out = slot(Replica(Line(lambda loss: (loss, weight)), seed=3), 0, 1)
        plain, plain_out = slot(Replica(Line(), seed=3), 0, 1)
        assert found.stats.weight == 7.0
        assert torch.allclose(out / 7.0, plain_out / 3.0)
        assert found.stats.loss == plain.stats.loss

    def test_an_empty_slot_weighs_nothing_and_touches_nothing(self) -> None:
        replica = Replica(Line(), seed=3)
        out = replica.layout.zeros().fill_(9.0)
        found = replica.gradient(replica.train_source(), SHORT, 1, 3, out)
        assert (found.stats.samples, found.stats.weight, found.bad) == (0, 0.0, False)
        assert set(out.tolist()) == {9.0}

    def test_what_is_left_in_out_does_not_count(self) -> None:
        """Between the tensors there is always zero; nobody writes there."""
        replica = Replica(Line(), seed=3)
        out = replica.layout.zeros()
        for view in replica.layout.views(out).values():
            view.fill_(9.0)
        replica.gradient(replica.train_source(), ORDER, 0, 0, out)
        assert torch.equal(out, slot(replica, 0, 0)[1])

    @pytest.mark.parametrize("clip", [0.01, 1e6])
    def test_clipping_limits_the_mean_gradient_and_reports_its_norm_before(self, clip: float) -> None:
        plain, plain_out = slot(Replica(Line(), seed=3), 0, 1)
        found, out = slot(Replica(Line(), seed=3, clip=clip), 0, 1)
        norm = squared_norm(block_squares(out / 3)) ** 0.5
        assert norm <= clip * (1 + 1e-5)
        assert found.stats.squared_norm == pytest.approx(
            plain.stats.squared_norm, rel=1e-6
        )  # added after scaling there
        if clip > 1:
            assert torch.equal(out, plain_out)

    @pytest.mark.parametrize("factor", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_is_bad(self, factor: float) -> None:
        assert slot(Replica(Line(lambda loss: loss * factor), seed=3), 0, 0)[0].bad

    def test_a_finite_loss_with_a_gradient_that_is_not_is_bad(self) -> None:
        found, _ = slot(Replica(Line(lambda loss: (loss - loss.detach()).sqrt()), seed=3), 0, 0)
        assert found.stats.loss == 0.0
        assert found.bad

    @pytest.mark.parametrize(
        ("answer", "found"),
        [(lambda loss: loss.expand(3), r"a tensor of shape \(3,\)"), (lambda loss: 1.0, "the float")],
    )
    def test_anything_but_a_scalar_is_refused(self, answer: Any, found: str) -> None:
        with pytest.raises(BadInput, match=f"expected a scalar tensor, found {found}"):
            slot(Replica(Line(answer), seed=3), 0, 0)


def test_the_parameters_are_views_of_one_vector() -> None:
    replica = Replica(Noisy(), seed=3)
    replica.flat.fill_(0.5)
    assert all(set(p.flatten().tolist()) == {0.5} for p in replica.model.parameters())


def test_frozen_values_are_the_drivers() -> None:
    class Half(Line):
        def model(self) -> nn.Module:
            model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 1))
            model[0].requires_grad_(False)
            return model

    driver = Replica(Half(), seed=1)
    worker = Replica(Half(), seed=2, frozen=driver.frozen())
    assert sorted(driver.frozen()) == ["0.bias", "0.weight"]
    assert all(np.array_equal(worker.frozen()[name], value) for name, value in driver.frozen().items())


class TestEvaluate:
    def test_batches_do_not_change_the_means(self) -> None:
        """The last batch weighs what it holds, for metrics by sample and by mean."""
        replica = Replica(Line(), seed=3)
        source = replica.train_source()
        whole = replica.evaluate(source, 30)
        for size in (1, 7, 29, 1000):
            assert replica.evaluate(source, size) == pytest.approx(whole)
        assert set(whole) == {"loss", "each", "mean"}
        assert whole["each"] == pytest.approx(whole["mean"])

    def test_a_loss_with_a_weight_is_averaged_by_it(self) -> None:
        class ByFirst(Line):
            def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
                return batch[1].mean() + 0 * model(batch[0]).sum(), 1.0 + (len(batch[0]) == 10)

        y = Line().train_data()[1]
        expected = (2 * float(y[:10].mean()) + 2 * float(y[10:20].mean()) + 2 * float(y[20:].mean())) / 6
        replica = Replica(ByFirst(), seed=3)
        assert replica.evaluate(replica.train_source(), 10)["loss"] == pytest.approx(expected)
        weighed = (2 * float(y[:10].mean()) + float(y[10:17].mean())) / 3
        first_17 = open_source((Line().train_data()[0][:17], y[:17]))
        assert replica.evaluate(first_17, 10)["loss"] == pytest.approx(weighed)

    @pytest.mark.parametrize("size", [1, 7, 30])
    def test_accuracy_and_auc_are_scikit_learns(self, size: int) -> None:
        from sklearn.metrics import accuracy_score, roc_auc_score

        class Judged(Line):
            def labels(self, batch: tuple[Tensor, Tensor]) -> Tensor:
                return (batch[1] > batch[1].new_tensor(0.0)).flatten()

            def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
                return {"accuracy": (model(batch[0]).flatten() > 0) == self.labels(batch)}

            def evaluate(self, model: nn.Module, batches: Any) -> dict[str, float]:
                seen = [(model(batch[0]).flatten(), self.labels(batch)) for batch in batches]
                assert len(batches) == len(seen) == len(list(batches)), "as often as one likes"
                scores, labels = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))
                return {"auc": roc_auc_score(labels, scores), "seen": len(labels)}

        task = Judged()
        replica = Replica(task, seed=3)
        data = task.train_data()
        with torch.no_grad():
            scores = replica.model(data[0]).flatten().numpy()
        labels = task.labels(data).numpy()
        found = replica.evaluate(replica.train_source(), size)
        assert found["accuracy"] == accuracy_score(labels, scores > 0)
        assert found["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert found["seen"] == 30
        assert "auc" not in replica.evaluate(replica.train_source(), size, samples=4), "it is to see the whole set"

    def test_a_metric_may_be_a_numpy_array(self) -> None:
        class Numpy(Line):
            def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
                return {name: np.asarray(value) for name, value in super().metrics(model, batch).items()}

        replicas = [Replica(task, seed=3) for task in (Line(), Numpy())]
        assert len({tuple(r.evaluate(r.train_source(), 7).items()) for r in replicas}) == 1

    def test_it_takes_no_chance_and_leaves_buffers_as_they_are(self) -> None:
        class Quiet(Noisy):
            def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
                return (model(batch[0]) - batch[1]).square().mean()

        replica = Replica(Quiet(), seed=3)
        source = replica.train_source()
        slot(replica, 0, 0)
        once = replica.evaluate(source, 8)
        assert replica.evaluate(source, 8) == once
        assert np.array_equal(BufferLayout.of_model(replica.model).pack(replica.model), replica.buffers)


def test_batch_norm_is_seen() -> None:
    assert Replica(Noisy(), seed=0).has_batch_norm()
    assert not Replica(Line(), seed=0).has_batch_norm()


def test_a_users_error_is_shown_with_the_users_frames_only() -> None:
    class Broken(Line):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            raise KeyError("label")

    with pytest.raises(KeyError) as caught:
        slot(Replica(Broken(), seed=0), 0, 0)
    text = users_error(caught.value)
    assert text.startswith("KeyError: 'label'")
    assert 'raise KeyError("label")' in text
    assert "distgd/replica.py" not in text


def test_a_replica_is_a_function_of_its_seed() -> None:
    one, same, other = (Replica(Noisy(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.flat, same.flat)
    assert not torch.equal(one.flat, other.flat)
    assert slot(one, 0, 0)[0].stats != slot(one, 0, 0, replace(ORDER, seed=6))[0].stats


class Wide(Line):
    """One parameter that is large enough to be moved while autograd goes on, and others that are not."""

    SIZE = LARGE + 3

    def __init__(self, use: Any) -> None:
        self.use = use

    def model(self) -> nn.Module:
        model = nn.Linear(5, 1)
        model.wide = nn.Parameter(torch.linspace(-1, 1, self.SIZE))
        model.unused = nn.Parameter(torch.ones(LARGE))
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        return self.use(model.wide).mean() + (model(batch[0]) - batch[1]).square().mean()


def checkpointed_twice(wide: Tensor) -> Tensor:
    """`wide` is no input, as a module's parameter is none, so that each part finishes its gradient by itself."""
    one = torch.ones((), requires_grad=True)
    once, again = (checkpoint(lambda x: wide * x, one, use_reentrant=True) for _ in range(2))
    return once + again  # each has a backward pass of its own, which finishes the gradient of `wide`


@pytest.mark.parametrize(
    "use", [lambda w: w, torch.square, lambda w: w.view(-1, 1).t() * w, checkpointed_twice], ids=range(4)
)
def test_a_large_gradient_is_what_torch_has(use: Any) -> None:
    replica = Replica(Wide(use), seed=3)
    out = replica.layout.zeros()
    for view in replica.layout.views(out).values():
        view.fill_(9.0)
    stats = replica.gradient(replica.train_source(), ORDER, 0, 1, out).stats
    wide = torch.linspace(-1, 1, Wide.SIZE, requires_grad=True)
    use(wide).mean().backward()
    views = replica.layout.views(out)
    assert torch.allclose(views["wide"], 3 * wide.grad, rtol=1e-6)  # type: ignore[operator]
    assert not views["unused"].any()
    assert stats.squared_norm == pytest.approx(float((out.double() / 3).square().sum()), rel=1e-5)
    assert all(parameter.grad is None for parameter in replica.model.parameters())


class Told:
    """What a watcher saw: each range's values when it was told of, by number."""

    def __init__(self, out: Tensor, ranges: list[tuple[int, int]]) -> None:
        self.ranges, self.out, self.seen = ranges, out, dict[int, Tensor]()
        self.watch = Watch(ranges, self.final)

    def final(self, number: int) -> None:
        assert number not in self.seen
        first, stop = self.ranges[number]
        self.seen[number] = self.out[first:stop].clone()


class TestWatch:
    """Where gradients leave while autograd goes on."""

    @staticmethod
    def deep(layers: int = 4) -> Any:
        """Layers of one large and one small parameter each."""

        class Deep(Line):
            def model(self) -> nn.Module:
                return nn.Sequential(
                    nn.Linear(5, 300), *(nn.Linear(300, 300) for _ in range(layers)), nn.Linear(300, 1)
                )

        return Deep()

    @pytest.mark.parametrize("bucket", [64, 1000, 1 << 16, 1 << 20])
    def test_a_range_that_is_told_of_is_final_and_most_are_told_of_before_the_end(self, bucket: int) -> None:
        replica = Replica(self.deep(), seed=3)
        out, source = replica.layout.zeros(), replica.train_source()
        ranges = [(i, min(i + bucket, len(out))) for i in range(0, len(out), bucket)]
        first = Told(out, ranges)
        replica.gradient(source, ORDER, 0, 1, out, first.watch)
        assert not first.seen, "the first pass shows whether gradients are finished once"
        replica.gradient(source, ORDER, 1, 1, out)
        expected = out.clone()
        told = Told(out.fill_(0.0), ranges)
        replica.gradient(source, ORDER, 1, 1, out, told.watch)
        assert torch.equal(out, expected)
        for number, seen in told.seen.items():
            assert torch.equal(seen, expected[slice(*ranges[number])])
        if bucket < 1 << 20:
            assert len(told.seen) > len(ranges) / 2
            assert next(iter(told.seen)) > list(told.seen)[-1], "the last layers are first"

    def test_a_model_that_finishes_gradients_twice_is_never_told_of(self) -> None:
        replica = Replica(Wide(checkpointed_twice), seed=3)
        out, source = replica.layout.zeros(), replica.train_source()
        for step in range(3):
            told = Told(out, [(0, len(out))])
            replica.gradient(source, ORDER, step, 1, out, told.watch)
            assert not told.seen

    def test_one_that_begins_to_is_refused(self) -> None:
        task = Wide(torch.square)
        replica = Replica(task, seed=3)
        out, source = replica.layout.zeros(), replica.train_source()
        replica.gradient(source, ORDER, 0, 1, out, Told(out, [(0, 64)]).watch)
        task.use = checkpointed_twice
        with pytest.raises(
            BadInput, match=r"finishes each gradient once.*found wide finished twice.*use_reentrant=False"
        ):
            replica.gradient(source, ORDER, 1, 1, out, Told(out, [(0, 64)]).watch)

    def test_nothing_is_final_before_a_slot_is_clipped(self) -> None:
        replica = Replica(self.deep(), seed=3, clip=0.1)
        out, source = replica.layout.zeros(), replica.train_source()
        for step in range(2):
            told = Told(out, [(0, len(out))])
            replica.gradient(source, ORDER, step, 1, out, told.watch)
            assert not told.seen


def test_a_vector_that_is_forgotten_is_freed() -> None:
    replica = Replica(Wide(torch.square), seed=3)
    out = replica.layout.zeros()
    replica.gradient(replica.train_source(), ORDER, 0, 1, out)
    gone = weakref.ref(out.untyped_storage())
    replica.forget()
    del out
    assert gone() is None


def test_the_plain_model_has_gradients_as_torch_makes_them() -> None:
    model = Replica(Wide(torch.square), seed=3).plain_model()
    model.wide.square().sum().backward()  # type: ignore[union-attr, operator]
    assert model.wide.grad is not None
