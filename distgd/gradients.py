"""A gradient's way from autograd to its place in a flat vector."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
        self._parameters = trainable(model)
        large = {name: p for name, p in self._parameters.items() if p.numel() >= LARGE}
        self._small = {name: p for name, p in self._parameters.items() if name not in large}
        self._way: _InPlace | _FromCard = _InPlace(layout) if card is None else _FromCard(layout, card, large)
        self._scale: float | None = None  # None while there is no backward pass
        self._squares: dict[str, float] = {}
        with torch.enable_grad():
            self._nodes = {name: torch.autograd.graph.get_gradient_edge(p).node for name, p in large.items()}
        self._hooks = [node.register_prehook(partial(self._take, name)) for name, node in self._nodes.items()]

    def backward(self, loss: Tensor, out: Tensor, scale: float) -> float:
        """Write `scale` times the gradient of `loss` to `out` (flat, CPU); return the square of the result's norm.

        A parameter that the loss does not use has a zero gradient. `out` is one of few vectors, used again and again.

        Raises:
            BadInput: the loss has set gradients itself.
        """
        if set_already := next((name for name, p in self._parameters.items() if p.grad is not None), None):
            raise self._meddled(set_already)
        self._way.begin(out)
        self._scale, self._squares = scale, {}
        try:
            _differentiate(loss)
            square = self._take_small(scale)
            for name in self._parameters.keys() - self._squares.keys() - self._small.keys():
                self._way.zero(name)
        finally:
            self._scale = None
        return self._way.end(square + sum(self._squares[name] for name in self._parameters if name in self._squares))

    def leave(self) -> None:
        """Let the model's gradients be as torch has them."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, grads: tuple[Tensor, ...]) -> Any:
        if self._scale is None or self._parameters[name].grad is not None:
            raise self._meddled(name)
        move = self._way.add if name in self._squares else self._way.put
        self._squares[name] = move(name, grads[0].reshape(-1), self._scale)
        return (None,)  # nothing is left to accumulate

    def _take_small(self, scale: float) -> float:
        square = 0.0
        for name, parameter in self._small.items():
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                self._way.zero(name)
            else:
                square += self._way.put(name, grad.reshape(-1), scale)
        return square

    @staticmethod
    def _meddled(name: str) -> BadInput:
        do = "leave .grad and backward() to the run"
        found = f"another .grad of {name}"
        return BadInput.described("task.loss", "a loss that leaves gradients alone", found, do)


class _InPlace:
    """The way of what the CPU computes: straight into its place. What is put or added gives the square of its norm."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[int, dict[str, Tensor]] = {}  # by the address of the flat vector
        self._places: dict[str, Tensor] = {}

    def begin(self, out: Tensor) -> None:
        if out.data_ptr() not in self._known:
            self._known[out.data_ptr()] = _places(self._layout, out)
        self._places = self._known[out.data_ptr()]

    def put(self, name: str, grad: Tensor, scale: float) -> float:
        return _scaled(grad, scale, self._places[name])

    def add(self, name: str, grad: Tensor, scale: float) -> float:
        place = self._places[name].add_(grad, alpha=scale)
        return _scaled(place, 1.0, place)

    def zero(self, name: str) -> None:
        self._places[name].zero_()

    def end(self, square: float) -> float:
        return square


class _FromCard:
    """The way of what a card computes: scaled there into one vector, and copied from it while autograd goes on.

    The copy of a large one begins at once, those of the small ones, which lie together, at the end. The norm is
    computed on the card, and read when everything has been copied; until then squares are 0.
    """

    def __init__(self, layout: Layout, card: Card, large: Collection[str]) -> None:
        self._card, self._layout = card, layout
        ends = [entry.start for entry in layout.entries[1:]] + [layout.size]  # each with the zeros behind it
        spans = {entry.name: slice(entry.start, end) for entry, end in zip(layout.entries, ends, strict=True)}
        self._large = {name: span for name, span in spans.items() if name in large}
        self._rest = _joined(span for name, span in spans.items() if name not in large)
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

    def put(self, name: str, grad: Tensor, scale: float) -> float:
        torch.mul(grad, scale, out=self._places[name])
        return self._leave(name)

    def add(self, name: str, grad: Tensor, scale: float) -> float:
        self._places[name].add_(grad, alpha=scale)
        return self._leave(name)  # copied once more, after the first copy

    def zero(self, name: str) -> None:
        self._places[name].zero_()
        self._leave(name)

    def end(self, square: float) -> float:
        for span in self._rest:
            self._card.copies.begin(self._out[span], self._flat[span])
        norm = torch.linalg.vector_norm(self._flat, dtype=torch.float64)
        self._card.copies.wait()
        return square + float(norm.square())

    def _leave(self, name: str) -> float:
        if name in self._large:
            span = self._large[name]
            self._card.copies.begin(self._out[span], self._flat[span])
        return 0.0


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
