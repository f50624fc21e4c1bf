"""A gradient's way from autograd to its place in a flat vector."""

from __future__ import annotations

from collections.abc import Mapping
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
            _differentiate(loss)
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
