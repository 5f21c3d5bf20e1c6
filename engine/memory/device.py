"""Choice of device and number format, and device-specific operations.

No other module names devices.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from engine.contract import Fix, InvalidJob
from engine.memory import host

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Number formats to compute in. fp16 is missing: the autoencoder overflows in it, and the transformer may."""
BF16_GAIN = 1.25
"""Times as fast as fp32 that a CPU must multiply bf16 to compute in it. One process shall not choose otherwise than the
next, since images differ: of twelve trials beside a training, on two cores of a Xeon, all had 0.5 to 0.6."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device to compute on and the number format to compute in.

    passed_over: why a GPU that is there was not chosen, "" without one.
    """

    device: torch.device
    dtype: torch.dtype
    passed_over: str = field(default="", compare=False)

    @classmethod
    def choose(cls, device: str | None = None, dtype: str | None = None) -> "Device":
        """Return the requested device and format, by default the best available.

        Raises InvalidJob for a device or format that this machine lacks.
        """
        name, passed_over = _device(device)
        where = torch.device(name)
        if where.type == "cuda":
            # Some of torch's functions refuse a GPU without its number.
            where = torch.device("cuda", where.index or 0)
        make_current(where)
        if dtype is not None and dtype not in DTYPES:
            raise InvalidJob(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
        return cls(where, DTYPES[dtype] if dtype else _native(where), passed_over)

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU of torch's CUDA interface.

        These are NVIDIA GPUs, and AMD GPUs through ROCm.
        """
        return self.device.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        """Whether it is the processor."""
        return self.device.type == "cpu"

    @property
    def is_nvidia(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return self.is_cuda and torch.version.hip is None

    @property
    def has_tensor_cores(self) -> bool:
        """Whether matrix products run in the device's fastest number format."""
        return self.dtype == torch.bfloat16

    @property
    def narrows(self) -> bool:
        """Whether weights stay in 16 bits and are widened for each product.

        So a machine that computes in fp32 needs no more memory than one that computes in bf16.
        """
        return self.dtype == torch.float32

    @property
    def name(self) -> str:
        """Name of the hardware, such as NVIDIA H200."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else self.device.type

    @property
    def dtype_name(self) -> str:
        """Name of the number format, such as bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def free_bytes(self) -> int:
        """Return the memory that is free on the device now."""
        if has_own_memory(self.device):
            return torch.cuda.mem_get_info(self.device)[0]
        return host.free_bytes()

    def cap(self, limit: int | None) -> None:
        """Limit this process to `limit` bytes of a GPU.

        At the limit torch frees the memory it caches, or fails.
        """
        if self.is_cuda:
            total = torch.cuda.mem_get_info(self.device)[1]
            share = 1.0 if limit is None else min(1.0, max(0.0, limit / total))
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    def sync(self) -> None:
        """Wait until the device has finished, for example to measure time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def is_lost(self) -> bool:
        """Whether a GPU fails every call of this process.

        It does after an illegal access, a reset of its driver or a suspend, until the process ends.
        """
        if not self.is_cuda:
            return False
        # An error that was only waiting to be asked for is gone with the first answer; that of a lost GPU never goes.
        return all(self._fails_to_sync() for _ in range(2))

    def _fails_to_sync(self) -> bool:
        try:
            self.sync()
        except RuntimeError as exc:
            return "out of memory" not in str(exc)
        return False

    def empty_cache(self) -> None:
        """Release the unused memory in torch's caching allocators."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            # Its name differs between versions of torch, and none is public.
            for name in ("_accelerator_emptyHostCache", "_host_emptyCache"):
                getattr(torch._C, name, lambda: None)()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def drop_workspaces(self) -> None:
        """Release what libraries keep for their next call.

        Observed: 35 MB of cuBLAS, H200. It is allocated again when it is needed.
        """
        if self.device.type == "cuda":
            getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()

    @property
    def label(self) -> str:
        """Name of the memory it computes in, for users."""
        return "GPU" if self.device.type == "cuda" else "memory"

    def idle_bytes(self) -> int:
        """Return the unused memory in torch's caching allocator."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return 0

    def host_bytes(self) -> int | None:
        """Return the host memory that is free for offloaded weights.

        None where the device computes in host memory.
        """
        return host.free_bytes() if has_own_memory(self.device) else None

    def total_bytes(self) -> int:
        """Return the total memory of the device."""
        if has_own_memory(self.device):
            return torch.cuda.mem_get_info(self.device)[1]
        return host.total_bytes()


def make_current(device: torch.device) -> None:
    """Make a GPU the current one of this thread.

    Streams and graphs belong to the current GPU, and a new thread begins with the first.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def has_own_memory(device: torch.device) -> bool:
    """Return whether the device has memory separate from the host's.

    Only then can weights be offloaded to the host.
    """
    return device.type == "cuda" and not _is_integrated(device)


@functools.cache
def _is_integrated(device: torch.device) -> bool:
    """Return whether an NVIDIA GPU computes in host memory.

    Jetson and DGX Spark do. Older versions of torch cannot tell. AMD's keep a part of the memory to themselves.
    """
    return torch.version.hip is None and bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether the device multiplies fp8.

    NVIDIA GPUs do from compute capability 8.9 on (Ada, Hopper, Blackwell).
    """
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def multiplies_fp4(device: torch.device) -> bool:
    """Return whether the device multiplies fp4.

    NVIDIA GPUs do from compute capability 10.0 on (Blackwell).
    """
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (10, 0)


def stores_fp8(device: torch.device) -> bool:
    """Return whether the device can store fp8, which Metal cannot."""
    return device.type != "mps"


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate host memory for copies to `device`.

    Pinned on CUDA, so that copies can be asynchronous.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def lock_pages(block: torch.Tensor, device: torch.device) -> bool:
    """Lock host memory for copies to `device`, and return whether it is."""
    if device.type != "cuda" or not block.nbytes:
        return False
    # Without it copies work too, only not beside computation.
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0:
        return True
    # CUDA keeps the error until somebody asks, and torch asks after the next kernel.
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
    return False


def unlock_pages(block: torch.Tensor, device: torch.device) -> None:
    """Undo `lock_pages` after all copies have arrived."""
    torch.cuda.synchronize(device)
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(block.data_ptr())


StreamEvent = torch.Event | None
"""An event in a device's work. None where calls are synchronous."""


class CopyStream:
    """Copies to a device in parallel with its computation.

    On devices without streams it copies synchronously.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def record_event(self) -> StreamEvent:
        """Record an event on the compute stream."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, after: StreamEvent) -> StreamEvent:
        """Copy asynchronously after `after` and return the completion event."""
        if self._stream is None:
            target.copy_(source)
            return None
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait_event(self, event: StreamEvent) -> None:
        """Make the compute stream wait for `event`."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    @staticmethod
    def synchronize(event: StreamEvent) -> None:
        """Block until `event` is reached."""
        if event is not None:
            event.synchronize()


def graph_pool() -> Any:
    """Return a memory pool that several graphs may share.

    They never run at the same time.
    """
    return torch.cuda.graph_pool_handle()


class DeviceGraph:
    """A function of fixed shapes, captured as a CUDA graph.

    A call copies the inputs in and the result out. pool_bytes: by which the pool grew, and which nothing else can use.
    """

    def __init__(self, function: Callable[[], torch.Tensor], buffers: Sequence[torch.Tensor], pool: Any) -> None:
        """Capture `function`, which reads `buffers`.

        Every call overwrites the buffers.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries allocate their workspaces on first use, which must not be captured.
            function()
        torch.cuda.current_stream().wait_stream(stream)
        self._buffers = tuple(buffers)
        self._function = function
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
                self._result = function()
        except Exception:
            # torch leaves the capture's stream current, and older versions its pool in use.
            torch.cuda.set_stream(before)
            _leave_capture(before.device.index, pool)
            raise
        self.pool_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - unused

    def __call__(self, inputs: Iterable[torch.Tensor]) -> torch.Tensor:
        for buffer, given in zip(self._buffers, inputs, strict=True):
            buffer.copy_(given)
        self._graph.replay()
        # The graphs share a pool: the replay of another may overwrite the result.
        return self._result.clone()


def _leave_capture(device: int, pool: Any) -> None:
    """End a failed capture's use of its pool, where torch has not.

    Until then every later `empty_cache` raises. Mended in torch by its pull request 180395 (2026).
    """
    end, release = (getattr(torch._C, name, None) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"))
    if end is not None and release is not None:
        with suppress(RuntimeError):  # it has: `end` raises, and the pool is not to be released twice
            end(device, pool)
            release(device, pool)


def _device(asked: str | None) -> tuple[str, str]:
    """Return a device, and why GPUs before it were passed over."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked is None:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if there["cuda"] else []
        passed_over: list[str] = []
        for name in (*gpus, *(["mps"] if there["mps"] else [])):
            if not (fault := _fault(name)):
                return name, "; ".join(passed_over)
            passed_over.append(fault)
        return "cpu", "; ".join(passed_over)
    kind = asked.split(":")[0]
    if not there.get(kind, False):
        raise _not_there(asked, [name for name, is_there in there.items() if is_there])
    try:
        index = torch.device(asked).index or 0
    except RuntimeError:
        raise _not_there(asked, [name for name, is_there in there.items() if is_there]) from None
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index >= count:
        raise _not_there(asked, [f"{kind}:{i}" for i in range(count)])
    if fault := _fault(asked):
        raise InvalidJob(f"device is {asked!r}; {fault}.", fix=Fix("set", "device", choices=("cpu",)))
    return asked, ""


_NO_KERNELS = ("no kernel image", "invalid device function")
"""Messages of CUDA and ROCm for a GPU that a program was not compiled for."""


def _fault(device: str) -> str:
    """Return why this torch cannot compute on a GPU, or "".

    One that is full or does not answer today counts as usable: its jobs say so, and the next process tries again.
    """
    if device.startswith("cpu"):
        return ""
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as exc:
        if any(words in str(exc) for words in _NO_KERNELS):
            return f"this torch ({torch.__version__}) has no kernels for the {torch.cuda.get_device_name(device)}"
    return ""


def _not_there(asked: str, found: list[str]) -> InvalidJob:
    fix = Fix("set", "device", choices=tuple(found))
    return InvalidJob(f"device is {asked!r}; this machine has: {', '.join(found)}.", fix=fix)


def _native(device: torch.device) -> torch.dtype:
    """Return bf16 where the hardware multiplies it faster than fp32, else fp32.

    Emulated bf16 is about a hundred times slower than fp32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "mps":
        return torch.bfloat16
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return torch.bfloat16
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if bf16 and _bf16_pays() else torch.float32


@functools.cache
def _bf16_pays() -> bool:
    """Return whether this CPU multiplies bf16 enough faster, by a trial.

    A Xeon whose AMX is hidden has bf16 instructions and multiplies by them at half the speed of fp32 (512 × 512 by
    512 × 512, one core: 3.1 ms and 1.7): nano took 150 ms an image there instead of 90.
    """
    bf16, fp32 = _product_seconds(torch.bfloat16), _product_seconds(torch.float32)
    return bf16 * BF16_GAIN < fp32


def _product_seconds(dtype: torch.dtype, size: int = 512, rounds: int = 5) -> float:
    """Return the shortest time of a square matrix product.

    Five take 9 ms in fp32 on one core of a Xeon.
    """
    left, right = torch.ones(2, size, size, dtype=dtype).unbind()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        F.linear(left, right)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
