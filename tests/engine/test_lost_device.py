"""Tests of a GPU that fails every call, as one does after an illegal access or a suspend."""

import pytest
import torch

from engine.contract import DeviceLost, EngineConfig, Job
from engine.engine import Engine
from engine.memory.device import Device

CAT = Job("a cat", model="nano", seed=3)
ILLEGAL = "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in …"


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine(EngineConfig(device="cpu"))
    list(engine.run(CAT))
    return engine


def fail(*anything: object, **more: object) -> None:
    raise RuntimeError(ILLEGAL)


def test_error_of_a_lost_device_is_one_of_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine._klein is not None
    monkeypatch.setattr(engine._klein.autoencoder, "decode", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(engine.run(CAT))
    monkeypatch.setattr(Device, "is_lost", lambda self: True)
    with pytest.raises(DeviceLost) as error:
        list(engine.run(CAT))
    assert str(error.value) == (
        "The memory no longer answers this process: CUDA error: an illegal memory access was encountered. "
        "Try again: a new process may reach it."
    )
    monkeypatch.setattr(engine._klein, "prefetch", fail)
    monkeypatch.setattr(engine, "_latest", object())
    with pytest.raises(DeviceLost):
        engine.prefetch()


@pytest.mark.parametrize(
    ("answers", "lost"),
    [((), False), ((ILLEGAL,), False), ((ILLEGAL, ILLEGAL), True), (("CUDA error: out of memory",) * 2, False)],
    ids=["answers", "had an error waiting", "fails for ever", "is full"],
)
def test_gpu_is_lost_once_it_fails_whenever_it_is_asked(
    answers: tuple[str, ...], lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter(answers)

    def synchronize(device: torch.device) -> None:
        if error := next(errors, None):
            raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert Device(torch.device("cuda", 0), torch.bfloat16).is_lost() == lost


def test_status_of_a_lost_device_is_answered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "free_bytes", fail)
    status = engine.status()
    assert status.free_bytes == 0
    assert status.loaded == "nano"
