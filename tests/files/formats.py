"""Every way in which a toy klein is stored: what is written, and what it means in fp32."""

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import toys
from tests.engine import published
from tests.files import gguf_files

SHAPE = {"num_attention_heads": 8}
"""Of the toy transformer: 256 wide, as the K blocks need."""
QWEN3 = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Toy:
    """A klein as a diffusers folder, and its tensors under the published names."""

    folder: Path
    transformer: Tensors
    encoder: Tensors
    autoencoder: Tensors

    @classmethod
    def make(cls, folder: Path) -> "Toy":
        small = dict(toys.QWEN3)
        try:
            toys.QWEN3.update(QWEN3)
            toys.save(folder, joint_attention_dim=3 * 256, **SHAPE)
        finally:
            toys.QWEN3.clear()
            toys.QWEN3.update(small)
        encoder = load_file(folder / "text_encoder" / "model.safetensors")
        return cls(folder, published.bfl_transformer(folder), encoder, published.bfl_autoencoder(folder))


@dataclass(frozen=True)
class Case:
    """A file. label: the format that `models` shows. meant: the transformer in fp32.

    encoder: the text encoder in fp32, where that is what is tried. refused: of the one line, where it is not read.
    """

    name: str
    file: Path
    label: str = "bf16"
    meant: Tensors = field(default_factory=dict)
    encoder: Tensors = field(default_factory=dict)
    refused: str = ""


def cases(toy: Toy, home: Path) -> Iterator[Case]:
    """Write every format below `home`, one after the other."""
    yield from _plain(toy, home)
    yield from _quantised(toy, home)
    yield from _gguf(toy, home)
    yield from _names(toy, home)
    yield from _encoders(toy, home)
    yield from _foreign(toy, home)


def _file(home: Path, word: str, suffix: str = "safetensors") -> Path:
    return home / "diffusion_models" / f"flux-2-klein-4b-{word}.{suffix}"


def _plain(toy: Toy, home: Path) -> Iterator[Case]:
    for word, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
        stored = {name: tensor.to(dtype) for name, tensor in toy.transformer.items()}
        file = published.write(stored, _file(home, word))
        yield Case(word, file, meant={name: tensor.float() for name, tensor in stored.items()})
    for length in (640, 896, 1152):
        # The length's first bytes are those of a pickle: padding in the metadata makes it so.
        file = published.write({n: t.bfloat16() for n, t in toy.transformer.items()}, _file(home, f"header-{length}"))
        _stretch_header(file, length)
        yield Case(
            f"header of …{length:#06x} bytes", file, meant={n: t.bfloat16().float() for n, t in toy.transformer.items()}
        )


def _stretch_header(file: Path, low: int) -> None:
    """Pad the header with spaces until the low two bytes of its length are `low`."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    wanted = low + 65536 * (length // 65536 + 1)
    file.write_bytes(struct.pack("<Q", wanted) + data[8 : 8 + length] + b" " * (wanted - length) + data[8 + length :])


def int8(weight: Tensor, *, rows: bool, convrot: bool) -> Tensors:
    """int8_tensorwise, written out: H is made by hand, not by the engine."""
    weight = weight.float()
    if convrot:
        h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
        h = torch.kron(torch.kron(h4, h4), torch.kron(h4, h4)) / 16
        weight = torch.cat([group @ h.T for group in weight.split(256, dim=1)], dim=1)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127 if rows else weight.abs().max() / 127
    return {"weight": (weight / scale).round().clamp(-127, 127).to(torch.int8), "weight_scale": scale}


def mxfp8(weight: Tensor) -> Tensors:
    """A power of two for 32 weights, in cuBLAS's blocks."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, columns // 32, 32)
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1).clamp_min(1e-30) / 448)).clamp(-127, 127)
    codes = (groups / torch.exp2(exponent)[..., None]).to(torch.float8_e4m3fn).reshape(rows, columns)
    scales, stored = (exponent + 127).to(torch.uint8), torch.empty(rows * columns // 32, dtype=torch.uint8)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns // 32), indexing="ij")
    offset = ((r // 128) * (columns // 128) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    stored[offset.flatten()] = scales.flatten()
    return {"weight": codes, "weight_scale": stored.reshape(rows, columns // 32)}


def fp8_rows(weight: Tensor) -> Tensors:
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def awq_nvfp4(weight: Tensor) -> Tensors:
    """nvfp4 of a weight whose columns were divided by what its inputs are multiplied with."""
    columns = torch.linspace(0.5, 2.0, weight.shape[1])
    return published.nvfp4(weight / columns) | {"pre_quant_scale": columns}


def _wide_fp8(stored: Tensors) -> Tensor:
    scale = stored.get("weight_scale", torch.ones(()))
    return stored["weight"].float() * scale.float().reshape(-1, 1)


def _wide_int8(stored: Tensors, *, convrot: bool) -> Tensor:
    weight = stored["weight"].float() * stored["weight_scale"].float().reshape(-1, 1)
    if not convrot:
        return weight
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
    h = torch.kron(torch.kron(h4, h4), torch.kron(h4, h4)) / 16
    return torch.cat([group @ h for group in weight.split(256, dim=1)], dim=1)


def _wide_mxfp8(stored: Tensors) -> Tensor:
    rows, columns = stored["weight"].shape
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns // 32), indexing="ij")
    offset = ((r // 128) * (columns // 128) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    scale = torch.exp2(stored["weight_scale"].flatten()[offset].float() - 127)
    return (stored["weight"].float().reshape(rows, -1, 32) * scale[..., None]).reshape(rows, columns)


def _wide_nvfp4(stored: Tensors) -> Tensor:
    """By look-ups in the bytes, high nibble first."""
    packed = stored["weight"].numpy()
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    values = torch.tensor([*published.E2M1, *(-published.E2M1)], dtype=torch.float32)
    codes = torch.empty(rows, columns, dtype=torch.long)
    codes[:, 0::2], codes[:, 1::2] = torch.from_numpy(packed >> 4).long(), torch.from_numpy(packed & 15).long()
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns // 16), indexing="ij")
    offset = ((r // 128) * (columns // 64) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    scale = stored["weight_scale"].view(torch.uint8).flatten()[offset].view(torch.float8_e4m3fn).float()
    weight = (values[codes].reshape(rows, -1, 16) * scale[..., None] * stored["weight_scale_2"]).reshape(rows, columns)
    return weight * stored.get("pre_quant_scale", torch.ones(columns))


Scheme = tuple[str, str, Callable[[Tensor], Tensors], Callable[[Tensors], Tensor], dict[str, object]]

SCHEMES: tuple[Scheme, ...] = (
    ("fp8", "fp8", published.fp8, _wide_fp8, {"format": "float8_e4m3fn"}),
    ("fp8-rows", "fp8", fp8_rows, _wide_fp8, {"format": "float8_e4m3fn_rowwise"}),
    ("nvfp4", "nvfp4", published.nvfp4, _wide_nvfp4, {"format": "nvfp4"}),
    ("nvfp4-awq", "nvfp4", awq_nvfp4, _wide_nvfp4, {"format": "nvfp4"}),
    ("mxfp8", "mxfp8", mxfp8, _wide_mxfp8, {"format": "mxfp8"}),
    ("int8", "int8", lambda w: int8(w, rows=False, convrot=False), lambda s: _wide_int8(s, convrot=False),
     {"format": "int8_tensorwise"}),
    ("int8-rows", "int8", lambda w: int8(w, rows=True, convrot=False), lambda s: _wide_int8(s, convrot=False), {}),
    ("INT8-ConvRot", "int8", lambda w: int8(w, rows=True, convrot=True), lambda s: _wide_int8(s, convrot=True),
     {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}),
)  # fmt: skip
"""Name, what `models` calls it, the quantiser, what its tensors mean, and ComfyUI's marker."""


def quantise(tensors: Tensors, quantiser: Callable[[Tensor], Tensors], widen: Callable[[Tensors], Tensor],
             marker: dict[str, object]) -> tuple[Tensors, Tensors]:  # fmt: skip
    """Quantise the block linears, each with a marker and return what is stored and what it means."""
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in tensors.items():
        if not published.BLOCK_LINEAR.fullmatch(name):
            stored[name] = tensor.bfloat16()
            meant[name] = stored[name].float()
            continue
        layer = name.removesuffix(".weight")
        leaves = quantiser(tensor)
        stored |= {f"{layer}.{leaf}": value.contiguous() for leaf, value in leaves.items()}
        if marker:
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
        meant[name] = widen(leaves)
    return stored, meant


def _quantised(toy: Toy, home: Path) -> Iterator[Case]:
    for name, label, quantiser, widen, marker in SCHEMES:
        stored, meant = quantise(toy.transformer, quantiser, widen, marker)
        yield Case(name, published.write(stored, _file(home, name)), label, meant)
    raw = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in toy.transformer.items()}
    file = published.write(raw, _file(home, "fp8-cast"))
    yield Case("fp8, cast without scales", file, "fp8", {name: tensor.float() for name, tensor in raw.items()})


def mixed(name: str, tensor: Tensor) -> str:
    """Mix types as Q4_K_M does: norms F32, what is in no block BF16, some layers Q6_K."""
    if tensor.ndim < 2:
        return "F32"
    if not published.BLOCK_LINEAR.fullmatch(name):
        return "BF16"
    return "Q6_K" if "qkv" in name or "blocks.1" in name else "Q4_K"


def _gguf(toy: Toy, home: Path) -> Iterator[Case]:
    for kind in (*gguf_files.BLOCK_TYPES, *gguf_files.PLAIN):

        def kinds(name: str, tensor: Tensor, kind: str = kind) -> str:
            plain = kind if kind in gguf_files.PLAIN else "BF16"
            return "F32" if tensor.ndim < 2 else kind if published.BLOCK_LINEAR.fullmatch(name) else plain

        file = _file(home, kind, "gguf")
        meant = gguf_files.write(toy.transformer, kinds, file)
        yield Case(f"GGUF {kind}", file, "bf16" if kind in gguf_files.PLAIN else kind, meant)
    file = _file(home, "Q4_K_M", "gguf")
    yield Case("GGUF Q4_K_M, mixed", file, "Q6_K", gguf_files.write(toy.transformer, mixed, file))
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in toy.transformer.items()}
    file = _file(home, "sd-Q8_0", "gguf")
    meant = gguf_files.write(prefixed, lambda n, t: "Q8_0" if t.ndim == 2 and ("blocks" in n) else "F16", file)
    yield Case(
        "GGUF of sd.cpp, prefixed",
        file,
        "Q8_0",
        {n.removeprefix("model.diffusion_model."): t for n, t in meant.items()},
    )


def _names(toy: Toy, home: Path) -> Iterator[Case]:
    stored = {name: tensor.bfloat16() for name, tensor in toy.transformer.items()}
    meant = {name: tensor.float() for name, tensor in stored.items()}
    for i, prefix in enumerate(("model.diffusion_model.", "_orig_mod.", "module.", "base_model.model.")):
        file = published.write({prefix + n: t for n, t in stored.items()}, _file(home, f"bf16-prefix{i}"))
        yield Case(f"prefix {prefix}", file, meant=meant)
    leftovers = {"model_sampling.sigmas": torch.zeros(4)} | {f"model_ema.{n}": t.clone() for n, t in stored.items()}
    yield Case("leftovers beside", published.write(stored | leftovers, _file(home, "bf16-leftovers")), meant=meant)
    whole = {f"model.diffusion_model.{n}": t for n, t in stored.items()}
    whole |= {f"text_encoders.qwen3_4b.transformer.{n}": t for n, t in toy.encoder.items()}
    by_comfyui = {re.sub(r"^\w+\.((?:post_)?quant_conv)", r"\1", n): t for n, t in toy.autoencoder.items()}
    for word, autoencoder in (("all-in-one", toy.autoencoder), ("saved by ComfyUI", by_comfyui)):
        file = home / "checkpoints" / f"flux-2-klein-4b-{word}.safetensors"
        published.write(whole | {f"vae.{n}": t for n, t in autoencoder.items()}, file)
        yield Case(f"{word} checkpoint", file, meant=meant)


LLAMA_NAMES = (
    (r"^model\.embed_tokens", "token_embd"), (r"^model\.norm", "output_norm"), (r"^model\.layers\.(\d+)", r"blk.\1"),
    (r"input_layernorm", "attn_norm"), (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.([qk])_norm", r"attn_\1_norm"), (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.o_proj", "attn_output"), (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
)  # fmt: skip


def llama_name(name: str) -> str:
    for pattern, new in LLAMA_NAMES:
        name = re.sub(pattern, new, name)
    return name


def _encoders(toy: Toy, home: Path) -> Iterator[Case]:
    transformer = {name: tensor.bfloat16() for name, tensor in toy.transformer.items()}
    for word, table, inside in (("Q8_0", "Q8_0", "Q8_0"), ("Q4_K_M", "Q6_K", "Q4_K")):
        place = home.parent / f"encoder {word}"
        renamed = {llama_name(name): tensor for name, tensor in toy.encoder.items()}

        def kinds(name: str, tensor: Tensor, table: str = table, inside: str = inside) -> str:
            return "F32" if tensor.ndim < 2 else table if name == "token_embd.weight" else inside

        meant = gguf_files.write(renamed, kinds, place / "text_encoders" / f"Qwen3-4B-{word}.gguf", "qwen3")
        file = published.write(transformer, place / "diffusion_models" / "flux-2-klein-4b.safetensors")
        published.write(toy.autoencoder, place / "vae" / "flux2-vae.safetensors")
        shutil.copytree(toy.folder / "tokenizer", place / "diffusion_models" / "tokenizer")
        encoder = {name: meant[llama_name(name)] for name in toy.encoder}
        yield Case(f"text encoder GGUF {word}", file, "bf16", {n: t.float() for n, t in transformer.items()}, encoder)


def _foreign(toy: Toy, home: Path) -> Iterator[Case]:
    name = "double_stream_modulation_img.linear.weight"
    base = {name: torch.zeros(8, 8)}
    block = "transformer_blocks.0.attn.to_q"
    packed = torch.zeros(4, 4, dtype=torch.uint8)
    for program, leaves, metadata in (
        ("Nunchaku", {"qweight": packed.to(torch.int8), "wscales": torch.zeros(4)},
         {"model_class": "NunchakuFlux2Transformer2DModel"}),
        ("bitsandbytes", {"weight": packed, "weight.absmax": torch.zeros(1)}, None),
        ("SDNQ", {"weight": packed, "scale": torch.zeros(4), "zero_point": torch.zeros(4)}, None),
        ("quanto", {"weight._data": packed, "weight._scale": torch.zeros(4)}, None),
        ("AWQ", {"qweight": packed.int(), "qzeros": packed.int(), "scales": torch.zeros(4)}, None),
        ("MLX", {"weight": packed.to(torch.uint32), "scales": torch.zeros(4), "biases": torch.zeros(4)}, None),
    ):  # fmt: skip
        tensors = base | {f"{block}.{leaf}": value for leaf, value in leaves.items()}
        yield Case(
            program, published.write(tensors, _file(home, program), metadata), refused=f"is quantised by {program}"
        )
    draw = _file(home, "draw", "ckpt")
    draw.write_bytes(b"SQLite format 3\0" + b"\0" * 100)
    yield Case("Draw Things", draw, refused="is a Draw Things model")
    file = _file(home, "IQ4_XS", "gguf")
    gguf_files.write(toy.transformer, lambda n, t: "Q4_K" if t.ndim == 2 and "blocks" in n else "F32", file)
    file.write_bytes(_as_iq4_nl(file.read_bytes()))
    yield Case("GGUF IQ4_NL", file, refused="is stored as IQ4_NL, which is not read")


def _as_iq4_nl(data: bytes) -> bytes:
    """Change the first tensor's type from Q4_K (144 bytes for 256) to IQ4_NL, of the same size a weight."""
    name = b"double_blocks.0.img_attn.qkv.weight"
    at = data.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", data, at)
    kind = at + 4 + 8 * dimensions
    assert struct.unpack_from("<I", data, kind) == (12,)
    return data[:kind] + struct.pack("<I", 20) + data[kind + 4 :]
