"""Caches: tensors in two tiers, device and host, and a small LRU.

Tensors are cached between jobs by content hash.
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from engine.contract import CacheStats

CacheEntry = tuple[Tensor, ...]

Value = TypeVar("Value")

HOST_BYTES = 64 << 20
"""Budget where a CPU computes: the states of four prompts of a 4B in fp32, or eight in bf16. Encoding a prompt there
takes a fraction of an image's time, and memory that grows for hours is missed by other programs."""

_MAX_BYTES = 32 << 30
"""Upper limit of a tier's default budget, enough for the references of hours of work."""


class LruCache(Generic[Value]):
    """Cache of the most recently used values.

    Not functools.lru_cache: around a method it forms a reference cycle with the object, and a released model would
    stay in memory until the next garbage collection.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """Return the value, which counts as a use."""
        return self._use(key) if key in self._values else None

    def get_or_compute(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Return the value under `key`, computing it if it is missing."""
        return self.insert(key, compute()) if key not in self._values else self._use(key)

    def insert(self, key: Hashable, value: Value) -> Value:
        """Add or replace the value under `key` and return it."""
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
    """Entries in order of last use, within a budget of bytes."""

    budget: int
    held: int
    entries: OrderedDict[Hashable, CacheEntry]

    def pop(self, key: Hashable) -> CacheEntry | None:
        """Remove and return an entry."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.held -= _bytes(entry)
        return entry

    def insert(self, key: Hashable, entry: CacheEntry) -> list[tuple[Hashable, CacheEntry]]:
        """Add the latest entry and return the evicted ones.

        The entry itself is among them if it exceeds the budget.
        """
        self.pop(key)
        self.entries[key] = entry
        self.held += _bytes(entry)
        evicted = []
        while self.held > self.budget:
            oldest = next(iter(self.entries))
            evicted.append((oldest, self.entries[oldest]))
            self.pop(oldest)
        return evicted


def budgets(free: int, host: int | None, *, cpu: bool = False) -> tuple[int, int]:
    """Return the default budgets in bytes of device and host.

    free: bytes free on the device with the model loaded.
    host: bytes free in host memory, None where the device computes in it and spilling would save nothing.
    cpu: the device is the processor, and its memory every program's.
    The keys and values of one 1-MP reference take 2.15 GB with a 9B: a smaller budget would never hold them.
    """
    if cpu:
        return min(free // 4, HOST_BYTES), 0
    if host is None:
        return min(free // 4, _MAX_BYTES), 0
    return min(free // 2, _MAX_BYTES), min(host // 4, _MAX_BYTES)


class TensorCache:
    """LRU cache of tensors that spills from device to host memory.

    One engine uses it, in one thread. The counters may be read from any thread.
    """

    def __init__(self, budget: int, spill: int = 0) -> None:
        """Create an empty cache.

        budget, spill: bytes it may hold on the device and in host memory.
        """
        self._device = LruTier(budget, 0, OrderedDict())
        self._host = LruTier(spill, 0, OrderedDict())
        self._origin: dict[Hashable, torch.device] = {}
        self.hits = 0
        self.misses = 0

    def get(self, key: Hashable) -> CacheEntry | None:
        """Return the entry, or None if it is missing.

        A spilled entry is copied back to its device.
        """
        entry = self._device.pop(key)
        if entry is None and (spilled := self._host.pop(key)) is not None:
            entry = tuple(tensor.to(self._origin[key]) for tensor in spilled)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        return self.insert(key, entry)

    def insert(self, key: Hashable, tensors: Iterable[Tensor]) -> CacheEntry:
        """Store `tensors`, spilling and evicting the oldest if necessary."""
        tensors = tuple(tensors)
        self._origin[key] = tensors[0].device
        self._host.pop(key)
        for spilled, entry in self._device.insert(key, tensors):
            self._spill(spilled, entry)
        return tensors

    def _spill(self, key: Hashable, entry: CacheEntry) -> None:
        """Move an entry to host memory, evicting the oldest there."""
        for evicted, _ in self._host.insert(key, tuple(tensor.cpu() for tensor in entry)):
            del self._origin[evicted]

    def make_room(self, limit: int, needed: Container[Hashable] = ()) -> bool:
        """Spill the oldest entries until the device holds at most `limit` bytes.

        needed: entries that stay and do not count. Returns whether any went.
        """
        others = [(key, entry) for key, entry in self._device.entries.items() if key not in needed]
        held, gone = sum(_bytes(entry) for _, entry in others), False
        for key, entry in others:
            if held <= limit:
                break
            self._device.pop(key)
            self._spill(key, entry)
            held, gone = held - _bytes(entry), True
        return gone

    def get_or_compute(self, key: Hashable, compute: Callable[[], Iterable[Tensor]]) -> tuple[CacheEntry, bool]:
        """Return the entry under `key` and whether it was cached.

        A missing entry is computed.
        """
        if (entry := self.get(key)) is not None:
            return entry, True
        return self.insert(key, compute()), False

    def resize(self, budget: int, spill: int) -> None:
        """Set new budgets, spilling and evicting entries that no longer fit."""
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
        """Return the counters, from any thread."""
        return CacheStats(len(self), self._device.held, self._host.held, self.hits, self.misses)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
