"""Which gradients are out of proportion: a limit on a slot's norm, from the running median of those before it.

The norm of a slot's mean gradient, before any clipping, is a pure function of the slot, so that in sync mode whoever
follows the commits has the same limit for every step, whatever the number of workers and servers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf, isfinite
from statistics import median_low

from distgd.events import SlotStats

WINDOW = 64  # slots that the median is taken over
FEWEST = 16  # slots that it takes until there is a limit


class Norms:
    """The norms of the slots that were applied last, as squares, in the order of commits; committed state.

    Args:
        ratio: a slot whose norm is above so many times the median is out of proportion; None for no limit.
        squares: of a former process.
    """

    def __init__(self, ratio: float | None, squares: Iterable[float] = ()) -> None:
        self.ratio = ratio
        self._squares = deque(squares, WINDOW)

    @property
    def squares(self) -> list[float]:
        """For whoever goes on from here."""
        return list(self._squares)

    @property
    def median(self) -> float | None:
        """The median norm; None while too few are known. Slots without any gradient do not count."""
        return median_low(self._squares) ** 0.5 if len(self._squares) >= FEWEST else None

    @property
    def limit(self) -> float:
        """The largest squared norm that is in proportion; infinite where there is no limit (yet)."""
        if self.ratio is None or len(self._squares) < FEWEST:
            return inf
        return self.ratio**2 * median_low(self._squares)

    def observe(self, applied: Sequence[SlotStats]) -> None:
        """Count slots that are in the weights now; those of one step in the order of slots."""
        if self.ratio is not None:
            self._squares.extend(s.squared_norm for s in applied if s.squared_norm > 0.0 and isfinite(s.squared_norm))

    def exceeds(self, stats: SlotStats) -> bool:
        """Whether a slot is finite and out of proportion."""
        return isfinite(stats.loss) and self.limit < stats.squared_norm < inf
