"""A gradient's way from autograd to its place in a flat vector."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
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
        if set_already := next((name for name, p in self._parameters.items() if p.grad is not None), None):
            raise self._meddled(set_already)
        if out.data_ptr() not in self._places:
            self._places[out.data_ptr()] = {name: view.view(-1) for name, view in self._layout.views(out).items()}
        self._out, self._scale, self._squares = self._places[out.data_ptr()], scale, {}
        self._waiting = _Waiting(self._layout, watch) if watch is not None and self._again is False else None
        self._again = self._again or False
        try:
            _differentiate(loss)
            self._take_small(self._out)
            for name in self._parameters.keys() - self._squares.keys():
                self._out[name].zero_()
        finally:
            self._out = self._waiting = None
        return sum(self._squares[name] for name in self._parameters if name in self._squares)

    def leave(self) -> None:
        """Let the model's gradients be as torch has them."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, grads: tuple[Tensor, ...]) -> Any:
        if self._out is None or self._parameters[name].grad is not None:
            raise self._meddled(name)
        place, grad = self._out[name], grads[0].reshape(-1)
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

    def _take_small(self, out: Mapping[str, Tensor]) -> None:
        """Move the small ones that are there."""
        for name, parameter in self._small.items():
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                continue
            if name in self._squares:
                self._finished_twice(name)
            self._squares[name] = _scaled(grad.reshape(-1), self._scale, out[name])
            if self._waiting is not None:
                self._waiting.took(name)

    def _finished_twice(self, name: str) -> None:
        self._again = True
        if self._waiting is not None:  # part of it may have been sent
            do = "pass use_reentrant=False to torch.utils.checkpoint, or keep its graph the same from the first step on"
            expected = "a backward pass that finishes each gradient once, as the first one did"
            raise BadInput.described("task.loss", expected, f"{name} finished twice", do)

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
