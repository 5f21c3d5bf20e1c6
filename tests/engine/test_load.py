"""Tests that loading reads only the tensors it needs, straight to their place."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.files import read_header
from engine.checkpoints.tensors import Tensors
from engine.contract import BadWeights
from engine.families.klein import components
from engine.families.klein.components import QuantPolicy
from engine.families.klein.signatures import component
from engine.memory.device import Device
from tests.engine import published

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
    assert one.module.shape.heads == other.module.shape.heads
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


@pytest.mark.parametrize("prefix", ["", "vae."], ids=["VAESave", "CheckpointSave"])
def test_autoencoder_saved_by_comfyui_is_read(
    prefix: str, folder: Path, bfl: dict[str, Tensor], tmp_path: Path
) -> None:
    """ComfyUI saves BFL's file with two convolutions at the top, where diffusers has them."""
    saved = {re.sub(r"^\w+\.((?:post_)?quant_conv)", r"\1", n): t for n, t in published.bfl_autoencoder(folder).items()}
    assert {"quant_conv.weight", "post_quant_conv.bias"} <= saved.keys()
    beside = {f"model.diffusion_model.{name}": tensor for name, tensor in bfl.items()} if prefix else {}
    file = published.write({prefix + name: t for name, t in saved.items()} | beside, tmp_path / "saved.safetensors")
    one, other = components.autoencoder(folder / "vae"), components.autoencoder(file)
    for part in (one, other):
        part.verify()
        list(part.load(CPU))
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


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


def test_the_same_name_in_two_precisions_is_read_once(folder: Path, tmp_path: Path) -> None:
    """Check a folder that has an fp16 copy beside the full model, as some repositories do."""
    home = tmp_path / "transformer"
    shutil.copytree(folder / "transformer", home)
    shutil.copy(home / "diffusion_pytorch_model.safetensors", home / "diffusion_pytorch_model.fp16.safetensors")
    assert [file.name for file in Tensors.folder(home).files] == ["diffusion_pytorch_model.safetensors"]


def test_first_image_needs_neither_transformers_nor_the_compiler() -> None:
    """Check a process of its own: they took 5 of the 7 seconds before an engine's first image."""
    code = (
        "import sys\n"
        "from engine.contract import EngineConfig, Exact, Job\n"
        "from engine.engine import Engine\n"
        "list(Engine(EngineConfig(device='cpu')).run(Job('a dog', size=Exact(64, 64), model='nano')))\n"
        "print([name for name in ('transformers', 'torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
