"""Stand-ins for CUDA graphs, which no CPU captures."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from engine.families.klein import runner as runner_module
from engine.memory.device import Device
from engine.nn import ops


class Pool:
    """A pool that takes no graph after the last one of it was freed, as torch's."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[FakeGraph] = weakref.WeakSet()
        self.used = False

    def take(self, graph: "FakeGraph") -> None:
        assert not self.used or self.graphs, "use_count > 0"
        self.used = True
        self.graphs.add(graph)


class FakeGraph:
    """Replays by calling the function again, on the buffers alone."""

    made = 0
    pool_bytes = 1000

    def __init__(self, function: Callable[[], Tensor], buffers: Sequence[Tensor], pool: Any) -> None:
        type(self).made += 1
        self.function, self.buffers = function, buffers
        if isinstance(pool, Pool):
            pool.take(self)

    def __call__(self, inputs: Any) -> Tensor:
        for buffer, given in zip(self.buffers, inputs, strict=True):
            buffer.copy_(given)
        return self.function().clone()


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models take this device for one that captures graphs."""
    monkeypatch.setattr(Device, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(runner_module, "DeviceGraph", FakeGraph)
    monkeypatch.setattr(runner_module, "graph_pool", Pool)
    monkeypatch.setattr(FakeGraph, "made", 0)
    monkeypatch.setattr(ops, "_chosen", dict(ops.PLAIN))
