"""Layers that sleep in the host's memory pass through a ring on the device, the next one already on its way."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.memory.device import CopyStream, StreamEvent
from engine.memory.plan import SLOTS

_ALIGN = 256
"""Bytes between the starts of tensors in a slot: what the device's matrix units want."""


class OffloadRing:
    """The ring that all streamed layers of a model share. The order of use is learned from the last time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._courier = CopyStream(device)
        self._slots = [_RingSlot() for _ in range(SLOTS)]
        self._after: dict[OffloadedModule, OffloadedModule] = {}
        self._current: _RingSlot | None = None

    def room_for(self, size: int) -> None:
        """Make the slots hold layers of `size` bytes."""
        for slot in self._slots:
            if slot.memory is None or slot.memory.nbytes < size:
                slot.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
                slot.layer = None

    @property
    def bytes(self) -> int:
        return sum(slot.memory.nbytes for slot in self._slots if slot.memory is not None)

    def fetch(self, layer: "OffloadedModule") -> dict[str, Tensor]:
        """The layer's weights on the device, until the next is fetched; and that next one is sent for."""
        slot = next((slot for slot in self._slots if slot.layer is layer), None)
        if slot is None:
            slot = next(slot for slot in self._slots if slot is not self._current)
            self._send(layer, slot)
        self._courier.wait(slot.arrived)
        previous, self._current = self._current, slot
        if previous is not None and previous is not slot:
            # All that was computed with it has been asked for by now.
            previous.done = self._courier.mark()
            if previous.layer is not None:
                self._after[previous.layer] = layer
            following = self._after.get(layer)
            if following is not None and following is not previous.layer:
                self._send(following, previous)
        return slot.tensors

    def _send(self, layer: "OffloadedModule", slot: "_RingSlot") -> None:
        assert slot.memory is not None
        slot.layer, slot.tensors, at = layer, {}, 0
        for name, asleep in layer.asleep.items():
            there = slot.memory[at : at + asleep.nbytes].view(asleep.dtype).view(asleep.shape)
            slot.arrived = self._courier.carry(there, asleep, slot.done)
            slot.tensors[name] = there
            at += -(-asleep.nbytes // _ALIGN) * _ALIGN


class _RingSlot:
    """memory: as large as the largest layer. arrived: its tensors are there. done: it may be overwritten."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.layer: OffloadedModule | None = None
        self.tensors: dict[str, Tensor] = {}
        self.arrived: StreamEvent = None
        self.done: StreamEvent = None


class OffloadedModule(nn.Module):
    """A layer that is on the device only while it computes."""

    def __init__(self, layer: nn.Module, conveyor: OffloadRing) -> None:
        super().__init__()
        self.layer = layer
        # Not under its own name, so that the conveyor's slots are nobody's parameters.
        self._conveyor = [conveyor]
        self.asleep: dict[str, Tensor] = {
            name: tensor.detach() for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
        }

    @property
    def bytes(self) -> int:
        """Of a slot that holds it."""
        return sum(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in self.asleep.values())

    def forward(self, x: Tensor) -> Any:
        return torch.func.functional_call(self.layer, self._conveyor[0].fetch(self), (x,))


class CpuEmbedding(nn.Module):
    """A table that stays in the host's memory: only the rows of the prompt's tokens go to the device."""

    def __init__(self, table: nn.Embedding, device: torch.device) -> None:
        super().__init__()
        self.weight = table.weight
        self._device = device

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids.to(self.weight.device), self.weight).to(self._device)


def stream(module: nn.Module, layers: tuple[str, ...], conveyor: OffloadRing) -> None:
    """Let the named layers, whose weights lie in the host's memory, pass through `conveyor`."""
    for name in layers:
        streamed = OffloadedModule(module.get_submodule(name), conveyor)
        conveyor.room_for(streamed.bytes)
        module.set_submodule(name, streamed)
