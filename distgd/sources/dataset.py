"""Samples one by one: a map-style `torch.utils.data.Dataset`, or anything with `len(data)` and `data[i]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import default_collate

from distgd.errors import BadInput
from distgd.sources.batch import Batch, tensors
from distgd.sources.order import Indices, seed_everything, undisturbed

Collate = Callable[[list[Any]], Batch]


class DatasetSource:
    """Samples that an object makes by number, put together by `collate` (torch's default where None is given).

    Chance in a sample, such as a random crop, is that of torch's, numpy's and `random`'s generators, which are seeded
    for each slot before its samples are read. A dataset that keeps a generator of its own is not: every process would
    go on with its own. `__getitems__`, where the dataset has it, reads a whole batch at once, as torch's loader does.

    Raises:
        BadInput: the dataset has no samples, or one that cannot be put into a batch.
    """

    def __init__(self, dataset: Any, collate: Collate | None = None, key: str = "data") -> None:
        self._dataset = dataset
        self._collate = collate or default_collate
        self._key = key
        if not len(dataset):
            do = "look at what it reads"
            raise BadInput.described(key, "at least one sample", f"an empty {type(dataset).__name__}", do)

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Indices) -> Batch:
        """These samples, put together."""
        numbers = indices.tolist()
        at_once = getattr(self._dataset, "__getitems__", None)
        samples = at_once(numbers) if callable(at_once) else [self._dataset[number] for number in numbers]
        return self._collate(samples)

    def schema(self) -> dict[str, Any]:
        """The tensors of a batch of sample 0: by place, dtype, and shape without the first dimension."""
        with undisturbed():
            seed_everything(0)
            batch = self.batch(np.zeros(1, dtype=np.int64))
        described = {
            str(place): {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])}
            for place, tensor in enumerate(tensors(batch))
        }
        if not described:
            do = "let the dataset give tensors, arrays or numbers, or set task.collate"
            raise BadInput.described(self._key, "tensors in a batch", f"a {type(batch).__name__} without any", do)
        return described
