"""A model with its data: the mean gradient of one slot, or the metrics of a whole set.

The gradient of slot k of step t is a pure function of (weights, buffers, task, seed, t, k): buffers start every slot at
their committed value, and torch, numpy and random are seeded by (seed, epoch, step, slot) before the forward pass. One
device kind, one torch and one number of threads are assumed.

The model's parameters are views of one flat vector on the device.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distgd import tasks
from distgd.errors import BadInput
from distgd.events import SlotStats
from distgd.layout import BufferLayout, Layout, Slice, squared, tensor_of, trainable
from distgd.optim import clip_scale
from distgd.sources import Order, Source, count, open_source, seed_everything, slot_seed, to_device
from distgd.transport.segments import Window

Array = np.ndarray[Any, Any]

BLOCK = 1 << 17
"""Elements that are read twice at a time: the second time they come from the cache."""
LARGE = 1 << 16
"""Elements of a gradient that is worth a call of its own while autograd goes on."""


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


class GradientTaker:
    """Brings gradients to their places in a flat vector, scaled on the way; nothing is set to zero before.

    A large one is moved as soon as autograd has it, in one pass after the one that made it. autograd keeps none: a
    gradient that is one number for all elements never gets memory of its own, and any other's is free again before the
    next one is made. Small ones are moved together at the end. Gradients of a large parameter that autograd finishes
    twice, as under reentrant checkpointing, are added.
    """

    def __init__(self, layout: Layout, model: nn.Module) -> None:
        self._layout = layout
        self._parameters = trainable(model)
        large = {name: p for name, p in self._parameters.items() if p.numel() >= LARGE}
        self._small = {name: p for name, p in self._parameters.items() if name not in large}
        self._places: dict[int, dict[str, Tensor]] = {}  # by the address of the flat vector, of which there are few
        self._out: dict[str, Tensor] | None = None
        self._scale = 1.0
        self._squares: dict[str, float] = {}
        with torch.enable_grad():
            self._nodes = {name: torch.autograd.graph.get_gradient_edge(p).node for name, p in large.items()}
        self._hooks = [node.register_prehook(partial(self._take, name)) for name, node in self._nodes.items()]

    def backward(self, loss: Tensor, out: Tensor, scale: float) -> float:
        """Write `scale` times the gradient of `loss` to `out` (flat, CPU); return the square of the result's norm.

        A parameter that the loss does not use has a zero gradient.

        Raises:
            BadInput: the loss has set gradients itself.
        """
        if set_already := next((name for name, p in self._parameters.items() if p.grad is not None), None):
            raise self._meddled(set_already)
        if out.data_ptr() not in self._places:
            self._places[out.data_ptr()] = {name: view.view(-1) for name, view in self._layout.views(out).items()}
        self._out, self._scale, self._squares = self._places[out.data_ptr()], scale, {}
        try:
            loss.backward()  # type: ignore[no-untyped-call]
            square = self._take_small(self._out)
            for name in self._parameters.keys() - self._squares.keys() - self._small.keys():
                self._out[name].zero_()
        finally:
            self._out = None
        return square + sum(self._squares[name] for name in self._parameters if name in self._squares)

    def leave(self) -> None:
        """Let the model's gradients be as torch has them."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, grads: tuple[Tensor, ...]) -> Any:
        if self._out is None or self._parameters[name].grad is not None:
            raise self._meddled(name)
        place, grad = self._out[name], grads[0].reshape(-1)
        if name in self._squares:
            place.add_(grad.cpu(), alpha=self._scale)
            self._squares[name] = _scaled(place, 1.0, place)
        else:
            self._squares[name] = _scaled(grad, self._scale, place)
        return (None,)  # nothing is left to accumulate

    def _take_small(self, out: Mapping[str, Tensor]) -> float:
        square = 0.0
        for name, parameter in self._small.items():
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                out[name].zero_()
            else:
                square += _scaled(grad.reshape(-1), self._scale, out[name])
        return square

    @staticmethod
    def _meddled(name: str) -> BadInput:
        do = "leave .grad, backward() and zero_grad() to the run"
        return BadInput.at("task.loss", "a loss that leaves gradients alone", f"another .grad of {name}", do)


def _scaled(grad: Tensor, scale: float, out: Tensor) -> float:
    """Write `scale` times `grad` to `out`, and return the sum of its squares, while each block is in the cache."""
    if grad.device != out.device:
        out.copy_(grad)
        grad = out
    if out.numel() <= BLOCK:
        return squared(torch.mul(grad, scale, out=out))
    total = 0.0
    for first in range(0, out.numel(), BLOCK):
        block = out[first : first + BLOCK]
        torch.mul(grad[first : first + BLOCK], scale, out=block)
        total += squared(block)
    return total


class Replica:
    """A model on one device, and the training data.

    Args:
        frozen: values of the parameters that take no gradient, by name; the driver's, so that all replicas agree.
        clip: limit of the norm of a slot's mean gradient, None for none.
    """

    def __init__(
        self,
        task: tasks.Task,
        seed: int,
        device: str = "cpu",
        frozen: Mapping[str, Array] | None = None,
        clip: float | None = None,
    ) -> None:
        self.task = task
        self.seed = seed
        self.device = torch.device(device)
        self.clip = clip
        self.model = tasks.build(task, seed)
        for name, parameter in self.model.named_parameters():
            if frozen and name in frozen:
                parameter.data.copy_(torch.from_numpy(frozen[name]))
        self.layout = Layout.of_model(self.model)
        self.model.to(self.device)
        self._window = Window(self.layout.size * self.layout.itemsize)
        self.flat = torch.from_numpy(self._window.memory).view(self.layout.torch_dtype).to(self.device)
        self.layout.flatten(dict(self.model.named_parameters()), self.flat)
        self.layout.adopt(self.model, self.flat)
        self.buffer_layout = BufferLayout.of_model(self.model)
        self.buffers = self.buffer_layout.pack(self.model)  # their committed value
        self._taker = GradientTaker(self.layout, self.model)

    def frozen(self) -> dict[str, Array]:
        """Values of the parameters that take no gradient, by name."""
        return {n: p.detach().cpu().numpy().copy() for n, p in self.model.named_parameters() if not p.requires_grad}

    def install(
        self, slices: Sequence[Slice], weights: Mapping[int, Array], buffers: Array | None, *, shared: bool = False
    ) -> None:
        """Make every shard's slice (by the shard's index) the parameters'; `buffers` become the committed ones.

        Args:
            shared: parameters may be views of a shard's own memory, which changes when it applies a step; else, and
                where they cannot be, slices are copied.
        """
        for part in slices:
            array = weights[part.index]
            views = shared and self.device.type == "cpu"
            if not (views and self._window.show(part.start * self.layout.itemsize, array)):
                self.flat[part.start : part.stop].copy_(tensor_of(array))
        if buffers is not None:
            self.buffers = buffers

    def gradient(self, source: Source, order: Order, step: int, slot: int, out: Tensor) -> SlotGradient:
        """Write S_k, the slot's weight times its clipped mean gradient, to `out` (flat, CPU, zeros between tensors).

        An empty slot has weight 0, and so has one whose loss says so, whatever its value; neither counts for the step.
        `stats.seconds` is left 0.

        Raises:
            BadInput: the loss is no scalar, its weight is negative or not finite, or it meddles with gradients.
        """
        indices = order.indices(step, slot)
        if not len(indices):
            return SlotGradient.empty(slot)
        batch = to_device(source.batch(indices), self.device)
        self.buffer_layout.unpack(self.buffers, self.model)
        seed_everything(slot_seed(self.seed, order.epoch_of(step), step, slot))
        self.model.train()
        loss, weight = self._loss(batch)
        if weight == 0.0:
            return SlotGradient.empty(slot, count(batch))
        square = self._taker.backward(loss, out, weight if self.clip is None else 1.0)
        if self.clip is not None:
            out.mul_(clip_scale(square, self.clip)).mul_(weight)
        else:
            square /= weight * weight
        packed = self.buffer_layout.pack(self.model)
        changed = packed if not np.array_equal(packed, self.buffers) else None
        stats = SlotStats(slot, count(batch), weight, float(loss.detach()), square, 0.0)
        fits = square**0.5 * weight <= torch.finfo(out.dtype).max  # also after the multiplication; false for NaN
        return SlotGradient(stats, bad=not (fits and isfinite(stats.loss)), buffers=changed)

    def _loss(self, batch: Any) -> tuple[Tensor, float]:
        answer = self.task.loss(self.model, batch)
        loss, weight = answer if isinstance(answer, tuple) else (answer, count(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise BadInput(f"task.loss: expected a scalar tensor, found {found}; return the mean over the samples")
        if not 0.0 <= float(weight) < inf:
            raise BadInput.at(
                "task.loss", "a weight >= 0", float(weight), "return (mean, weight), such as tokens in it"
            )
        return loss.reshape(()), float(weight)

    @torch.no_grad()
    def evaluate(self, source: Source, batch_size: int, samples: int | None = None) -> dict[str, float]:
        """Means over the whole of `source`, whatever `batch_size`: the loss by its weight, metrics by samples.

        Args:
            samples: only so many of them, for a trial.

        Returns:
            `loss`, and what the task's `metrics` names.
        """
        stop = len(source) if samples is None else min(samples, len(source))
        self.buffer_layout.unpack(self.buffers, self.model)
        self.model.eval()
        metrics = getattr(self.task, "metrics", None)
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for first in range(0, stop, batch_size):
            batch = to_device(source.batch(np.arange(first, min(first + batch_size, stop))), self.device)
            loss, weight = self._loss(batch)
            parts = {"loss": (float(loss) * weight, weight)}
            for name, value in (metrics(self.model, batch) if metrics else {}).items():
                parts[name] = _weighted(value, count(batch))
            for name, (value, weight) in parts.items():
                sums[name] = sums.get(name, 0.0) + value
                weights[name] = weights.get(name, 0.0) + weight
        return {name: value / weights[name] if weights[name] else nan for name, value in sums.items()}

    def plain_model(self) -> nn.Module:
        """The model with memory of its own for every parameter, on the CPU; this replica is of no use afterwards."""
        self._taker.leave()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.cpu().clone()
        return self.model.cpu()

    def train_source(self) -> Source:
        """The task's training data."""
        return open_source(self.task.train_data())

    def has_batch_norm(self) -> bool:
        """Whether a slot of one sample cannot be trained on."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())


def _weighted(value: Tensor | float, samples: int) -> tuple[float, float]:
    """A metric's sum and the samples in it, from a per-sample tensor or a mean."""
    if isinstance(value, Tensor) and value.numel() > 1:
        return float(value.double().sum()), float(value.numel())
    return float(value) * samples, float(samples)


OURS = Path(__file__).parent
INSTALLED = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}


def users_error(error: BaseException) -> str:
    """The message of an error in the user's own code, with the frames of that code alone.

    Where there is none of it, the frames of installed packages stand in.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not Path(f.filename).is_relative_to(OURS)]
    own = [f for f in frames if not any(Path(f.filename).is_relative_to(folder) for folder in INSTALLED)]
    return "\n".join([f"{type(error).__name__}: {error}", *traceback.format_list(own or frames)]).rstrip()
