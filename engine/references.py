"""What is remembered between jobs, by content hash: prompt states, reference latents, keys and values."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

import numpy as np
from torch import Tensor

from engine.contract import Rgb8

Remembered = tuple[Tensor, ...]


def content_hash(image: Rgb8) -> str:
    """Tells pictures apart by their pixels and size."""
    digest = hashlib.sha256(np.ascontiguousarray(image).data)
    digest.update(str(image.shape).encode())
    return digest.hexdigest()


class Memory:
    """Least recently used first to go, within a budget of bytes. One engine, one thread."""

    def __init__(self, budget: int) -> None:
        """budget: bytes that may be kept; what is larger by itself is not kept at all."""
        self.budget = budget
        self.held = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[Hashable, Remembered] = OrderedDict()

    def get(self, key: Hashable) -> Remembered | None:
        """What was put under `key`, if it is still there."""
        kept = self._kept.get(key)
        if kept is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return kept

    def put(self, key: Hashable, tensors: Iterable[Tensor]) -> Remembered:
        """Keep `tensors`, forgetting the oldest if need be."""
        tensors = tuple(tensors)
        size = _bytes(tensors)
        if size > self.budget:
            return tensors
        if (old := self._kept.pop(key, None)) is not None:
            self.held -= _bytes(old)
        while self.held + size > self.budget:
            self.held -= _bytes(self._kept.popitem(last=False)[1])
        self._kept[key] = tensors
        self.held += size
        return tensors

    def get_or(self, key: Hashable, make: Callable[[], Iterable[Tensor]]) -> tuple[Remembered, bool]:
        """What is remembered under `key`, or made now; and whether it was remembered."""
        if (kept := self.get(key)) is not None:
            return kept, True
        return self.put(key, make()), False

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.held = 0

    def __len__(self) -> int:
        return len(self._kept)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
