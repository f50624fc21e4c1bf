"""A shard's optimizer on a card: weights and state live there, and the shard's own memory gets a copy of the weights.

So whoever reads weights, and every rule of a shard, is as on the CPU. Gradients come block by block, and a block's new
weights are back when it has been stepped, as they may be sent before the next one is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distgd.device import Card
from distgd.layout import Slice
from distgd.optim import OptimizerSpec, PieceOptimizer, State, StateParts


class MirroredOptimizer(PieceOptimizer):
    """A `PieceOptimizer` whose tensors are a card's; it writes to `weights`, [part.size] in host memory."""

    def __init__(self, spec: OptimizerSpec, part: Slice, weights: Tensor, card: Card, *, block: int) -> None:
        self._device, self._weights = card.device, weights
        self._pins = card.pins  # whose life is that of the registered memory
        self._mirror = weights.to(card.device, copy=True)
        super().__init__(spec, [(p.name, self._mirror[p.start : p.start + p.size]) for p in part.pieces], block=block)
        starts = [piece.start for piece in part.pieces]
        self._places = [[(starts[i] + lo, starts[i] + hi) for i, lo, hi in cuts] for cuts in self.blocks]
        self._grads = self._mirror.new_empty(max((self._size(number) for number in range(len(self.blocks))), default=0))
        self._pins.pin("weights", weights)

    def step_block(self, number: int, grads: Sequence[Tensor], scale: float = 1.0) -> None:
        """As on the CPU."""
        super().step_block(number, self._received(number, grads), scale)
        first, stop = self._places[number][0][0], self._places[number][-1][1]
        self._weights[first:stop].copy_(self._mirror[first:stop])

    def state_parts(self) -> StateParts:
        """As on the CPU, and copied there."""
        return {
            label: {
                name: {entry: [part.cpu() for part in parts] for entry, parts in own.items()}
                for name, own in tensors.items()
            }
            for label, tensors in super().state_parts().items()
        }

    def load_state_dict(self, state: State) -> None:
        """As on the CPU; entries go where torch has them."""
        super().load_state_dict(state)
        for own in (self._state_of(cut) for cuts in self._cuts.values() for cut in cuts):
            for entry, value in own.items():
                if entry != "step" or self._fused:  # torch counts steps on the CPU, except for its fused kernels
                    own[entry] = value.to(self._device)

    @property
    def _fused(self) -> bool:
        return self._torch is not None and bool(self._torch.defaults.get("fused"))

    def _size(self, number: int) -> int:
        return self._places[number][-1][1] - self._places[number][0][0]

    def _received(self, number: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients on the card, in one copy where they lie as the weights do; the caller's may change afterwards."""
        first = self._places[number][0][0]
        spans = [slice(lo - first, hi - first) for lo, hi in self._places[number]]
        own = self._grads[: self._size(number)]
        whole = _around(grads, spans)
        if whole is not None:
            own.copy_(whole)
        else:
            for span, grad in zip(spans, grads, strict=True):
                own[span].copy_(grad)
        return [own[span] for span in spans]


def _around(parts: Sequence[Tensor], spans: Sequence[slice]) -> Tensor | None:
    """The vector that has `parts` at `spans`, the first at 0; None where they are not views of one."""
    memory, start = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part, span in zip(parts, spans, strict=True):
        if part.untyped_storage().data_ptr() != memory or part.storage_offset() != start + span.start:
            return None
    return torch.as_strided(parts[0], (spans[-1].stop,), (1,), start)
