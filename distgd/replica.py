"""A model with its data: the mean gradient of one slot, or the metrics of a whole set.

The gradient of slot k of step t is a pure function of (weights, buffers, task, seed, t, k): buffers start every slot at
their committed value, and torch, numpy and random are seeded by (seed, epoch, step, slot) before the forward pass. One
device kind, one torch and one number of threads are assumed.

The model's parameters are views of one flat vector on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distgd import tasks
from distgd.device import Card
from distgd.errors import BadInput, RunFailed, blaming
from distgd.events import SlotStats
from distgd.gradients import GradientTaker, Watch
from distgd.layout import BufferLayout, Layout, Slice, parameters, tensor_of
from distgd.optim import clip_scale
from distgd.sources import (
    Batch,
    Glimpse,
    Order,
    Source,
    TensorSource,
    data_seed,
    difference,
    glimpse,
    open_source,
    seed_everything,
    slot_seed,
    to_device,
)
from distgd.transport.segments import Window

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SlotGradient:
    """What one slot gives. `bad` says that its loss or gradient is not finite; `buffers` are None where unchanged."""

    stats: SlotStats
    bad: bool
    buffers: Array | None

    @classmethod
    def empty(cls, slot: int, samples: int = 0) -> SlotGradient:
        """A slot that adds nothing: no samples in it, or none that has a weight."""
        return cls(SlotStats(slot, samples, 0.0, 0.0, 0.0, 0.0), bad=False, buffers=None)


@dataclass(frozen=True)
class Blueprint:
    """What every process must build as the driver did: parameters, buffers, the data's length, schema and contents."""

    layout: Layout
    buffers: BufferLayout
    samples: int
    schema: dict[str, Any]
    glimpse: Glimpse

    def check(self, found: Blueprint, data: str) -> None:
        """Compare what a process has built.

        Args:
            data: which data it is, `train_data` or `eval_data`.

        Raises:
            RunFailed: names, shapes, types, lengths or samples differ from the driver's; the message shows the
                difference.
        """
        same = "build the same model from the same seed everywhere"
        for what, theirs, ours in (
            ("parameters", [(e.name, e.shape) for e in self.layout.entries], _shapes(found.layout)),
            ("buffers", [entry[:3] for entry in self.buffers.entries], [entry[:3] for entry in found.buffers.entries]),
            ("type", [self.layout.dtype], [found.layout.dtype]),
        ):
            if theirs != ours:
                only = f"driver only {_without(theirs, ours)}, here only {_without(ours, theirs)}"
                raise RunFailed(f"task.model: expected the driver's {what}, found others: {only}; {same}")
        self._check_data(found, f"task.{data}")

    def _check_data(self, found: Blueprint, key: str) -> None:
        if self.samples != found.samples:
            do = "give every process the same data"
            raise RunFailed(
                f"{key}: expected the driver's {self.samples:,} samples, found {found.samples:,} here; {do}"
            )
        if self.schema != found.schema:
            do = "give every process the same data"
            raise RunFailed(f"{key}: expected the driver's samples of {self.schema}, found {found.schema} here; {do}")
        if differs := difference(self.glimpse, found.glimpse):
            do = "where data is random or listed, give it a seed or sort it, so that every process has the same"
            raise RunFailed(f"{key}: expected the driver's samples, found others: {differs}; {do}")


@dataclass(frozen=True)
class _Passes:
    """The batches of the held-out set, as often as they are asked for, and how many they are."""

    length: int
    begin: Callable[[], Iterator[tuple[Batch, int]]]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in self.begin())


def _shapes(layout: Layout) -> list[tuple[Any, ...]]:
    return [(entry.name, entry.shape) for entry in layout.entries]


def _without(some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The first few of `some` that are not among `others`; all of them in another order if that is the difference."""
    return [each for each in some if each not in others][:5] or list(some[:5])


class Replica:
    """A model on one device, and the training data.

    Args:
        frozen: values of the parameters that take no gradient, by name; the driver's, so that all replicas agree.
        clip: limit of the norm of a slot's mean gradient, None for none.
        card: what `device` is, None for the CPU; found by `device` where it is left out.
    """

    def __init__(
        self,
        task: tasks.Task,
        seed: int,
        device: str = "cpu",
        frozen: Mapping[str, Array] | None = None,
        clip: float | None = None,
        card: Card | None = None,
    ) -> None:
        self.task = task
        self.seed = seed
        self.device = torch.device(device)
        self._card = card or Card.of(self.device)
        self.clip = clip
        self.model = tasks.build(task, seed)
        for name, parameter in parameters(self.model).items():
            if frozen and name in frozen:
                parameter.data.copy_(torch.from_numpy(frozen[name]))
        self.layout = Layout.of_model(self.model)
        self.model.to(self.device)
        self._window = Window(self.layout.size * self.layout.itemsize)
        self.flat = torch.from_numpy(self._window.memory).view(self.layout.torch_dtype).to(self.device)
        self.layout.flatten(parameters(self.model), self.flat)
        self.layout.adopt(self.model, self.flat)
        self.buffer_layout = BufferLayout.of_model(self.model)
        self.buffers = self.buffer_layout.pack(self.model)  # their committed value
        self._largest = torch.finfo(self.layout.torch_dtype).max
        self._taker = GradientTaker(self.layout, self.model, self._card)
        self._modules = tuple(self.model.modules())
        self._plain_modes = all(type(module).train is nn.Module.train for module in self._modules)

    def frozen(self) -> dict[str, Array]:
        """Values of the parameters that take no gradient, by name."""
        return {n: p.detach().cpu().numpy().copy() for n, p in parameters(self.model).items() if not p.requires_grad}

    def install(
        self, slices: Sequence[Slice], weights: Mapping[int, Array], buffers: Array | None, *, shared: bool = False
    ) -> None:
        """Make every shard's slice (by the shard's index) the parameters'; `buffers` become the committed ones.

        Args:
            shared: parameters may be views of a shard's own memory, which changes when it applies a step; else, and
                where they cannot be, slices are copied.
        """
        if self._card is not None:
            self._install_on(self._card, slices, weights, shared)
        else:
            for part in slices:
                array = weights[part.index]
                if not (shared and self._window.show(part.start * self.layout.itemsize, array)):
                    self.flat[part.start : part.stop].copy_(tensor_of(array))
        if buffers is not None:
            self.buffers = buffers

    def _install_on(self, card: Card, slices: Sequence[Slice], weights: Mapping[int, Array], shared: bool) -> None:
        """Begin the copies to the card; what it computes next comes after them.

        The memory of a shard itself stays, and what is computed from weights that were stepped meanwhile is dropped,
        so that nobody waits for its copy. What a message brought may go away at once.
        """
        for part in slices:
            array = weights[part.index]
            value, stays = tensor_of(array), shared and not array.flags.writeable
            pinned = stays and card.pins.pin(part.index, value, read_only=True)
            card.copies.begin(self.flat[part.start : part.stop], value, blocking=not pinned)
        card.copies.join()

    def gradient(
        self, source: Source, order: Order, step: int, slot: int, out: Tensor, watch: Watch | None = None
    ) -> SlotGradient:
        """Write S_k, the slot's weight times its clipped mean gradient, to `out` (flat, CPU, zeros between tensors).

        An empty slot has weight 0, and so has one whose loss says so, whatever its value; neither counts for the step.
        `stats.seconds` is left 0. Where slots are clipped, no range is final before the end, and `watch` is not told.

        Raises:
            BadInput: the loss is no scalar, its weight is negative or not finite, or it meddles with gradients.
        """
        first, stop = order.places(step, slot)
        if first == stop:
            return SlotGradient.empty(slot)
        samples, batch = stop - first, self.batch(source, order, step, slot)
        self._begin(slot_seed(self.seed, order.epoch_of(step), step, slot))
        loss, weight = self._loss(batch, samples)
        if weight == 0.0:
            return SlotGradient.empty(slot, samples)
        if self.clip is None:
            square = self._taker.backward(loss, out, weight, watch)
        else:
            square = self._taker.backward(loss, out, 1.0)
        if self.clip is not None:
            out.mul_(clip_scale(square, self.clip)).mul_(weight)
        else:
            square /= weight * weight
        stats = SlotStats(slot, samples, weight, float(loss.detach()), square, 0.0)
        fits = square**0.5 * weight <= self._largest  # also after the multiplication; false for NaN
        return SlotGradient(stats, bad=not (fits and isfinite(stats.loss)), buffers=self._changed())

    def _begin(self, seed: int) -> None:
        """Buffers, chance and mode as every forward pass of a slot finds them."""
        self.buffer_layout.unpack(self.buffers, self.model)
        seed_everything(seed)
        if not (self._plain_modes and all(module.training for module in self._modules)):
            self.model.train()

    def _changed(self) -> Array | None:
        """The model's buffers, None where they are the committed ones."""
        if not self.buffer_layout.size:
            return None
        packed = self.buffer_layout.pack(self.model)
        return packed if not np.array_equal(packed, self.buffers) else None

    def forget(self) -> None:
        """Let go of the vectors that gradients were written to; they are remembered, as there are few."""
        self._taker.forget()

    def batch(self, source: Source, order: Order, step: int, slot: int) -> Batch:
        """A slot's samples, on the device."""
        if type(source) is not TensorSource:  # rows of a tensor are no matter of chance
            seed_everything(data_seed(self.seed, order.epoch_of(step), step, slot))
        return to_device(source.batch(order.indices(step, slot)), self.device)

    def _loss(self, batch: Batch, samples: int) -> tuple[Tensor, float]:
        answer = self.task.loss(self.model, batch)
        loss, weight = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, samples)
        return _scalar(loss), _weight(weight)

    @torch.no_grad()
    def evaluate(self, source: Source, batch_size: int, samples: int | None = None) -> dict[str, float]:
        """Metrics of the whole of `source`, whatever `batch_size`.

        Means are exact: the loss by its weight, the task's `metrics` by samples. What the task's own `evaluate` returns
        is added; it sees every batch of the set, in order.

        Args:
            samples: only so many of them, for a trial; `evaluate`, which is to see all, is then left out.

        Returns:
            `loss`, and what the task's `metrics` and `evaluate` name.

        Raises:
            BadInput: `metrics` or `evaluate` returned something else than they should.
        """
        self.buffer_layout.unpack(self.buffers, self.model)
        self.model.eval()
        stop = len(source) if samples is None else min(samples, len(source))
        means = self._means(self._batches(source, batch_size, stop))
        own = getattr(self.task, "evaluate", None)
        if own is None or samples is not None:
            return means
        batches = _Passes(-(-stop // batch_size), lambda: self._batches(source, batch_size, stop))
        with blaming("task.evaluate", "evaluate(model, batches) to give numbers by name"):
            found = _numbers(own(self.model, batches))
        if taken := sorted(found.keys() & means.keys()):
            do = "choose other names"
            raise BadInput.at("task.evaluate", "names that neither the loss nor metrics have", taken, do)
        return means | found

    def _batches(self, source: Source, size: int, stop: int) -> Iterator[tuple[Batch, int]]:
        """Batches in order, each with its number of samples; the same chance in each pass."""
        seed_everything(data_seed(self.seed, 0, 0, 0))
        for first in range(0, stop, size):
            indices = np.arange(first, min(first + size, stop))
            yield to_device(source.batch(indices), self.device), len(indices)

    def _means(self, batches: Iterator[tuple[Batch, int]]) -> dict[str, float]:
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for batch, samples in batches:
            loss, weight = self._loss(batch, samples)
            parts = {"loss": (float(loss) * weight, weight), **self._metrics(batch, samples)}
            for name, (value, weight) in parts.items():
                sums[name] = sums.get(name, 0.0) + value
                weights[name] = weights.get(name, 0.0) + weight
        return {name: value / weights[name] if weights[name] else nan for name, value in sums.items()}

    def _metrics(self, batch: Batch, samples: int) -> dict[str, tuple[float, float]]:
        """The sum of each of the task's metrics over a batch, and the samples in it."""
        metrics = getattr(self.task, "metrics", None)
        found: object = metrics(self.model, batch) if metrics else {}
        do = 'return {"accuracy": (model(x).argmax(1) == y).float()} or its like'
        if not isinstance(found, Mapping):
            raise BadInput.described("task.metrics", "a mapping from names to tensors", _kind(found), do)
        if wrong := [name for name in found if not isinstance(name, str)]:
            raise BadInput.at("task.metrics", "names that are text", wrong, do)
        if "loss" in found:
            raise BadInput.at(
                "task.metrics", "other names than loss, which is the loss's own", list(found), "rename it"
            )
        return {name: _weighted(name, value, samples) for name, value in found.items()}

    def plain_model(self) -> nn.Module:
        """The model with memory of its own for every parameter, on the CPU; this replica is of no use afterwards."""
        self._taker.leave()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.cpu().clone()
        return self.model.cpu()

    def train_source(self) -> Source:
        """The task's training data."""
        return open_source(self.task.train_data(), getattr(self.task, "collate", None), "task.train_data")

    def eval_source(self) -> Source:
        """The task's held-out data; the task has `eval_data`."""
        held_out = self.task.eval_data()  # type: ignore[attr-defined]
        return open_source(held_out, getattr(self.task, "collate", None), "task.eval_data")

    def blueprint(self, source: Source) -> Blueprint:
        """What was built here, to be compared with what others built."""
        seen = glimpse(source.batch, len(source), self.seed)
        return Blueprint(self.layout, self.buffer_layout, len(source), source.schema(), seen)

    def has_batch_norm(self) -> bool:
        """Whether a slot of one sample cannot be trained on."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())


def _scalar(loss: object) -> Tensor:
    """A loss as a tensor without dimensions."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
        return loss.reshape(())
    raise BadInput.described("task.loss", "a scalar tensor", _kind(loss), "return the mean over the samples")


def _weight(weight: object) -> float:
    """A loss's weight as a number."""
    number = _float(weight)
    if number is None or not 0.0 <= number < inf:
        do = "return (mean, weight), such as the tokens in it"
        raise BadInput.described("task.loss", "a weight >= 0", _kind(weight) if number is None else f"{number}", do)
    return number


def _weighted(name: str, value: object, samples: int) -> tuple[float, float]:
    """A metric's sum and the numbers in it, from a tensor with a row a sample or a mean."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    if isinstance(value, Tensor) and value.numel() > 1 and len(value) == samples:
        return float(value.double().sum()), float(value.numel())
    number = _float(value)
    if number is None:
        expected = f"a value for each of the {samples} samples, or their mean"
        do = "return a tensor with a row a sample"
        raise BadInput.described(f"task.metrics: {name}", expected, _kind(value), do)
    return number * samples, float(samples)


def _float(value: Any) -> float | None:
    """A number or a tensor of one; None where it is something else."""
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _kind(value: object) -> str:
    """What something is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, str | int | float):
        return f"the {type(value).__name__} {value!r}"
    return "None" if value is None else f"a {type(value).__name__}"


def _numbers(found: object) -> dict[str, float]:
    """What a task's `evaluate` returned, as floats."""
    if not isinstance(found, Mapping):
        raise BadInput.described(
            "task.evaluate", "a mapping from names to numbers", _kind(found), 'return {"auc": ...}'
        )
    numbers = {str(name): _float(value) for name, value in found.items()}
    for name, number in numbers.items():
        if number is None:
            raise BadInput.described(f"task.evaluate: {name}", "a number", _kind(found[name]), "return one a name")
    return {name: number for name, number in numbers.items() if number is not None}
