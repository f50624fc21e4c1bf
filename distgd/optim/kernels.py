"""torch's fused kernels without what its optimizers do around them at every step.

`torch.optim` looks through its groups and its state, sorts tensors by device, and checks what cannot have changed: for
one block that takes as long as stepping some ten thousand numbers. Once a block has been stepped, everything but the
gradients and the learning rate is known. The kernel and what it is given are torch's own, so the bits are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Sequence[Tensor], float], None]
"""Steps a block, given its gradients and what multiplies the learning rates."""


def prepared(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], groups: Sequence[dict[str, Any]]
) -> Step | None:
    """The step of a block that `optimizer` has stepped before; None where torch's own way has to be taken.

    Args:
        params: of the block.
        groups: the optimizer's groups as far as they hold `params`, with their learning rates.
    """
    if not isinstance(optimizer, torch.optim.Adam) or any(param.device.type != "cpu" for param in params):
        return None
    place = {id(param): number for number, param in enumerate(params)}
    calls = [_adam(optimizer, group, [place[id(param)] for param in group["params"]]) for group in groups]
    found = [call for call in calls if call is not None]
    if len(found) < len(calls):
        return None
    if len(found) == 1:
        return found[0]

    def step(grads: Sequence[Tensor], scale: float) -> None:
        for call in found:
            call(grads, scale)

    return step


def _adam(optimizer: torch.optim.Optimizer, group: dict[str, Any], places: Sequence[int]) -> Step | None:
    """Adam and AdamW, as `torch.optim.adam._fused_adam` calls them."""
    kernel = getattr(torch, "_fused_adamw_" if group["decoupled_weight_decay"] else "_fused_adam_", None)
    states = [optimizer.state[param] for param in group["params"]]
    if kernel is None or not group["fused"] or not all(states):
        return None
    params, lr = group["params"], group["lr"]
    averages, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    largest = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
    steps = [state["step"] for state in states]
    beta1, beta2 = group["betas"]
    fixed = {
        "amsgrad": group["amsgrad"],
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": group["weight_decay"],
        "eps": group["eps"],
        "maximize": group["maximize"],
    }

    def step(grads: Sequence[Tensor], scale: float) -> None:
        for count in steps:
            count.add_(1)
        some = [grads[place] for place in places]
        kernel(params, some, averages, squares, largest, steps, lr=lr * scale, **fixed)

    return step
