"""Tests that the engine avoids operations Apple's devices do not support.

These are fp64, int64 scatter and fp8. A fake device checks it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.diffusion.sampler import denoise
from engine.diffusion.tokens import grid_positions, text_positions
from engine.families.klein import components
from engine.families.klein.text_encoder import TextEncoder
from engine.families.klein.transformer import Transformer, TransformerShape
from engine.memory.device import Device
from engine.nn.autoencoder import Autoencoder, AutoencoderShape
from tests.engine import published

UNKNOWN = {torch.float64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2}
SHAPE = TransformerShape(64, 32, 96, 1, 1, 192, axes=(8, 8, 8, 8))
QWEN3 = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 100, "rope_parameters": {"rope_type": "default",
         "rope_theta": 1e6}}  # fmt: skip


class Metal(TorchDispatchMode):
    """Makes the meta device behave like Metal.

    Operations in an unsupported format fail, and so does int64 scatter. Asynchronous copies to the device fail too,
    because nothing shows when the source may be used again.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and args[0].is_meta and not args[1].is_meta:
            assert not any(args[2:]), "a copy that is not waited for"
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                assert tensor.dtype not in UNKNOWN, f"{func} in {tensor.dtype}"
                assert not ("scatter" in str(func) and tensor.dtype == torch.int64), func
        return out


def there(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@torch.inference_mode()
def test_transformer_uses_only_operations_that_metal_supports() -> None:
    with torch.device("meta"):
        net = Transformer(SHAPE).to(torch.bfloat16)
    with Metal():
        rope = net.rope(torch.cat([text_positions(8), grid_positions(4, 4), grid_positions(2, 2, 10)]))
        kept = net.prefill(net.img_in(there(1, 4, 128)), net.rope(grid_positions(2, 2, 10)))
        mods = net.modulations(there(1))
        text = net.txt_in(there(1, 8, 96))
        net(there(1, 16, 128), text, mods, rope, net.img_in(there(1, 4, 128)), None)
        net(there(1, 16, 128), text, mods, (rope[0][:24], rope[1][:24]), None, kept)
        for _ in denoise(lambda x, sigma: x, there(1, 16, 128), (1.0, 0.5, 0.0)):
            pass


@torch.inference_mode()
def test_autoencoder_uses_only_operations_that_metal_supports() -> None:
    with torch.device("meta"):
        net = Autoencoder(AutoencoderShape((32, 32), (32, 32), 1, 32)).to(torch.bfloat16)
    with Metal():
        net.encode(there(1, 3, 32, 32))
        net.decode(there(1, 128, 4, 4))


@torch.inference_mode()
def test_text_encoder_uses_only_operations_that_metal_supports() -> None:
    with torch.device("meta"):
        net = TextEncoder(QWEN3, (1, 2, 3)).to(torch.bfloat16)
    net.finish(torch.device("meta"))
    with Metal():
        net(there(1, 12, dtype=torch.int64), there(1, 12, dtype=torch.int64))


@pytest.mark.parametrize("kind", [None, "fp8", "nvfp4", "raw fp8"])
def test_loading_uses_only_operations_that_metal_supports(
    kind: str | None, bfl: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that codes are widened before they are copied to the device."""
    monkeypatch.setattr("engine.checkpoints.quant.stores_fp8", lambda device: device.type != "meta")
    monkeypatch.setattr("engine.checkpoints.reader.stores_fp8", lambda device: device.type != "meta")
    tensors, metadata = bfl, None
    if kind == "raw fp8":
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in bfl.items()}
    elif kind is not None:
        tensors, metadata = published.quantised(bfl, kind)
    metal = Device(torch.device("meta"), torch.bfloat16)
    part = components.transformer(published.write(tensors, tmp_path / "x.safetensors", metadata), None, metal.device)
    with Metal():
        assert sum(part.load(metal)) == part.bytes
    assert {parameter.dtype for parameter in part.module.parameters()} == {torch.bfloat16}


def test_fake_device_rejects_unsupported_operations() -> None:
    with Metal():
        with pytest.raises(AssertionError, match="not waited for"):
            there(3).copy_(torch.zeros(3), non_blocking=True)
        with pytest.raises(AssertionError, match="float64"):
            there(3).double()
        with pytest.raises(AssertionError, match="float8"):
            there(3).to(torch.float8_e4m3fn)
        with pytest.raises(AssertionError, match="scatter"):
            there(3, dtype=torch.int64).scatter(0, there(1, dtype=torch.int64), 1)
