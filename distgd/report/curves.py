"""A metric over a run in bounded memory.

A run may have any number of steps, and a picture has about a thousand columns. A `Curve` keeps every point until there
are `MOST`; from then on neighbours are merged, two by two, and each time twice as many. What is left of a bucket is its
mean, its smallest and its largest value, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

MOST = 2000
"""Buckets of a curve at most; an even number."""

MOST_LOST = 100
"""Places of values that are not finite that a curve remembers."""


class Place(NamedTuple):
    """Where in a run something happened; a bucket stands where its last value does."""

    step: int
    samples: int
    seconds: float


@dataclass
class Curve:
    """The finite values of one metric in order, in at most `MOST` buckets of `width` values each.

    `lost` holds the first places whose values were not finite.

    >>> curve = Curve()
    >>> for step in range(4 * MOST):
    ...     curve.add(Place(step, step, 0.0), float(step))
    >>> len(curve.means), curve.means[0], curve.highs[-1]
    (2000, 1.5, 7999.0)
    """

    places: list[Place] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    width: int = 1
    lost: list[Place] = field(default_factory=list)

    def add(self, place: Place, value: float) -> None:
        """Take the next value, in order of place."""
        if not math.isfinite(value):
            self.lost += [place] if len(self.lost) < MOST_LOST else []
        elif self.counts and self.counts[-1] < self.width:
            self._extend(place, value)
        else:
            if len(self.counts) == MOST:
                self._halve()
            self._append(place, value)

    def _append(self, place: Place, value: float) -> None:
        self.places.append(place)
        self.sums.append(value)
        self.counts.append(1)
        self.lows.append(value)
        self.highs.append(value)

    def _extend(self, place: Place, value: float) -> None:
        self.places[-1] = place
        self.sums[-1] += value
        self.counts[-1] += 1
        self.lows[-1] = min(self.lows[-1], value)
        self.highs[-1] = max(self.highs[-1], value)

    def _halve(self) -> None:
        self.width *= 2
        self.places = self.places[1::2]
        self.sums = [a + b for a, b in zip(self.sums[::2], self.sums[1::2], strict=True)]
        self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]
        self.lows = [min(pair) for pair in zip(self.lows[::2], self.lows[1::2], strict=True)]
        self.highs = [max(pair) for pair in zip(self.highs[::2], self.highs[1::2], strict=True)]

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def means(self) -> list[float]:
        """The mean of each bucket; the values themselves while `width` is 1."""
        return [total / count for total, count in zip(self.sums, self.counts, strict=True)]

    @property
    def steps(self) -> list[int]:
        """The step of each bucket."""
        return [place.step for place in self.places]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean over `window` values around each, an even one counted as the next odd; fewer at the ends.

    >>> running_mean([1.0, 2.0, 6.0], 3)
    [1.5, 3.0, 4.0]
    """
    count, half = len(values), window // 2
    sums = [0.0, *accumulate(values)]
    ranges = ((max(0, at - half), min(count, at + half + 1)) for at in range(count))
    return [(sums[end] - sums[start]) / (end - start) for start, end in ranges]
