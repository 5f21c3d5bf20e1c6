"""Hostile and broken model files beside good ones: the others, `models`, `doctor`, `status` and `auto` go on."""

import argparse
import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.contract import EngineConfig, EngineError, Exact, Job, Result
from engine.engine import Engine
from engine.families.klein import components
from engine.registry import ModelRegistry
from klein_mcp.cli import doctor, models
from klein_mcp.settings import Settings
from tests.engine import published

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="FIFOs and links")

SLOWEST = 30.0
"""Seconds of processor time for one command over all of them; 3 to 6 were observed, 60 before links were noticed."""


def safetensors(header: Any) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + bytes(64)


def tensor(**more: Any) -> dict[str, Any]:
    """A transformer's header with something odd in one tensor."""
    plain = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
    return {"double_stream_modulation_img.lin.weight": plain, "img_in.weight": {**plain, **more}}


def gguf(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


HEADERS: dict[str, bytes] = {
    "nested": safetensors(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "arrays": safetensors(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    "infinite": safetensors(tensor(data_offsets=[0, float("inf")])),
    "nan": safetensors(tensor(data_offsets=[float("nan"), 8])),
    "digits": safetensors(b'{"img_in.weight":{"dtype":"BF16","shape":[2],"data_offsets":[0,' + b"9" * 5000 + b"]}}"),
    "negative": safetensors(tensor(data_offsets=[-8, 8])),
    "text": safetensors(tensor(shape="2, 2")),
    "words": safetensors(tensor(shape=["two", "two"])),
    "huge": safetensors(tensor(shape=[2**62, 2**62])),
    "dtype": safetensors(tensor(dtype=["BF16"])),
    "names": safetensors({"x" * 1_000_000: {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}),
    "metadata": safetensors({"__metadata__": [1], **tensor()}),
    "length": struct.pack("<Q", 2**63) + b"{}",
    "empty": b"",
}
GGUFS: dict[str, bytes] = {
    "counts": gguf(2**63, 2**63),
    "string": gguf(1, 1, struct.pack("<Q", 2**63)),
    "array": gguf(1, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**61)),
    "strings": gguf(1, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 10**9)),
    "dimensions": gguf(1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**31)),
    "overflow": gguf(1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 2**63)),
}


def broken_folder(home: Path, good: Path, name: str, change: Callable[[Path], object]) -> None:
    change(Path(shutil.copytree(good, home / name)))


def config(part: str, **values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def pipe(name: str) -> Callable[[Path], object]:
    """Put a pipe that nobody writes to in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models in which one, klein-base-4b, is whole."""
    home = tmp_path_factory.mktemp("models")
    good = published.toy(tmp_path_factory.mktemp("good") / "klein-base-4b", distilled=False)
    shutil.copytree(good, home / "klein-base-4b")
    for name, data in HEADERS.items():
        (home / f"flux-2-klein-4b-{name}.safetensors").write_bytes(data)
    for name, data in GGUFS.items():
        (home / f"flux-2-klein-4b-{name}.gguf").write_bytes(data)
    for number, change in enumerate((
        config("transformer", num_layers=10**7), config("transformer", num_single_layers=-1),
        config("transformer", num_attention_heads=10**9), config("transformer", num_layers="five"),
        config("text_encoder", num_hidden_layers=10**9), config("text_encoder", hidden_size=10**12),
        config("vae", block_out_channels=[10**9] * 4), config("vae", layers_per_block=10**9),
        config("transformer", quantization_config=[[[]]]),
        lambda folder: (folder / "model_index.json").write_text("[" * 100_000),
        lambda folder: (folder / "model_index.json").write_text('{"_class_name": {"a": 1}}'),
        lambda folder: (folder / "klein.json").write_text('{"text_layers": [999999999], "native_size": 1e99}'),
        lambda folder: (folder / "transformer" / "config.json").write_bytes(b"\xff\xfe"),
        pipe("transformer/config.json"), pipe("text_encoder/config.json"), pipe("vae/config.json"),
        pipe("transformer/diffusion_pytorch_model.safetensors.index.json"),
        lambda folder: (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(HEADERS["nested"]),
    )):  # fmt: skip
        (home / str(number)).mkdir()
        broken_folder(home / str(number), good, "klein-4b", change)
    os.truncate(home / "flux-2-klein-4b-strings.gguf", 10**10)  # a hole, which takes no disk
    os.mkfifo(home / "klein-4b-fifo.safetensors")
    (home / "klein-4b-folder.safetensors").mkdir()
    (home / "klein-4b-loop.safetensors").symlink_to(home / "klein-4b-loop.safetensors")
    (home / "loop").symlink_to(home)
    (home / "models.json").write_text("{" * 1000)
    return home


def settings(home: Path, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "data", hub=tmp_path / "hub", models=(home, Path("/proc")), device="cpu")


def test_the_good_model_is_found_among_them(home: Path, tmp_path: Path) -> None:
    started = time.process_time()
    engine = Engine(settings(home, tmp_path).engine_config())
    assert home / "klein-base-4b" in {Path(model.path) for model in engine.models() if model.fits}
    assert all("\n" not in str(model.error) for model in engine.registry.unusable_models())
    assert time.process_time() - started < SLOWEST


def test_auto_and_the_good_model_make_images(home: Path) -> None:
    engine = Engine(EngineConfig(models=(home,), device="cpu", dtype="float32"))
    for model in ("auto", "klein-base-4b", "nano"):
        started = time.process_time()
        *_, result = engine.run(Job("x", model=model, size=Exact(64, 64), steps=1))
        assert isinstance(result, Result)
        assert time.process_time() - started < SLOWEST


def test_models_and_doctor_list_them_in_one_line_each(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (models, doctor):
        started = time.process_time()
        command.run(settings(home, tmp_path), argparse.Namespace(json=False, repair=False))
        output = capsys.readouterr().out
        assert "Traceback" not in output
        assert max(map(len, output.splitlines())) < 700
        assert "flux-2-klein-4b-nested.safetensors" in output
        assert time.process_time() - started < SLOWEST


BY_SHAPES = ("2/klein-4b", "6/klein-4b", "7/klein-4b", "8/klein-4b")
"""Folders whose odd value is not believed: the shapes of the tensors say how large the model is."""


def test_each_is_refused_in_one_line_when_it_is_named(home: Path) -> None:
    registry = ModelRegistry((home,))
    for path in (*home.glob("flux-2-klein-4b-*"), *home.glob("klein-4b-*"), *home.glob("[0-9]*/klein-4b")):
        started = time.process_time()
        refusal = refused(registry, path)
        assert refusal or str(path.relative_to(home)) in BY_SHAPES
        assert "\n" not in refusal, path
        assert len(refusal) < 700, path
        assert time.process_time() - started < SLOWEST, path


def refused(registry: ModelRegistry, path: Path) -> str:
    try:
        components.verify(registry.resolve(str(path)))
    except EngineError as error:
        return str(error)
    return ""
