"""Plan, load time and peak memory of a 4B at its true size: `python -m tests.files --true-size`.

The files are sparse: every name, format and shape of the published ones, all weights zero, no room on the disk. So the
seconds are those of reading from memory, converting and checking, without a disk.
"""

import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from engine.checkpoints.files.gguf import TYPES
from engine.contract import EngineConfig
from engine.engine import Engine
from engine.families.klein import components
from engine.families.klein.transformer import Transformer
from engine.memory.device import Device
from engine.nn.autoencoder import Autoencoder, AutoencoderShape
from tests.engine.test_official import SHAPES, sparse, tensors
from tests.files.formats import mixed

FORMATS = {
    "bf16": "flux-2-klein-4b.safetensors",
    "fp8": "flux-2-klein-4b-fp8.safetensors",
    "Q4_K_M": "flux-2-klein-4b-Q4_K_M.gguf",
}
SHAPE = SHAPES[3072]


def sparse_gguf(file: Path) -> Path:
    """Write a sparse GGUF with the types of a Q4_K_M."""
    with torch.device("meta"):
        parameters = dict(Transformer(SHAPE).named_parameters())
    infos, offset = b"", 0
    numbers = {name: (number, weights, size) for number, (name, weights, size) in TYPES.items()}
    for name, parameter in parameters.items():
        number, weights, size = numbers[mixed(name, parameter)]
        sides = tuple(reversed(parameter.shape))
        infos += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(sides))
        infos += struct.pack(f"<{len(sides)}QIQ", *sides, number, offset)
        offset += -(-parameter.numel() // weights * size // 32) * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(parameters), 0) + infos
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(-(-len(header) // 32) * 32 + offset)
    return file


def write(home: Path) -> None:
    """Write a ComfyUI folder of a 4B in three formats, with its companions."""
    for part in ("diffusion_models", "text_encoders", "vae", "tokenizer"):
        (home / part).mkdir(parents=True)
    for kind in ("bf16", "fp8"):
        sparse(home / "diffusion_models" / FORMATS[kind], *tensors(SHAPE, kind))
    sparse_gguf(home / "diffusion_models" / FORMATS["Q4_K_M"])
    with torch.device("meta"):
        config = Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936,
        )  # fmt: skip
        encoder, autoencoder = Qwen3ForCausalLM(config).state_dict(), Autoencoder(AutoencoderShape()).state_dict()
    found = [(name, "BF16", tuple(tensor.shape)) for name, tensor in encoder.items() if "lm_head" not in name]
    sparse(home / "text_encoders" / "qwen_3_4b.safetensors", found)
    sparse(home / "vae" / "flux2-vae.safetensors", [(n, "F32", tuple(t.shape)) for n, t in autoencoder.items()])


def load(file: Path) -> dict[str, Any]:
    """Load a transformer in this process: seconds, and bytes of weights and at the peak."""
    before = _peak()
    started = time.perf_counter()
    part = components.transformer(file)
    read = sum(part.load(Device(torch.device("cpu"), torch.bfloat16)))
    weights = sum(tensor.nbytes for tensor in (*part.module.parameters(), *part.module.buffers()))
    return {"seconds": time.perf_counter() - started, "read": read, "weights": weights, "peak": _peak() - before}


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def main() -> int:
    """Print a row per format."""
    print(f"{'format':8} {'file, GB':>8} {'in memory':>9} {'peak':>6} {'load, s':>8}  plan")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "models"
        write(home)
        engine = Engine(EngineConfig(models=(home,), device="cpu"))
        plans = {Path(model.path).name: model for model in engine.models()}
        for kind, name in FORMATS.items():
            file = home / "diffusion_models" / name
            command = [sys.executable, "-m", "tests.files.true_size", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found, model = json.loads(done.stdout), plans[name]
            print(
                f"{kind:8} {file.stat().st_size / 1e9:8.2f} {found['weights'] / 1e9:9.2f} {found['peak'] / 1e9:6.2f} "
                f"{found['seconds']:8.1f}  {model.placement or model.error}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    print(json.dumps(load(Path(sys.argv[1]))))
