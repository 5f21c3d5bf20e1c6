"""Tests that loading reads only the tensors it needs.

Tensors go straight to their final place. A file that is no klein model gives a one-line error.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.files import read_header
from engine.checkpoints.tensors import Tensors
from engine.contract import BadWeights, EngineConfig, EngineError, Exact, Job, Result
from engine.engine import Engine
from engine.families.klein import components
from engine.families.klein.components import QuantPolicy
from engine.families.klein.loader import LoadOptions
from engine.families.klein.lora import Lora
from engine.families.klein.pipeline import Klein
from engine.families.klein.signatures import component
from engine.memory.device import Device
from engine.registry import NANO, ModelRegistry
from tests.engine import published
from tests.engine.loras import bfl_fused, write
from tests.engine.test_offload import last

CPU = Device(torch.device("cpu"), torch.float32)
LAYERS = (9, 18, 27)


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """Count the bytes this process reads from files, as the operating system reports them."""

    def so_far() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]

    read, start = [0], so_far()
    yield read
    read[0] = so_far() - start


linux = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts the bytes a process reads")


@linux
def test_only_the_text_encoder_layers_in_use_are_loaded(folder: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder"))
    file = home / "model.safetensors"
    # As in the 8B, where the language model's head is a separate matrix.
    whole = load_file(file)
    published.write(whole | {"lm_head.weight": whole["model.embed_tokens.weight"] + 1}, file)
    part = components.text_encoder(home, LAYERS)
    entries = read_header(file).entries
    wanted = {name: entry.bytes for name, entry in entries.items() if name.startswith("model.embed_tokens")}
    wanted |= {
        n: e.bytes for n, e in entries.items() if (m := re.match(r"model\.layers\.(\d+)\.", n)) and int(m[1]) < 27
    }
    with bytes_read() as read:
        reported = sum(part.load(CPU))
    assert reported == sum(wanted.values()) == part.bytes
    assert reported <= read[0] < reported + 20_000
    # The toy has 29 layers, two above the cut. The real encoder has 36, nine above the cut.
    assert file.stat().st_size - reported > 2 * sum(
        e.bytes for n, e in entries.items() if n.startswith("model.layers.28.")
    )


@linux
def test_every_byte_of_a_transformer_is_read_once(folder: Path, bfl: dict[str, Tensor], tmp_path: Path) -> None:
    eight = published.write(published.quantised(bfl, "fp8")[0], tmp_path / "fp8.safetensors")
    for path, wanted in ((folder / "transformer", None), (folder / "transformer", "fp8"), (eight, None)):
        part = components.transformer(path, QuantPolicy(wanted))
        with bytes_read() as read:
            reported = sum(part.load(CPU))
        assert reported == part.bytes <= read[0] < reported + 20_000


def test_shards_above_the_cut_may_be_missing(folder: Path, tmp_path: Path) -> None:
    """Check that shards `pull` skips may be missing, but no shard below the cut."""
    home = tmp_path / "text_encoder"
    home.mkdir()
    shutil.copy(folder / "text_encoder" / "config.json", home)
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    shards: dict[str, dict[str, Tensor]] = {"a": {}, "b": {}, "c": {}}
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        above = (layer and int(layer[1]) >= 27) or name.startswith(("model.norm", "lm_head"))
        shards["c" if above else "b" if layer and int(layer[1]) > 12 else "a"][name] = tensor
    for shard, there in shards.items():
        save_file(there, home / f"model-{shard}.safetensors")
    names = {name: f"model-{shard}.safetensors" for shard, there in shards.items() for name in there}
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (home / "model-c.safetensors").unlink()
    part = components.text_encoder(home, LAYERS)
    list(part.load(CPU))
    assert not any(parameter.is_meta for parameter in part.module.parameters())
    (home / "model-b.safetensors").unlink()
    with pytest.raises(BadWeights, match=r"text encoder lacks the file model-b\.safetensors, which its index names"):
        list(components.text_encoder(home, LAYERS).load(CPU))


@pytest.mark.parametrize("prefix", ["", "text_encoders.qwen3_4b.transformer."])
@pytest.mark.parametrize("bare", [False, True])
def test_encoder_in_a_single_file_needs_no_config(prefix: str, bare: bool, folder: Path, tmp_path: Path) -> None:
    whole = load_file(folder / "text_encoder" / "model.safetensors")
    tensors = {prefix + (name.removeprefix("model.") if bare else name): tensor for name, tensor in whole.items()}
    file = published.write(tensors, tmp_path / "qwen_3_4b.safetensors")
    assert component(read_header(file)) == "text encoder"
    one, other = (components.text_encoder(path, LAYERS) for path in (folder / "text_encoder", file))
    for part in (one, other):
        list(part.load(CPU))
        part.module.finish(torch.device("cpu"))
    ids, mask = torch.randint(0, 100, (1, 24)), torch.ones(1, 24, dtype=torch.long)
    # The toy's rotary base is Qwen3Config's default. Every published Qwen3 uses a million.
    assert one.module.config.num_attention_heads == other.module.config.num_attention_heads
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.module(ids, mask).shape == one.module(ids, mask).shape


def test_a_quantised_encoder_is_read_layer_by_layer(folder: Path, tmp_path: Path) -> None:
    """Check ComfyUI's mixed encoders.

    They use transformers' names, and a marker tells which layers are fp8.
    """
    whole = load_file(folder / "text_encoder" / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if name.endswith("up_proj.weight"):
            layer = name.removesuffix(".weight")
            codes = published.fp8(tensor)
            tensors |= {f"{layer}.weight": codes["weight"], f"{layer}.weight_scale": codes["weight_scale"]}
            marker = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
        else:
            tensors[name] = tensor
    part = components.text_encoder(published.write(tensors, tmp_path / "mixed.safetensors"), LAYERS)
    list(part.load(CPU))
    layers = [layer for name, layer in part.module.named_modules() if name.endswith("up_proj")]
    assert len(layers) == 27
    for i, layer in enumerate(layers):
        meant = layer(torch.eye(32)).T
        want = whole[f"model.layers.{i}.mlp.up_proj.weight"]
        assert float((meant - want).norm() / want.norm()) < 0.04


def test_fp32_autoencoder_is_converted_to_the_compute_dtype(folder: Path, tmp_path: Path) -> None:
    file = published.write(published.bfl_autoencoder(folder), tmp_path / "flux2-vae.safetensors")
    assert component(read_header(file)) == "autoencoder"
    part = components.autoencoder(file)
    list(part.load(Device(torch.device("cpu"), torch.bfloat16)))
    assert {tensor.dtype for tensor in part.module.state_dict().values()} == {torch.bfloat16}


def test_small_decoder_is_recognised_by_its_shapes(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLFlux2

    from tests import toys

    narrow = AutoencoderKLFlux2(**toys.AUTOENCODER, decoder_block_out_channels=(32, 32, 32, 32))
    narrow.save_pretrained(tmp_path / "small" / "vae")
    part = components.autoencoder(tmp_path / "small" / "vae")
    list(part.load(CPU))
    assert part.module.shape.encoder == (32, 32, 64, 64)
    assert part.module.shape.decoder == (32, 32, 32, 32)
    latent = torch.randn(1, 128, 2, 2)
    single = published.write(published.bfl_autoencoder(tmp_path / "small"), tmp_path / "small.safetensors")
    again = components.autoencoder(single)
    list(again.load(CPU))
    assert torch.equal(part.module.decode(latent), again.module.decode(latent))


def test_weights_are_the_files_values_rounded_to_each_dtype(folder: Path, bfl: dict[str, Tensor]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        part = components.transformer(folder / "transformer")
        list(part.load(Device(torch.device("cpu"), dtype)))
        for name, tensor in part.module.state_dict().items():
            assert torch.equal(tensor, bfl[name].to(dtype)), name


def test_a_lora_and_a_format_change_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    """Check that other weights never reuse cached states.

    The fingerprint is part of the cache key.
    """
    file = write(bfl_fused(), tmp_path / "style.safetensors")
    checkpoint = ModelRegistry().resolve(str(folder))
    options = (
        LoadOptions(),
        LoadOptions("fp8"),
        LoadOptions(loras=(Lora(file),)),
        LoadOptions(loras=(Lora(file, 0.5),)),
    )
    prints = {last(Klein.load(checkpoint, CPU, None, option)).fingerprint for option in options}
    assert len(prints) == len(options)
    assert last(Klein.load(checkpoint, CPU)).fingerprint in prints


def test_quantised_model_generates_nearly_the_same_image(folder: Path) -> None:
    job = Job("a lighthouse of brass", seed=5, size=Exact(64, 64), steps=2)
    pictures = []
    for quant in (None, "fp8"):
        klein = last(Klein.load(ModelRegistry().resolve(str(folder)), CPU, None, LoadOptions(quant)))
        *_, painting = klein.run(job)
        assert isinstance(painting, Result)
        pictures.append(painting.image.astype(float))
    difference = abs(pictures[0] - pictures[1]).mean()
    assert 0 < difference < 25, "fp8 is another rounding, not another image"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's units")
def test_there_is_never_a_second_copy_of_the_weights(tmp_path: Path) -> None:
    """Check the peak memory of a process that loads 300 MB of bf16.

    It loads them as bf16 and as fp32. The peak is measured above the memory in use before loading.
    """
    width = 1024
    tensors = {f"{i}.weight": torch.ones(width * 8, width, dtype=torch.bfloat16) for i in range(18)}
    file = published.write(tensors, tmp_path / "big.safetensors")
    size = file.stat().st_size
    script = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from engine.memory.device import Device
from engine.checkpoints.key_map import identity_map
from engine.checkpoints.loading import load_into
from engine.checkpoints.tensors import Tensors
with torch.device("meta"):
    net = nn.Sequential(*(nn.Linear(1024, 8192, bias=False) for _ in range(18)))
tensors = Tensors.open([Path(sys.argv[1])])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
device = Device(torch.device("cpu"), getattr(torch, sys.argv[2]))
list(load_into(net, tensors, identity_map(tensors.shapes), device, what="x"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    for dtype, times in (("bfloat16", 1), ("float32", 2)):
        done = subprocess.run(
            [sys.executable, "-c", script, str(file), dtype], capture_output=True, text=True, check=True
        )
        assert int(done.stdout) < times * size + (40 << 20), dtype


# Files given by mistake -> the error for each.


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-1])
    return file


def header_of_nonsense(file: Path) -> Path:
    file.write_bytes(struct.pack("<Q", 20) + b"x" * 20 + b"\0" * 100)
    return file


def endless_header(file: Path) -> Path:
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return file


def overlapping(file: Path) -> Path:
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]} for name, begin in (("a", 0), ("b", 4))
    }
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)
    return file


def starting(start: bytes) -> Callable[[Path], Path]:
    def make(file: Path) -> Path:
        file.write_bytes(start + b"\0" * 1000)
        return file

    return make


def holding(*names: str) -> Callable[[Path], Path]:
    def make(file: Path) -> Path:
        save_file({name: torch.zeros(4, 4) for name in names}, file)
        return file

    return make


def not_klein(transformer: dict[str, Tensor]) -> dict[str, tuple[Callable[[Path], Path], str]]:
    def whole(file: Path) -> Path:
        return published.write(transformer, file)

    return {
        "cut short": (lambda file: cut(whole(file)), r"is not a whole safetensors file: .* bytes are named"),
        "nonsense": (header_of_nonsense, r"is not a whole safetensors file: its header makes no sense"),
        "endless header": (endless_header, r"is not a whole safetensors file: its header is cut short or invalid"),
        "empty": (lambda file: (file.write_bytes(b""), file)[1], r"\(0 bytes\) is not a whole safetensors file"),
        "overlapping": (overlapping, r"b does not lie where its header says"),
        "GGUF": (starting(b"GGUF"), r"is not a whole GGUF file: its version is 0"),
        "pickle": (starting(b"PK\x03\x04"), r"is a pickle, which could run code; only safetensors and GGUF are read"),
        "old pickle": (starting(b"\x80\x02"), r"is a pickle"),
        "git-lfs": (starting(b"version https://git-lfs"), r"is a pointer of git-lfs"),
        "LoRA": (
            holding("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
            r"is a LoRA, which changes a model but is not one, not a klein",
        ),
        "SDXL": (
            holding("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"),
            r"is an SDXL or SD checkpoint, not a klein",
        ),
        "FLUX.1": (holding("double_blocks.0.img_mod.lin.weight"), r"is a FLUX\.1 model, not a klein"),
        "autoencoder": (
            holding("decoder.post_quant_conv.weight", "bn.running_mean"),
            r"is an autoencoder, not a klein",
        ),
        "text encoder": (holding("model.layers.0.self_attn.q_norm.weight"), r"is a text encoder, not a klein"),
        "unknown": (holding("something.weight"), r"is not a FLUX\.2 \[klein\] transformer: it has no img_in\.weight"),
    }


@pytest.mark.parametrize("what", not_klein({}))
def test_file_that_is_no_klein_gives_a_one_line_error(
    what: str, bfl: dict[str, Tensor], folder: Path, tmp_path: Path
) -> None:
    make, says = not_klein(bfl)[what]
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    file = make(tmp_path / "flux-2-klein-4b.safetensors")
    with pytest.raises(BadWeights, match=says) as error:
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(Job("x", model=str(file))))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_file_named_as_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    file = tmp_path / "flux-2-klein-4b.ckpt"
    file.write_bytes(b"\x80\x02anything")
    with pytest.raises(BadWeights, match="is a pickle"):
        ModelRegistry().resolve(str(file))


def test_the_9b_encoder_with_a_4b_transformer_is_refused(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests import toys

    home = tmp_path / "mixed"
    shutil.copytree(folder, home)
    config: dict[str, Any] = toys.QWEN3 | {"hidden_size": 64}
    wide = Qwen3ForCausalLM(Qwen3Config(vocab_size=300, **config))
    wide.save_pretrained(home / "text_encoder")
    with pytest.raises(
        BadWeights, match=r"gives 192 numbers a token, the transformer reads 96.*klein 9B with Qwen3-8B"
    ):
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(Job("x", model=str(home))))


def test_unreadable_file_gives_a_clear_error(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    file = published.write(bfl, tmp_path / "flux-2-klein-4b.safetensors")
    with forbidden(file, tmp_path), pytest.raises(BadWeights, match=r"may not be read by this user\. Change its perm"):
        ModelRegistry().resolve(str(file))


@contextmanager
def forbidden(file: Path, home: Path) -> Iterator[None]:
    """Remove the permission to read `file` for the duration of the context.

    A root process gives up its privileges meanwhile, because root can read everything.
    """
    above = [folder for folder in file.parents if folder.is_relative_to("/tmp") and folder != Path("/tmp")]
    modes = {path: path.stat().st_mode for path in (*above, file)}
    user = os.geteuid()
    for folder in above:
        folder.chmod(0o755)
    file.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


def test_error_while_loading_leaves_no_partial_model(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "torn"
    shutil.copytree(folder, home)
    engine = Engine(EngineConfig(device="cpu", dtype="float32", cache_bytes=0))
    for _ in engine.run(Job("x", model=str(NANO), size=Exact(64, 64), steps=1)):
        pass
    cut(home / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(EngineError):
        list(engine.run(Job("x", model=str(home))))
    for _ in engine.run(Job("x", model=str(NANO), size=Exact(64, 64), steps=1)):
        pass
    assert engine.status().loaded == str(NANO)


def test_the_same_name_in_two_precisions_is_read_once(folder: Path, tmp_path: Path) -> None:
    """Check a folder that has an fp16 copy beside the full model, as some repositories do."""
    home = tmp_path / "transformer"
    shutil.copytree(folder / "transformer", home)
    shutil.copy(home / "diffusion_pytorch_model.safetensors", home / "diffusion_pytorch_model.fp16.safetensors")
    assert [file.name for file in Tensors.folder(home).files] == ["diffusion_pytorch_model.safetensors"]


def test_a_folder_of_pickles_is_refused(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "pickled"
    shutil.copytree(folder, home)
    file = home / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    says = r"only diffusion_pytorch_model\.bin, which is a pickle and could run code\. Only safetensors are read"
    with pytest.raises(BadWeights, match=says):
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(Job("x", model=str(home))))


def test_engine_takes_loras_and_format_as_strings(folder: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "loras").mkdir(parents=True)
    shutil.copytree(folder, models / "klein-4b")
    write(bfl_fused(), models / "loras" / "style.safetensors")
    job = Job("x", model="klein-4b", size=Exact(64, 64), steps=1)
    prints = set()
    for words in ({}, {"loras": ("style:0.5",)}, {"loras": ("style",)}, {"quant": "fp8", "loras": ("style",)}):
        engine = Engine(EngineConfig(models=(models,), device="cpu", dtype="float32", **words))  # type: ignore[arg-type]
        *_, painting = engine.run(job)
        assert isinstance(painting, Result)
        prints.add((painting.fingerprint, painting.image.tobytes()))
    assert len({fingerprint for fingerprint, _ in prints}) == len({image for _, image in prints}) == 4
    with pytest.raises(EngineError, match=r"No LoRA 'stile'; there are style"):
        list(Engine(EngineConfig(models=(models,), device="cpu", loras=("stile",))).run(job))
    with pytest.raises(EngineError, match=r"quant is 'int4'; allowed: fp8, nvfp4"):
        list(Engine(EngineConfig(models=(models,), device="cpu", quant="int4")).run(job))


def test_renamed_file_needs_the_variant_setting(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    file = published.write(bfl, tmp_path / "mine.safetensors")
    job = Job("x", model=str(file), size=Exact(64, 64), steps=1)
    with pytest.raises(BadWeights, match="Set variant to klein-4b or klein-base-4b"):
        list(Engine(EngineConfig(device="cpu", dtype="float32")).run(job))
    *_, painting = Engine(EngineConfig(device="cpu", dtype="float32", variant="klein-base-4b")).run(job)
    assert isinstance(painting, Result)
    assert (painting.model, painting.guidance) == ("klein-base-4b", 4.0)


def test_model_in_comfyui_folders_runs(bfl: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    """Check that a model runs from ComfyUI's folders.

    The fp8 transformer has a prefix, the autoencoder is fp32 and the encoder is one file.
    Only the tokenizer is a folder.
    """
    home = tmp_path / "ComfyUI" / "models"
    prefixed = {f"model.diffusion_model.{n}": t for n, t in published.quantised(bfl, "fp8")[0].items()}
    published.write(prefixed, home / "diffusion_models" / "flux-2-klein-4b-fp8.safetensors")
    published.write(published.bfl_autoencoder(folder), home / "vae" / "flux2-vae.safetensors")
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    published.write(encoder, home / "text_encoders" / "qwen_3_4b.safetensors")
    shutil.copytree(folder / "tokenizer", home / "diffusion_models" / "tokenizer")
    engine = Engine(EngineConfig(models=(home,), device="cpu", dtype="float32"))
    *_, painting = engine.run(Job("x", model="klein-4b", size=Exact(64, 64), steps=2))
    assert isinstance(painting, Result)
    assert painting.image.std() > 5
    assert engine.models()[1].format == "fp8"
