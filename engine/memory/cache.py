"""Caches: tensors kept between jobs by content hash, on the device and spilled to the host; and a small LRU."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from engine.contract import CacheStats

CacheEntry = tuple[Tensor, ...]

Value = TypeVar("Value")

_MAX_BYTES = 32 << 30
"""More references than an afternoon's work needs."""


class LruCache(Generic[Value]):
    """The values used last, by key.

    Not functools.lru_cache: around a method it holds the object that holds it, and a released model would stay in
    memory until Python next looks for cycles.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """Return the value, which counts as a use."""
        return self._use(key) if key in self._values else None

    def get_or_compute(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Return the value under `key`, computed now if need be."""
        return self.insert(key, compute()) if key not in self._values else self._use(key)

    def insert(self, key: Hashable, value: Value) -> Value:
        """Add or replace the value under `key`; return it."""
        self._values[key] = value
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return self._use(key)

    def _use(self, key: Hashable) -> Value:
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Hashable]:
        return iter(tuple(self._values))

    def __len__(self) -> int:
        return len(self._values)


@dataclass(slots=True)
class LruTier:
    """Entries in the order of their last use, within a budget of bytes."""

    budget: int
    held: int
    entries: OrderedDict[Hashable, CacheEntry]

    def pop(self, key: Hashable) -> CacheEntry | None:
        """Take an entry out."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.held -= _bytes(entry)
        return entry

    def insert(self, key: Hashable, entry: CacheEntry) -> list[tuple[Hashable, CacheEntry]]:
        """Add the latest entry; return what was evicted, which may be the entry itself."""
        self.pop(key)
        self.entries[key] = entry
        self.held += _bytes(entry)
        evicted = []
        while self.held > self.budget:
            oldest = next(iter(self.entries))
            evicted.append((oldest, self.entries[oldest]))
            self.pop(oldest)
        return evicted


def budgets(free: int, host: int | None) -> tuple[int, int]:
    """Bytes to keep on the device and in host memory, when so much is free with the model loaded.

    host: None where the device computes in host memory; then nothing is gained by spilling.
    The keys and values of one 1-MP reference take 2.15 GB of a 9B: with less they would never be kept.
    """
    if host is None:
        return min(free // 4, _MAX_BYTES), 0
    return min(free // 2, _MAX_BYTES), min(host // 4, _MAX_BYTES)


class TensorCache:
    """Tensors by key; the least recently used leave the device for host memory, and then for good.

    For one engine in one thread; the counters may be read from any.
    """

    def __init__(self, budget: int, spill: int = 0) -> None:
        """budget, spill: bytes that may be kept on the device and in host memory."""
        self._device = LruTier(budget, 0, OrderedDict())
        self._host = LruTier(spill, 0, OrderedDict())
        self._origin: dict[Hashable, torch.device] = {}
        self.hits = 0
        self.misses = 0

    def get(self, key: Hashable) -> CacheEntry | None:
        """Return the entry, brought back to its device if it was spilled; None if it is gone."""
        entry = self._device.pop(key)
        if entry is None and (spilled := self._host.pop(key)) is not None:
            entry = tuple(tensor.to(self._origin[key]) for tensor in spilled)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        return self.insert(key, entry)

    def insert(self, key: Hashable, tensors: Iterable[Tensor]) -> CacheEntry:
        """Keep `tensors`, spilling and evicting the oldest if need be."""
        tensors = tuple(tensors)
        self._origin[key] = tensors[0].device
        self._host.pop(key)
        for spilled, entry in self._device.insert(key, tensors):
            for evicted, _ in self._host.insert(spilled, tuple(tensor.cpu() for tensor in entry)):
                del self._origin[evicted]
        return tensors

    def get_or_compute(self, key: Hashable, compute: Callable[[], Iterable[Tensor]]) -> tuple[CacheEntry, bool]:
        """Return the entry under `key`, computed now if need be; and whether it was there."""
        if (entry := self.get(key)) is not None:
            return entry, True
        return self.insert(key, compute()), False

    def resize(self, budget: int, spill: int) -> None:
        """Set new budgets; what no longer fits leaves as it always does."""
        entries = list(self._device.entries.items())
        self._device, self._host.budget = LruTier(budget, 0, OrderedDict()), spill
        for key, entry in entries:
            self.insert(key, entry)

    def clear(self) -> None:
        """Drop everything."""
        for tier in (self._device, self._host):
            tier.entries.clear()
            tier.held = 0
        self._origin.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._device.entries or key in self._host.entries

    def __len__(self) -> int:
        return len(self._origin)

    def stats(self) -> CacheStats:
        """Return the counters; safe from any thread."""
        return CacheStats(len(self), self._device.held, self._host.held, self.hits, self.misses)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
