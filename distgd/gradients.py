"""A gradient's way from autograd to its place in a flat vector."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from distgd.device import Card
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

    Args:
        card: where the model is, None for the CPU.
    """

    def __init__(self, layout: Layout, model: nn.Module, card: Card | None = None) -> None:
        self._layout = layout
        self._parameters = trainable(model)
        self._all = tuple(self._parameters.values())
        large = {name: p for name, p in self._parameters.items() if p.numel() >= LARGE}
        self._small = {name: p for name, p in self._parameters.items() if name not in large}
        self._way: _InPlace | _FromCard = _InPlace(layout) if card is None else _FromCard(layout, card, large)
        self._scale: float | None = None  # None while there is no backward pass
        self._squares: dict[str, float] = {}
        self._waiting: _Waiting | None = None
        self._again: bool | None = None  # whether autograd finishes a gradient twice; None before the first time
        with torch.enable_grad():
            self._nodes = {name: torch.autograd.graph.get_gradient_edge(p).node for name, p in large.items()}
        self._hooks = [node.register_prehook(partial(self._take, name)) for name, node in self._nodes.items()]

    def backward(self, loss: Tensor, out: Tensor, scale: float, watch: Watch | None = None) -> float:
        """Write `scale` times the gradient of `loss` to `out` (flat, CPU); return the square of the result's norm.

        A parameter that the loss does not use has a zero gradient. The first time nobody is told of ranges, as it shows
        whether autograd finishes gradients once; ranges that nobody was told of are final at the end. Of a card's
        ranges `watch` is told at the end, one after the other as they arrive.

        Args:
            out: one of few vectors, which are used again and again.

        Raises:
            BadInput: the loss has set gradients itself.
        """
        if any(p.grad is not None for p in self._all):
            raise self._meddled(next(name for name, p in self._parameters.items() if p.grad is not None))
        waiting = None if watch is None else _Waiting(self._layout, watch)
        self._way.begin(out)
        self._scale, self._squares = scale, {}
        self._waiting = waiting if self._way.at_once and self._again is False else None
        self._again = self._again or False
        try:
            _differentiate(loss)
            self._take_small(scale)
            if len(self._squares) < len(self._all):
                for name in self._parameters.keys() - self._squares.keys():
                    self._way.zero(name)
        finally:
            self._scale = self._waiting = None
        square = sum([self._squares[name] for name in self._parameters if name in self._squares])
        return self._way.end(square, _nobody if waiting is None else waiting.took)

    def forget(self) -> None:
        """Let go of the vectors that gradients were written to."""
        self._way.forget()

    def leave(self) -> None:
        """Let the model's gradients be as torch has them."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, grads: tuple[Tensor, ...]) -> Any:
        if self._scale is None or self._parameters[name].grad is not None:
            raise self._meddled(name)
        if name in self._squares:
            self._finished_twice(name)
            self._squares[name] = self._way.add(name, grads[0].reshape(-1), self._scale)
        else:
            self._squares[name] = self._way.put(name, grads[0].reshape(-1), self._scale)
        if self._waiting is not None:
            self._waiting.took(name)
            self._take_small(self._scale)
        return (None,)  # nothing is left to accumulate

    def _take_small(self, scale: float) -> None:
        """Move the small ones that are there."""
        squares, put = self._squares, self._way.put_small
        for name, parameter in self._small.items():
            grad = parameter.grad
            if grad is None:
                continue
            parameter.grad = None
            if name in squares:
                self._finished_twice(name)
            squares[name] = put(name, grad, scale)
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


class _InPlace:
    """The way of what the CPU computes: straight into its place. What is put or added gives the square of its norm."""

    at_once = True  # what is put is there

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}  # by the address of the flat vector
        self._places: dict[str, Tensor] = {}
        self._shaped: dict[str, Tensor] = {}
        self._scale, self._factor = 1.0, torch.ones((), dtype=layout.torch_dtype)

    def begin(self, out: Tensor) -> None:
        known = self._known.get(out.data_ptr())
        if known is None:
            known = self._known[out.data_ptr()] = (_places(self._layout, out), self._layout.views(out))
        self._places, self._shaped = known

    def forget(self) -> None:
        self._known.clear()
        self._places, self._shaped = {}, {}

    def put(self, name: str, grad: Tensor, scale: float) -> float:
        return _scaled(grad, scale, self._places[name])

    def put_small(self, name: str, grad: Tensor, scale: float) -> float:
        if scale != self._scale:  # torch takes a tensor in half the time of a number; it is the same one at most steps
            self._scale, self._factor = scale, torch.tensor(scale, dtype=self._layout.torch_dtype)
        torch.mul(grad, self._factor, out=self._shaped[name])
        return squared(self._places[name])

    def add(self, name: str, grad: Tensor, scale: float) -> float:
        place = self._places[name].add_(grad, alpha=scale)
        return _scaled(place, 1.0, place)

    def zero(self, name: str) -> None:
        self._places[name].zero_()

    def end(self, square: float, told: Callable[[str], None]) -> float:
        return square


class _FromCard:
    """The way of what a card computes: scaled there into one vector, and copied from it while autograd goes on.

    The copy of a large one begins at once, those of the small ones, which lie together, at the end. The norm is
    computed on the card, and read when everything has been copied; until then squares are 0.
    """

    at_once = False

    def __init__(self, layout: Layout, card: Card, large: Collection[str]) -> None:
        self._card, self._layout = card, layout
        ends = [entry.start for entry in layout.entries[1:]] + [layout.size]  # each with the zeros behind it
        spans = {entry.name: slice(entry.start, end) for entry, end in zip(layout.entries, ends, strict=True)}
        self._large = {name: span for name, span in spans.items() if name in large}
        self._rest = {name: span for name, span in spans.items() if name not in large}
        self._leaving: dict[str, Callable[[], None]] = {}  # large ones in the order of their last copies
        self._out = torch.empty(0)

    @cached_property
    def _flat(self) -> Tensor:
        return self._layout.zeros().to(self._card.device, copy=True)  # an evaluator has no need of it

    @cached_property
    def _places(self) -> dict[str, Tensor]:
        return _places(self._layout, self._flat)

    def begin(self, out: Tensor) -> None:
        self._card.pins.pin(out.data_ptr(), out)
        self._out = out
        self._leaving.clear()

    def forget(self) -> None:
        self._out = torch.empty(0)

    def put(self, name: str, grad: Tensor, scale: float) -> float:
        torch.mul(grad, scale, out=self._places[name])
        return self._leave(name)

    def put_small(self, name: str, grad: Tensor, scale: float) -> float:
        return self.put(name, grad.reshape(-1), scale)

    def add(self, name: str, grad: Tensor, scale: float) -> float:
        self._places[name].add_(grad, alpha=scale)
        return self._leave(name)  # copied once more, after the first copy

    def zero(self, name: str) -> None:
        self._places[name].zero_()
        self._leave(name)

    def end(self, square: float, told: Callable[[str], None]) -> float:
        """Return when everything is in host memory; `told` of each tensor as soon as it is there."""
        rest = [self._copied(span) for span in _joined(self._rest.values())]
        norm = torch.linalg.vector_norm(self._flat, dtype=torch.float64)
        for name, done in self._leaving.items():
            done()
            told(name)
        for done in rest:
            done()
        for name in self._rest:
            told(name)
        return square + float(norm.square())

    def _leave(self, name: str) -> float:
        if name in self._large:
            self._leaving.pop(name, None)
            self._leaving[name] = self._copied(self._large[name])
        return 0.0

    def _copied(self, span: slice) -> Callable[[], None]:
        return self._card.copies.begin(self._out[span], self._flat[span])


def _nobody(name: str) -> None:
    """Is told."""


def _places(layout: Layout, flat: Tensor) -> dict[str, Tensor]:
    return {name: view.view(-1) for name, view in layout.views(flat).items()}


def _joined(spans: Iterable[slice]) -> list[slice]:
    """Spans in order, those that touch as one.

    >>> _joined([slice(0, 64), slice(64, 128), slice(192, 256)])
    [slice(0, 128, None), slice(192, 256, None)]
    """
    joined: list[slice] = []
    for span in spans:
        touches = bool(joined) and joined[-1].stop == span.start
        first = joined.pop().start if touches else span.start
        joined.append(slice(first, span.stop))
    return joined


def _scaled(grad: Tensor, scale: float, out: Tensor) -> float:
    """Write `scale` times `grad` to `out`, and return the sum of its squares, while each block is in the cache."""
    one = (grad[0] * scale) if grad.stride() == (0,) else None  # torch reads one number for all several times slower
    total = 0.0
    for first in range(0, out.numel(), BLOCK):
        block = out[first : first + BLOCK]
        if one is None:
            torch.mul(grad[first : first + BLOCK], scale, out=block)
        else:
            block.fill_(one)
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
