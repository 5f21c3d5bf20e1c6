"""LoRA files as each producer writes them, for the toy, and the toy with them applied."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.families.klein import components, lora
from engine.families.klein.components import QuantPolicy
from engine.families.klein.lora import Lora
from engine.families.klein.transformer import Transformer
from engine.memory.device import Device

CPU = Device(torch.device("cpu"), torch.float32)
RANK = 4
H = 128

ROW = "double_blocks.1.img_attn.proj"
"""The layer that tests of one change use, 128 × 128 in the toy."""

# Our layer -> (rows, columns) in the toy.
LAYERS = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.1.txt_attn.qkv": (3 * H, H),
    "double_blocks.1.img_attn.proj": (H, H),
    "double_blocks.0.img_mlp.0": (6 * H, H),
    "double_blocks.0.txt_mlp.2": (H, 3 * H),
    "single_blocks.1.linear1": (9 * H, H),
    "single_blocks.0.linear2": (H, 4 * H),
}
DIFFUSERS = {
    "double_blocks.1.img_attn.proj": "transformer_blocks.1.attn.to_out.0",
    "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
    "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.linear_out",
    "single_blocks.1.linear1": "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
}


def factors(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (up, down) factors large enough to have a visible effect."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator) * 0.3 for s in ((rows, RANK), (RANK, columns)))  # type: ignore[return-value]


def bfl_fused() -> dict[str, Tensor]:
    """Return LoRA tensors as ai-toolkit writes them."""
    out = {}
    for i, (layer, (rows, columns)) in enumerate(LAYERS.items()):
        up, down = factors(rows, columns, i)
        out |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    return out


def kohya(alpha: float = 2.0) -> dict[str, Tensor]:
    """Return LoRA tensors as kohya's scripts write them, with an alpha."""
    out = {}
    for i, (layer, (rows, columns)) in enumerate(LAYERS.items()):
        up, down = factors(rows, columns, i)
        name = f"lora_unet_{layer.replace('.', '_')}"
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return out


def peft() -> dict[str, Tensor]:
    """Return LoRA tensors as diffusers saves them, with separate q, k and v."""
    out = {}
    for i, (layer, (rows, columns)) in enumerate(LAYERS.items()):
        up, down = factors(rows, columns, i)
        if layer.endswith("qkv"):
            block = f"transformer_blocks.{layer.split('.')[1]}.attn"
            names = ("to_q", "to_k", "to_v") if "img" in layer else ("add_q_proj", "add_k_proj", "add_v_proj")
            for name, part in zip(names, up.chunk(3), strict=True):
                out |= {
                    f"transformer.{block}.{name}.lora_A.weight": down.clone(),
                    f"transformer.{block}.{name}.lora_B.weight": part.contiguous(),
                }
        else:
            out |= {
                f"transformer.{DIFFUSERS[layer]}.lora_A.weight": down,
                f"transformer.{DIFFUSERS[layer]}.lora_B.weight": up,
            }
    return out


FORMS = {"peft": peft, "kohya": kohya, "BFL, fused": bfl_fused}


def write(tensors: dict[str, Tensor], file: Path) -> Path:
    save_file(tensors, file)
    return file


def load(path: Path, wanted: str | None = None) -> Transformer:
    """Load a transformer, quantised if `wanted` names a format."""
    part = components.transformer(path, QuantPolicy(wanted))
    list(part.load(CPU))
    return part.module


def changed(folder: Path, *loras: Lora, wanted: str | None = None) -> Transformer:
    """Load the toy's transformer with LoRAs applied."""
    module = load(folder / "transformer", wanted)
    lora.apply(module, [change for one in loras for change in lora.read(one, module).deltas])
    return module


def weight_after(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, layer: str = ROW, scale: float = 1.0
) -> Tensor:
    """Return a layer's weight with a LoRA of these tensors applied."""
    file = write({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "kind.safetensors")
    return changed(folder, Lora(file, scale)).get_parameter(f"{layer}.weight")
