"""Load, compare and paint what `formats` writes."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.checkpoints.quant import QuantLinear, decode_layer
from engine.contract import BadWeights, EngineConfig, EngineError, Exact, Job, Result, Rgb8
from engine.engine import Engine
from engine.families.klein import components
from engine.memory.device import Device
from engine.registry import ModelRegistry
from tests.engine import published
from tests.files.formats import Case, Tensors, Toy, cases

CPU = Device(torch.device("cpu"), torch.float32)
WEIGHTS_OFF = 2e-6
"""Relative; observed: 0 for all but ConvRot, whose rotation is summed in another order, 3e-7."""
IMAGE_OFF = 0.6
"""Mean of 255 levels; observed: 0 where layers are widened, up to 0.2 where fp8 and nvfp4 scale their outputs."""


@dataclass(frozen=True)
class Outcome:
    """The result of a case. weights, image: how far off, from what the file means."""

    case: Case
    ok: bool
    label: str = ""
    weights: float = 0.0
    image: float = 0.0
    note: str = ""


def prepare_home(folder: Path) -> tuple[Toy, Path]:
    """A toy, and a ComfyUI folder with its companions."""
    toy = Toy.make(folder / "toy")
    home = folder / "models"
    published.write(toy.autoencoder, home / "vae" / "flux2-vae.safetensors")
    published.write(toy.encoder, home / "text_encoders" / "qwen_3_4b.safetensors")
    shutil.copytree(toy.folder / "tokenizer", home / "diffusion_models" / "tokenizer")
    return toy, home


def check_all(folder: Path, word: str = "") -> Iterator[Outcome]:
    """Check every format whose name matches `word`."""
    toy, home = prepare_home(folder)
    for case in cases(toy, home):
        if not re.search(word, case.name, re.IGNORECASE):
            continue
        try:
            yield check_refused(case) if case.refused else check(case, toy, folder / "reference")
        except EngineError as error:
            yield Outcome(case, False, note=str(error))


def check_refused(case: Case) -> Outcome:
    """Resolve and verify it, which must end in the right line."""
    try:
        components.verify(ModelRegistry().resolve(str(case.file)))
    except BadWeights as error:
        return Outcome(case, case.refused in str(error) and "\n" not in str(error), note=str(error))
    return Outcome(case, False, note="was taken")


def check(case: Case, toy: Toy, work: Path) -> Outcome:
    """Load it, compare its weights with what it means, and its image with that of a file that says so in fp32."""
    models = {model.path: model for model in ModelRegistry((case.file.parents[1],)).installed_models()}
    label = models[case.file].format if case.file in models else "not found"
    checkpoint = ModelRegistry((case.file.parents[1],)).resolve(str(case.file))
    part = components.transformer(checkpoint.transformer)
    list(part.load(CPU))
    off = weights_off(part.module, case.meant)
    if case.encoder:
        encoder = components.text_encoder(checkpoint.text_encoder, checkpoint.variant.text_layers)
        list(encoder.load(CPU))
        kept = {name: tensor for name, tensor in case.encoder.items() if name in encoder.key_map}
        off = max(off, weights_off(encoder.module, kept))
    image, reference = paint(case.file), reference_image(case, toy, work)
    image_off = float(np.abs(image.astype(float) - reference.astype(float)).mean())
    ok = label.startswith(case.label) and off <= WEIGHTS_OFF and image_off <= IMAGE_OFF and image.std() > 5
    return Outcome(case, ok, label, off, image_off)


_references: dict[tuple[float, ...], Rgb8] = {}


def reference_image(case: Case, toy: Toy, work: Path) -> Rgb8:
    """The image of the same weights in fp32, computed once for files that mean the same."""
    key = tuple(float(tensor.double().sum()) for tensor in (*case.meant.values(), *case.encoder.values()))
    if key not in _references:
        _references[key] = paint(as_float(case, toy, work))
    return _references[key]


def weights_off(module: nn.Module, meant: Tensors) -> float:
    """The largest relative difference of a parameter."""
    worst = 0.0
    for name, want in meant.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        got = decode_layer(owner, torch.float32) if isinstance(owner, QuantLinear) else module.get_parameter(name)
        worst = max(worst, float((got - want).norm() / want.norm().clamp_min(1e-12)))
    return worst


def as_float(case: Case, toy: Toy, work: Path) -> Path:
    """The same model with its weights written out in fp32."""
    shutil.rmtree(work, ignore_errors=True)
    encoder = toy.encoder | case.encoder
    published.write(toy.autoencoder, work / "vae" / "flux2-vae.safetensors")
    published.write(encoder, work / "text_encoders" / "qwen_3_4b.safetensors")
    shutil.copytree(toy.folder / "tokenizer", work / "diffusion_models" / "tokenizer")
    return published.write(case.meant, work / "diffusion_models" / "flux-2-klein-4b.safetensors")


def paint(file: Path) -> Rgb8:
    """A small edit-free image."""
    config = EngineConfig(models=(file.parents[1],), device="cpu", dtype="float32", cache_bytes=0)
    job = Job("a lighthouse of brass", seed=5, size=Exact(64, 64), steps=2, model=str(file))
    *_, result = Engine(config).run(job)
    assert isinstance(result, Result)
    return result.image


def check_models(home: Path, expected: list[Case]) -> Iterator[tuple[str, bool]]:
    """Check the lines of `models` over all files at once."""
    engine = Engine(EngineConfig(models=(home,), device="cpu", dtype="float32"))
    installed = {Path(model.path): model for model in engine.models()}
    unusable = {model.path: str(model.error) for model in engine.registry.unusable_models()}
    for case in expected:
        file = case.file
        if case.refused:
            reason = unusable.get(file, installed[file].error if file in installed else "nothing")
            yield f"{file.name}: {reason}", case.refused in reason
        else:
            model = installed.get(file)
            ok = model is not None and model.fits and model.format.startswith(case.label) and model.name == "klein-4b"
            yield f"{file.name}: {model.format}, {model.placement}" if model else f"{file.name}: not found", ok
