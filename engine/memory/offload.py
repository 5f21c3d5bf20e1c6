"""Offloading: layers in host memory stream through a ring on the device.

The next layer is copied while one computes.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.memory.arena import HostArena, aligned
from engine.memory.device import CopyStream, StreamEvent
from engine.memory.plan import SLOTS

_thread = threading.local()


def in_turn() -> bool:
    """Return whether this thread is computing with a streamed layer.

    Others wait for it, so it must not be paused.
    """
    return getattr(_thread, "in_turn", False)


class OffloadRing:
    """Ring of device memory shared by all offloaded layers of a model.

    The order of use is taken from the previous pass.
    """

    def __init__(self, device: torch.device, arena: HostArena | None = None) -> None:
        """arena: the layers' host memory, locked as long as the ring exists."""
        self.device, self.arena = device, arena
        self._copies = CopyStream(device)
        self._lock = threading.Lock()
        self._slots = [_RingSlot() for _ in range(SLOTS)]
        self._after: dict[OffloadedModule, OffloadedModule] = {}
        self._current: _RingSlot | None = None

    def room_for(self, size: int) -> None:
        """Enlarge the slots to hold layers of `size` bytes."""
        for slot in self._slots:
            if slot.memory is None or slot.memory.nbytes < size:
                slot.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
                slot.layer = None

    @property
    def bytes(self) -> int:
        return sum(slot.memory.nbytes for slot in self._slots if slot.memory is not None)

    def close(self) -> None:
        """Give the memory back. No layer can be fetched any more."""
        self._slots = [_RingSlot() for _ in range(SLOTS)]
        self.arena = self._current = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let no other thread overwrite a layer's weights.

        The compiling thread runs its examples beside jobs, on the same ring.
        """
        _thread.in_turn = True
        try:
            with self._lock:
                yield
        finally:
            _thread.in_turn = False

    def fetch(self, layer: "OffloadedModule") -> dict[str, Tensor]:
        """Return the layer's weights on the device and prefetch the next layer.

        The weights are valid until the next layer is fetched, so both belong into one `turn`.
        """
        slot = next((slot for slot in self._slots if slot.layer is layer), None)
        if slot is None:
            slot = next(slot for slot in self._slots if slot is not self._current)
            self._send(layer, slot)
        self._copies.wait_event(slot.arrived)
        previous, self._current = self._current, slot
        if previous is not None and previous is not slot:
            # All computation with the previous layer has been issued by now.
            previous.done = self._copies.record_event()
            if previous.layer is not None:
                self._after[previous.layer] = layer
            following = self._after.get(layer)
            if following is not None and following is not previous.layer:
                self._send(following, previous)
        return slot.tensors

    def _send(self, layer: "OffloadedModule", slot: "_RingSlot") -> None:
        assert slot.memory is not None
        slot.layer, slot.tensors, at = layer, {}, 0
        for name, source in layer.offloaded.items():
            target = slot.memory[at : at + source.nbytes].view(source.dtype).view(source.shape)
            slot.arrived = self._copies.copy_async(target, source, slot.done)
            slot.tensors[name] = target
            at += aligned(source.nbytes)


class _RingSlot:
    """A slot of the ring, as large as the largest layer.

    arrived: event after which its tensors are valid. done: event after which it may be overwritten.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.layer: OffloadedModule | None = None
        self.tensors: dict[str, Tensor] = {}
        self.arrived: StreamEvent = None
        self.done: StreamEvent = None


class OffloadedModule(nn.Module):
    """A layer whose weights are on the device only while it computes."""

    def __init__(self, layer: nn.Module, ring: OffloadRing) -> None:
        super().__init__()
        self.layer = layer
        # In a list, so that the ring is not registered as a part of the module.
        self._ring = [ring]
        self.offloaded: dict[str, Tensor] = {
            name: tensor.detach() for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
        }

    @property
    def bytes(self) -> int:
        """Size of a slot for this layer."""
        return sum(aligned(tensor.nbytes) for tensor in self.offloaded.values())

    def forward(self, x: Tensor) -> Any:
        ring = self._ring[0]
        with ring.turn():
            return torch.func.functional_call(self.layer, ring.fetch(self), (x,))


class CpuEmbedding(nn.Module):
    """An embedding table that stays in host memory.

    Only the rows of the prompt's tokens are copied to the device.
    """

    def __init__(self, table: nn.Embedding, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of the rows that are returned."""
        super().__init__()
        self.weight = table.weight
        self._device, self._dtype = device, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids.to(self.weight.device), self.weight).to(self._device, self._dtype)


def stream(module: nn.Module, layers: tuple[str, ...], ring: OffloadRing) -> None:
    """Replace the named layers by ones that stream through `ring`.

    Their weights must be in host memory.
    """
    for name in layers:
        streamed = OffloadedModule(module.get_submodule(name), ring)
        ring.room_for(streamed.bytes)
        module.set_submodule(name, streamed)


def ring_bytes(*networks: nn.Module) -> int:
    """Return the bytes of the rings that layers stream through."""
    modules = (module for network in networks for module in network.modules())
    return sum(ring.bytes for ring in {module._ring[0] for module in modules if isinstance(module, OffloadedModule)})


def drop_weights(*networks: nn.Module) -> None:
    """Free the memory of weights while something still refers to the networks.

    They cannot compute any more.
    """
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, OffloadedModule):
            module.offloaded = {}
            module._ring[0].close()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
