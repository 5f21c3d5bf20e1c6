"""What is remembered between jobs, by content hash: prompt states, reference latents, keys and values."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.contract import CacheStats, Rgb8

CacheEntry = tuple[Tensor, ...]


def content_hash(image: Rgb8) -> str:
    """Tells pictures apart by their pixels and size."""
    digest = hashlib.sha256(np.ascontiguousarray(image).data)
    digest.update(str(image.shape).encode())
    return digest.hexdigest()


@dataclass(slots=True)
class LruTier:
    """Entries in the order of their last use, within a budget of bytes."""

    budget: int
    held: int
    entries: OrderedDict[Hashable, CacheEntry]

    def take(self, key: Hashable) -> CacheEntry | None:
        """Out of the shelf."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.held -= _bytes(entry)
        return entry

    def lay(self, key: Hashable, entry: CacheEntry) -> list[tuple[Hashable, CacheEntry]]:
        """Onto the shelf as the latest; returns what had to leave, which may be the entry itself."""
        self.take(key)
        self.entries[key] = entry
        self.held += _bytes(entry)
        left = []
        while self.held > self.budget:
            oldest = next(iter(self.entries))
            left.append((oldest, self.entries[oldest]))
            self.take(oldest)
        return left


def budgets(free: int, host: int | None) -> tuple[int, int]:
    """Bytes to remember on the device and in the host's memory, when so much is free with the model loaded.

    host: None where the device has no memory of its own; then nothing is gained by spilling.
    The keys and values of one 1-MP reference take 2.15 GB of a 9B: with less they would never be remembered.
    """
    if host is None:
        return min(free // 4, _MOST), 0
    return min(free // 2, _MOST), min(host // 4, _MOST)


_MOST = 32 << 30
"""More references than an afternoon's work needs."""


class TensorCache:
    """Least recently used first to go: from the device to the host's memory, from there for good.

    For one engine in one thread; the counts may be read from any.
    """

    def __init__(self, budget: int, spill: int = 0) -> None:
        """budget, spill: bytes that may be kept on the device and in the host's memory."""
        self._near = LruTier(budget, 0, OrderedDict())
        self._far = LruTier(spill, 0, OrderedDict())
        self._home: dict[Hashable, torch.device] = {}
        self.hits = 0
        self.misses = 0

    def get(self, key: Hashable) -> CacheEntry | None:
        """What was put under `key`, if it is still there; brought back to its device if it was spilled."""
        entry = self._near.take(key)
        if entry is None and (spilled := self._far.take(key)) is not None:
            entry = tuple(tensor.to(self._home[key]) for tensor in spilled)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        return self.put(key, entry)

    def put(self, key: Hashable, tensors: Iterable[Tensor]) -> CacheEntry:
        """Keep `tensors`, spilling and forgetting the oldest if need be."""
        tensors = tuple(tensors)
        self._home[key] = tensors[0].device
        self._far.take(key)
        for old, entry in self._near.lay(key, tensors):
            for gone, _ in self._far.lay(old, tuple(tensor.cpu() for tensor in entry)):
                del self._home[gone]
        return tensors

    def get_or(self, key: Hashable, make: Callable[[], Iterable[Tensor]]) -> tuple[CacheEntry, bool]:
        """What is remembered under `key`, or made now; and whether it was remembered."""
        if (kept := self.get(key)) is not None:
            return kept, True
        return self.put(key, make()), False

    def resize(self, budget: int, spill: int) -> None:
        """New budgets; what no longer fits leaves as it always does."""
        near = list(self._near.entries.items())
        self._near, self._far.budget = LruTier(budget, 0, OrderedDict()), spill
        for key, entry in near:
            self.put(key, entry)

    def clear(self) -> None:
        """Forget everything."""
        for shelf in (self._near, self._far):
            shelf.entries.clear()
            shelf.held = 0
        self._home.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._near.entries or key in self._far.entries

    def __len__(self) -> int:
        return len(self._home)

    def stats(self) -> CacheStats:
        """Return the counters; safe from any thread."""
        return CacheStats(len(self), self._near.held, self._far.held, self.hits, self.misses)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
