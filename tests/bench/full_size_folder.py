"""Load a full-size model folder within a memory limit.

    python -m tests.bench.full_size_folder FOLDER GIGABYTES [--quant fp8] [--tune]

Prints one line of JSON: seconds to load and to make images, memory of the whole card, a hash of the image.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from engine.contract import EngineConfig, Exact, Job, Result
from engine.engine import Engine
from engine.families.klein.variants import Variant

_COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
_NANO = Path(__file__).parents[2] / "engine" / "nano" / "weights"


def write(pipe: Any, folder: Path, variant: Variant) -> None:
    """Write diffusers' pipeline as a model folder, with the embedded model's tokenizer."""
    for name in ("transformer", "vae", "scheduler"):
        getattr(pipe, name).save_pretrained(folder / name)
    pipe.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="5GB")
    shutil.copytree(_NANO / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    index = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.42.1", "is_distilled": True, **_COMPONENTS}
    (folder / "model_index.json").write_text(json.dumps(index))
    extras = {"text_length": variant.text_length, "text_layers": variant.text_layers}
    (folder / "klein.json").write_text(json.dumps(extras))


def card_gigabytes() -> float:
    """Return the used memory of the whole card, as nvidia-smi shows it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    shown = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return round(int(shown[0]) * 2**20 / 1e9, 2) if shown else 0.0


def measure(folder: Path, gigabytes: float, quant: str | None, side: int) -> dict[str, Any]:
    """Load, generate three images, cancel one, and release.

    Returns the time and memory of each step.
    """
    import torch

    gpu = torch.cuda.is_available()
    before = card_gigabytes() if gpu else 0.0
    engine = Engine(EngineConfig(quant=quant, memory_limit=round(gigabytes * 1e9) or None, compile="off"))
    found: dict[str, Any] = {"card before, GB": before}
    images = []
    for number in range(3):
        start, loaded = time.perf_counter(), 0.0
        result = None
        for event in engine.run(
            Job(f"prompt {number % 2}", size=Exact(side, side), seed=number % 2, model=str(folder))
        ):
            result = event if isinstance(event, Result) else None
        assert isinstance(result, Result)
        loaded = result.ms["load"] / 1000
        images.append(round(time.perf_counter() - start - loaded, 2))
        found["load, s"] = max(round(loaded, 1), found.get("load, s", 0.0))
        found.setdefault("hash", hashlib.sha256(result.image.tobytes()).hexdigest()[:12])
    status = engine.status()
    found |= {"images, s": images, "plan": status.placement, "weights, GB": round(status.weights_bytes / 1e9, 2)}
    if gpu:
        found |= {
            "allocated at the peak, GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "reserved at the peak, GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
            "card, GB": round(card_gigabytes() - before, 2),
        }
        held = torch.cuda.memory_allocated()
        job = engine.run(Job("prompt 0", size=Exact(side, side), model=str(folder)))
        next(iter(job))
        job.close()  # type: ignore[attr-defined] - a generator
        found["left by a cancel, MB"] = round((torch.cuda.memory_allocated() - held) / 1e6, 1)
    engine.release()
    found["left after release, MB"] = round(torch.cuda.memory_allocated() / 1e6, 1) if gpu else 0.0
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.full_size_folder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("gigabytes", type=float, help="0: all that is free")
    parser.add_argument("--quant", choices=("fp8", "nvfp4"))
    parser.add_argument("--toy", action="store_true")
    asked = parser.parse_args()
    print(json.dumps(measure(asked.folder, asked.gigabytes, asked.quant, 64 if asked.toy else 1024)), flush=True)
