"""Which device and number format to paint with: the one place that names them."""

from dataclasses import dataclass

import torch

from engine.contract import InvalidJob

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""fp16 is not among them: the autoencoder overflows in it, and the transformer may."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights lie and in which format."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, device: str | None = None, dtype: str | None = None) -> "Placement":
        """The best this machine has, unless told. Raises InvalidJob for what it has not."""
        where = torch.device(_device(device))
        if dtype is not None and dtype not in DTYPES:
            raise InvalidJob(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
        return cls(where, DTYPES[dtype] if dtype else _native(where))

    def free_bytes(self) -> int:
        """Memory free on the device now."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return _free_host_bytes()

    def sync(self) -> None:
        """Wait for the device, so that a wall clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def empty_cache(self) -> None:
        """Hand memory that torch keeps for later back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()


def _device(asked: str | None) -> str:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked is None:
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    kind = asked.split(":")[0]
    if not there.get(kind, False):
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise InvalidJob(f"device is {asked!r}; this machine has: {found}.")
    return asked


def _native(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it; elsewhere it is emulated, about a hundred times slower than fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "mps":
        return torch.bfloat16
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if amx or bf16 else torch.float32


def _free_host_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
