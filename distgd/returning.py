"""A shard's weights on their way to other machines: in buckets, each as soon as it has been stepped.

Exact ones are the weights themselves. Others are differences to what the readers hold, which is remembered here, so
that what one difference loses is in the next: readers differ from the shard by one rounding, never by their sum.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from distgd.codecs import CODECS, Exact
from distgd.events import WeightsPart
from distgd.staging import cuts


class Returning:
    """Makes the parts.

    Args:
        weights: the shard's own, stepped in place.
        bucket: elements of a part.
        dtype: `transport.dtype`.
    """

    def __init__(self, timeline: int, shard: int, weights: Tensor, bucket: int, dtype: str) -> None:
        self._timeline, self._shard, self._weights = timeline, shard, weights
        self.cuts = cuts(weights.numel(), bucket)
        self._codec = CODECS[dtype]()
        self._shown: Tensor | None = None  # what readers hold, where that differs from the weights
        self._version = -1  # of what they hold

    def whole(self, version: int) -> Iterator[WeightsPart]:
        """All of a version, for a reader who holds nothing of use.

        Where differences travel it is what the other readers hold, so that it takes part in the next difference.
        """
        if not isinstance(self._codec, Exact) and self._version != version:
            self._shown, self._version = self._weights.clone(), version
        values = self._weights if self._shown is None else self._shown
        for start, stop in self.cuts:
            yield WeightsPart(self._timeline, self._shard, version, start, values[start:stop].numpy(), delta=False)

    def continues(self, version: int, holds: int) -> bool:
        """Whether a reader who holds version `holds` can be sent `part`s towards `version`."""
        return isinstance(self._codec, Exact) or (self._version == holds == version - 1)

    def part(self, version: int, start: int, stop: int) -> WeightsPart:
        """One bucket towards `version`, for every reader who `continues`; to be asked for once a version, all of them.

        The memory is the shard's own where numbers travel as they are.
        """
        values = self._weights[start:stop]
        if self._shown is not None:
            shown = self._shown[start:stop]
            array = self._codec.encode(values - shown)
            shown.add_(self._codec.decode(array, values.dtype))
            if stop == self._weights.numel():
                self._version = version
            return WeightsPart(self._timeline, self._shard, version, start, array, delta=True)
        return WeightsPart(self._timeline, self._shard, version, start, values.numpy(), delta=False)
