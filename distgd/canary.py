"""A canary: fixed arithmetic whose bits tell kinds of machines apart before they meet in one sum.

Two processes that give the same canary are likely, not certain, to give the same gradients: it looks at the kernels
that most models use, in sizes that vector units do not divide, and at nothing of the task. What differs here, differs
in training.

Inputs are whole numbers turned into fractions, which is exact, so that they are the same everywhere.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distgd.device import threads_of
from distgd.layout import block_squares, squared
from distgd.optim import OptimizerSpec, PieceOptimizer

DTYPES = (torch.float32, torch.float64)
ELEMENTS = 1003
"""Of a vector that is stepped: whole blocks of 64 and a rest."""
STEPS = 3
"""An optimizer's first step may be another code path than those that follow."""
CPUINFO = Path("/proc/cpuinfo")


def gradients(device: str, threads: int) -> str:
    """What a worker's arithmetic comes to: forward and backward of common layers, in float32 and float64.

    Args:
        device: `cpu` or `cuda`.
        threads: of torch, which is set back afterwards; two add up in another order than one.

    Returns:
        A SHA-256 in hex.
    """
    with threads_of(threads), torch.enable_grad(), torch.autocast(device, enabled=False):
        return _digest(each for dtype in DTYPES for each in _layers(_Inputs(device, dtype)))


def steps(optimizer: OptimizerSpec, dtype: torch.dtype, device: str) -> str:
    """What a server's arithmetic comes to: sums of squares, and steps of its own optimizer; a SHA-256 in hex."""
    inputs = _Inputs(device, dtype)
    weights, grad = inputs(1, ELEMENTS).detach(), inputs(2, ELEMENTS).detach()
    with threads_of(1), torch.no_grad():
        stepper = PieceOptimizer(optimizer, [("canary", weights)])
        for number in range(STEPS):
            stepper.step([grad / (number + 1)])
        flat = grad[: ELEMENTS // 64 * 64].cpu()
        return _digest([weights, block_squares(flat), torch.tensor([squared(flat)], dtype=torch.float64)])


@cache
def of_worker(device: str, threads: int) -> dict[str, str]:
    """A worker's facts, computed once a process: its canary, and the machine's kind in words."""
    return {"canary": gradients(device, threads), "machine": machine(device, threads)}


def of_server(optimizer: OptimizerSpec, dtype: torch.dtype, device: str) -> dict[str, str]:
    """A server's facts."""
    return {"canary": steps(optimizer, dtype, device), "machine": machine(device, 1)}


def machine(device: str, threads: int) -> str:
    """What computes here, in words: the CPU or GPU, torch's version, the instructions that torch uses, threads."""
    torch_is = f"torch {torch.__version__}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {torch_is}"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu()}, {vectors}, {torch_is}, {threads} thread" + ("s" if threads > 1 else "")


def _cpu() -> str:
    """The CPU's name; where the system does not say, its architecture."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Processor")))
    return next((name for name in said if name), platform.processor() or platform.machine())


class _Inputs:
    """Fractions in [-1, 1) of a shape, on a device; another seed gives others."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def __call__(self, seed: int, *shape: int) -> Tensor:
        number = torch.arange(math.prod(shape), dtype=torch.int64) + 7919 * seed
        fractions = (number * 1103515245 + 12345) % (1 << 31) - (1 << 30)
        value = (fractions.to(torch.float64) / (1 << 30)).to(self._dtype).to(self._device)
        return value.view(shape).requires_grad_()


def _layers(inputs: _Inputs) -> Iterator[Tensor]:
    """Every result of every layer: its value, and the gradients of what it is made of."""
    for rows, inner, columns in ((1, 7, 5), (33, 129, 65), (48, 384, 80)):
        yield from _both(F.linear, inputs(1, rows, inner), inputs(2, columns, inner), inputs(3, columns))
    image, kernel = inputs(4, 3, 3, 13, 11), inputs(5, 5, 3, 3, 3)
    yield from _both(lambda x, w: F.conv2d(x, w, padding=1), image, kernel)
    rows_of = inputs(6, 17, 103)
    yield from _both(lambda x: F.softmax(x, 1), rows_of)
    yield from _both(lambda x: F.log_softmax(x, 1), rows_of)
    scale, shift = inputs(7, 103), inputs(8, 103)
    yield from _both(lambda x, w, b: F.layer_norm(x, (103,), w, b), rows_of, scale, shift)
    yield from _both(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), rows_of, scale, shift)
    vector = inputs(9, 2051)
    for function in (torch.exp, torch.tanh, torch.erf, torch.sigmoid):
        yield from _both(function, vector)
    long = inputs(10, 33_013)  # longer than what one thread adds alone
    yield from _both(lambda x: x.sum(), long)
    yield from _both(lambda x: x.square().mean(), long)


def _both(layer: Callable[..., Tensor], *given: Tensor) -> Iterator[Tensor]:
    value = layer(*given)
    yield value
    yield from torch.autograd.grad((value * value).sum(), given)


def _digest(results: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
