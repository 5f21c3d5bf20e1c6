"""One block of host memory for all offloaded weights."""

import weakref
from typing import Any

import torch
from torch import Tensor

from engine.memory.device import host_memory, lock_pages, unlock_pages

ALIGN = 256
"""Alignment in bytes of tensors on a device, as its matrix units require."""


def aligned(size: int) -> int:
    """Return `size` rounded up to the alignment."""
    return -(-size // ALIGN) * ALIGN


class HostArena:
    """A block of host memory that tensors are cut from in order.

    torch allocates page-locked memory tensor by tensor, rounds each up to a power of two and never gives it back. This
    block has the size it needs, is locked in one call and goes with the last tensor.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._block = torch.empty(size, dtype=torch.uint8)
        self._used = 0

    @property
    def bytes(self) -> int:
        return self._block.nbytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory, from elsewhere if the block is used up."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._used + size > self._block.nbytes:
            return host_memory(shape, dtype, self._device)
        tensor = self._block[self._used : self._used + size].view(dtype).view(shape)
        self._used += aligned(size)
        return tensor

    def lock(self) -> None:
        """Lock the pages, for copies beside the computation of a GPU.

        After they were filled: locking untouched pages would have to fill them with zeros first.
        """
        if lock_pages(self._block, self._device):
            # The block is an argument so that it is unlocked before it is freed.
            weakref.finalize(self, _unlock, self._block, self._device)


def _unlock(block: Tensor, device: torch.device) -> Any:
    unlock_pages(block, device)
