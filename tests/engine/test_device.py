"""Tests of the memory that a machine or its container has, and of captures that fail."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from engine.contract import InvalidJob
from engine.families.klein.compiler import CompileOptions, obstacle
from engine.families.klein.footprint import memory_info
from engine.memory import device as device_module
from engine.memory import host
from engine.memory.device import BF16_GAIN, Device, DeviceGraph

GB = 1 << 30


def group(folder: Path, limit: str, used: int, cached: int, *, version: int) -> None:
    """Write what Linux says of a control group."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n")
    total = "" if version == 2 else "total_"
    # What was read twice is active, and as free to go.
    half = cached // 2
    (folder / "memory.stat").write_text(f"anon 17\n{total}inactive_file {half}\n{total}active_file {cached - half}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of control groups beside a machine with 64 GB, of which 32 are free."""
    monkeypatch.setattr(host, "GROUPS", tmp_path)
    monkeypatch.setattr(host, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=32 * GB))
    return tmp_path


def test_machine_without_control_groups_has_its_own_memory(groups: Path) -> None:
    assert (host.total_bytes(), host.free_bytes()) == (64 * GB, 32 * GB)


@pytest.mark.parametrize(
    ("version", "line", "folder"),
    [
        (2, "0::/", "."),
        (2, "0::/docker/1f/init", "docker/1f"),
        (1, "4:cpu,cpuacct:/\n3:memory:/docker/1f", "memory/docker/1f"),
        (1, "3:memory:/outside/of/this/container\n0::/", "memory"),
    ],
    ids=["version 2", "version 2, a group below", "version 1", "version 1 in its container"],
)
def test_memory_is_that_of_the_container(version: int, line: str, folder: str, groups: Path) -> None:
    (groups / "cgroup").write_text(f"{line}\n")
    group(groups / folder, str(8 * GB), 6 * GB, 1 * GB, version=version)
    assert (host.total_bytes(), host.free_bytes()) == (8 * GB, 3 * GB), "files that were read go where memory is wanted"
    group(groups / folder, str(8 * GB), 9 * GB, 0, version=version)
    assert host.free_bytes() == 0


def test_container_without_a_limit_has_the_memory_of_the_machine(groups: Path) -> None:
    (groups / "cgroup").write_text("4:memory:/\n0::/user.slice\n")
    group(groups / "user.slice", "max", 6 * GB, 0, version=2)
    group(groups / "memory", "9223372036854771712", 6 * GB, 0, version=1)
    assert (host.total_bytes(), host.free_bytes()) == (64 * GB, 32 * GB)


def test_tightest_group_counts(groups: Path) -> None:
    (groups / "cgroup").write_text("0::/pod/container\n")
    group(groups / "pod", str(10 * GB), 9 * GB, 0, version=2)
    group(groups / "pod/container", str(8 * GB), 1 * GB, 0, version=2)
    assert (host.total_bytes(), host.free_bytes()) == (8 * GB, 1 * GB)


def test_this_machine_has_memory() -> None:
    device = Device.choose("cpu")
    assert 0 < device.free_bytes() <= device.total_bytes() <= psutil.virtual_memory().total
    assert device.host_bytes() is None


@pytest.mark.parametrize(
    ("instructions", "fp32", "bf16", "chosen"),
    [
        ((), 1.0, 0.1, "float32"),
        (("avx512_bf16",), 1.0, 1.8, "float32"),
        (("avx512_bf16",), 1.0, 0.99 / BF16_GAIN, "bfloat16"),
        (("avx512_bf16",), 1.0, 1.01 / BF16_GAIN, "float32"),
        (("avx512_bf16", "amx_tile"), 1.0, 1.8, "bfloat16"),
    ],
    ids=["no instructions", "slow ones", "fast ones", "hardly faster ones", "matrix instructions"],
)
def test_cpu_computes_in_the_format_it_multiplies_faster(
    instructions: tuple[str, ...], fp32: float, bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions, raising=False)
    seconds = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(device_module, "_product_seconds", seconds.__getitem__)
    device_module._bf16_pays.cache_clear()
    try:
        assert Device.choose("cpu").dtype_name == chosen
        assert Device.choose("cpu", "bfloat16").dtype_name == "bfloat16", "what was asked for is never tried"
    finally:
        device_module._bf16_pays.cache_clear()


def test_trial_product_takes_time() -> None:
    assert 0 < device_module._product_seconds(torch.bfloat16, 64, 2) < 10


@pytest.mark.parametrize(
    ("properties", "hip", "integrated"),
    [({"is_integrated": 1}, None, True), ({"is_integrated": 0}, None, False), ({}, None, False),
     ({"is_integrated": 1}, "6.4", False)],
    ids=["DGX Spark", "a card", "older torch", "AMD"],
)  # fmt: skip
def test_memory_of_an_integrated_gpu_is_the_hosts(
    properties: dict[str, int], hip: str | None, integrated: bool, groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had counted twice: as the device's, and as the host's for layers that stream."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 8 * GB))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(Device, "idle_bytes", lambda self: 0)
    device_module._is_integrated.cache_clear()
    try:
        memory = memory_info(Device(torch.device("cuda", 0), torch.bfloat16))
    finally:
        device_module._is_integrated.cache_clear()
    wanted = (32 * GB, 64 * GB, None) if integrated else (5 * GB, 8 * GB, 32 * GB)
    assert (memory.free, memory.total, memory.host) == wanted
    assert memory.is_gpu, "with a context and workspaces"


OLD = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be …"


def gpus(monkeypatch: pytest.MonkeyPatch, *errors: str) -> None:
    """Let this machine have GPUs, each of which answers or raises an error."""

    def ones(count: int, device: str) -> Tensor:
        if error := errors[torch.device(device).index or 0]:
            raise RuntimeError(error)
        return torch.zeros(count)

    for name, answer in {"is_available": True, "device_count": len(errors), "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer, **_: answer)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    monkeypatch.setattr(torch, "ones", ones)


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [(("",), "cuda:0"), ((OLD,), "cpu"), ((OLD, ""), "cuda:1"), (("CUDA error: out of memory",), "cuda:0")],
    ids=["works", "too old", "the second works", "full"],
)
def test_gpu_without_kernels_is_passed_over(
    errors: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, *errors)
    device = Device.choose(None, "float32")
    assert str(device.device) == chosen
    reason = f"this torch ({torch.__version__}) has no kernels for the NVIDIA GeForce GTX 1080"
    assert device.passed_over == (reason if OLD in errors else "")
    if chosen == "cpu":
        assert obstacle(device, CompileOptions(enabled=True)) == reason


def test_gpu_without_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, OLD, "")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(InvalidJob, match=rf"device is '{name}'; this torch \(.*\) has no kernels for the NVIDIA"):
            Device.choose(name)
    assert str(Device.choose("cuda:1").device) == "cuda:1"


@pytest.mark.parametrize("ended", [False, True], ids=["older torch", "newer torch"])
def test_failed_capture_gives_stream_and_pool_back(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's part is a stand-in, since no CPU captures."""
    calls: list[object] = []

    def end(device: int, pool: object) -> None:
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        calls.append(("end", device, pool))

    stream = SimpleNamespace(device=torch.device("cuda", 1), wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext, "CUDAGraph": object,
        "graph": lambda *_, **__: nullcontext(), "memory_reserved": int, "memory_allocated": int,
        "set_stream": calls.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda device, pool: calls.append(("release", device, pool)), raising=False
    )
    ran: list[int] = []
    pool = (0, 7)

    def function() -> Tensor:
        ran.append(1)
        if len(ran) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(1)

    with pytest.raises(torch.OutOfMemoryError):
        DeviceGraph(function, (), pool)
    assert calls == [stream, *([] if ended else [("end", 1, pool), ("release", 1, pool)])]
