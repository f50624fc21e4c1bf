"""A gradient's way from autograd to its place in a flat vector."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distgd.errors import BadInput
from distgd.layout import Layout, squared, trainable

BLOCK = 1 << 17
"""Elements that are read twice at a time: the second time they come from the cache."""
LARGE = 1 << 16
"""Elements of a gradient that is worth a call of its own while autograd goes on."""


@dataclass(frozen=True)
class Watch:
    """Who wants to know when a range of the flat vector holds its final values, while autograd goes on.

    Args:
        ranges: first and one-past-last element of each.
        final: told the number of a range.
    """

    ranges: Sequence[tuple[int, int]]
    final: Callable[[int], None]


class _Waiting:
    """Which ranges still wait for which parameters."""

    def __init__(self, layout: Layout, watch: Watch) -> None:
        self._final = watch.final
        self._left: list[set[str]] = [set() for _ in watch.ranges]
        self._in: dict[str, list[int]] = {}
        starts = [entry.start for entry in layout.entries]
        for number, (first, stop) in enumerate(watch.ranges):
            for entry in layout.entries[max(0, bisect_right(starts, first) - 1) : bisect_left(starts, stop)]:
                if entry.start + entry.size > first:
                    self._left[number].add(entry.name)
                    self._in.setdefault(entry.name, []).append(number)

    def took(self, name: str) -> None:
        """A parameter's gradient is at its place."""
        for number in self._in.pop(name, ()):
            self._left[number].discard(name)
            if not self._left[number]:
                self._final(number)


@dataclass(frozen=True)
class _Places:
    """Where gradients go in one flat vector: small ones with their parameter, in its shape; all by name, flat."""

    small: tuple[tuple[str, nn.Parameter, Tensor], ...]
    flat: dict[str, Tensor]


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
        self._all = tuple(self._parameters.values())
        self._small = {name: p for name, p in self._parameters.items() if name not in large}
        self._places: dict[int, _Places] = {}  # by the address of the flat vector, of which there are few
        self._out: _Places | None = None
        self._scale, self._factor_is = 1.0, 1.0
        self._factor_tensor = torch.ones((), dtype=layout.torch_dtype)
        self._squares: dict[str, float] = {}
        self._waiting: _Waiting | None = None
        self._again: bool | None = None  # whether autograd finishes a gradient twice; None before the first time
        with torch.enable_grad():
            self._nodes = {name: torch.autograd.graph.get_gradient_edge(p).node for name, p in large.items()}
        self._hooks = [node.register_prehook(partial(self._take, name)) for name, node in self._nodes.items()]

    def backward(self, loss: Tensor, out: Tensor, scale: float, watch: Watch | None = None) -> float:
        """Write `scale` times the gradient of `loss` to `out` (flat, CPU); return the square of the result's norm.

        A parameter that the loss does not use has a zero gradient. The first time nobody is told of ranges, as it shows
        whether autograd finishes gradients once; ranges that nobody was told of are final at the end.

        Raises:
            BadInput: the loss has set gradients itself.
        """
        if any(p.grad is not None for p in self._all):
            raise self._meddled(next(name for name, p in self._parameters.items() if p.grad is not None))
        places = self._places.get(out.data_ptr())
        if places is None:
            places = self._places[out.data_ptr()] = self._find(out)
        self._out, self._scale, self._squares = places, scale, {}
        self._waiting = _Waiting(self._layout, watch) if watch is not None and self._again is False else None
        self._again = self._again or False
        try:
            _differentiate(loss)
            self._take_small(places)
            for name in self._unused():
                places.flat[name].zero_()
        finally:
            self._out = self._waiting = None
        return sum([self._squares[name] for name in self._parameters if name in self._squares])

    def _unused(self) -> Iterable[str]:
        if len(self._squares) == len(self._parameters):
            return ()
        return self._parameters.keys() - self._squares.keys()

    def _find(self, out: Tensor) -> _Places:
        views = self._layout.views(out)
        small = tuple((name, p, views[name]) for name, p in self._small.items())
        return _Places(small, {name: view.view(-1) for name, view in views.items()})

    def leave(self) -> None:
        """Let the model's gradients be as torch has them."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, grads: tuple[Tensor, ...]) -> Any:
        if self._out is None or self._parameters[name].grad is not None:
            raise self._meddled(name)
        place, grad = self._out.flat[name], grads[0].reshape(-1)
        if name in self._squares:
            self._finished_twice(name)
            place.add_(grad.cpu(), alpha=self._scale)
            self._squares[name] = _scaled(place, 1.0, place)
        else:
            self._squares[name] = _scaled(grad, self._scale, place)
        if self._waiting is not None:
            self._waiting.took(name)
            self._take_small(self._out)
        return (None,)  # nothing is left to accumulate

    def _take_small(self, places: _Places) -> None:
        """Move the small ones that are there."""
        scale, squares = self._factor(), self._squares
        for name, parameter, place in places.small:
            grad = parameter.grad
            if grad is None:
                continue
            parameter.grad = None
            if name in squares:
                self._finished_twice(name)
            if grad.is_cpu:
                torch.mul(grad, scale, out=place)
            else:
                place.copy_(grad).mul_(scale)
            squares[name] = squared(places.flat[name])
            if self._waiting is not None:
                self._waiting.took(name)

    def _finished_twice(self, name: str) -> None:
        self._again = True
        if self._waiting is not None:  # part of it may have been sent
            do = "pass use_reentrant=False to torch.utils.checkpoint, or keep its graph the same from the first step on"
            expected = "a backward pass that finishes each gradient once, as the first one did"
            raise BadInput.described("task.loss", expected, f"{name} finished twice", do)

    def _factor(self) -> Tensor:
        """The scale as a tensor, which torch takes in half the time of a number; the same one at most steps."""
        if self._scale != self._factor_is:
            self._factor_is = self._scale
            self._factor_tensor = torch.tensor(self._scale, dtype=self._layout.torch_dtype)
        return self._factor_tensor

    @staticmethod
    def _meddled(name: str) -> BadInput:
        do = "leave .grad and backward() to the run"
        found = f"another .grad of {name}"
        return BadInput.described("task.loss", "a loss that leaves gradients alone", found, do)


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


def _differentiate(loss: Tensor) -> None:
    if not loss.requires_grad:
        do = "compute it from the model's output, without detach(), item() or torch.no_grad()"
        raise BadInput.described("task.loss", "a loss that depends on the parameters", "one without a gradient", do)
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        do = "leave backward() to the run"
        raise BadInput.described("task.loss", "a loss to differentiate", "one that has been already", do) from error
