"""Makes a larger nano that begins with a smaller one's velocity.

`python -m engine.nano.training.grow FROM TO`; FROM may be -, for the shipped weights.

Wider: new channels read everything, and what was there does not read them yet. Deeper: new single blocks add nothing
yet. The text encoder gets a row for each new word. An autoencoder of four levels gets a fifth: its encoder averages
2 × 2 pixels first, so that latents of an image of twice the side mean the same; the decoder starts anew.
"""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.families.klein.transformer import DoubleBlock, SingleBlock, Transformer, TransformerShape
from engine.nano.training.folder import (
    WEIGHTS,
    load_autoencoder,
    load_transformer,
    save_autoencoder,
    save_transformer,
    transformer_shape,
)
from engine.nano.training.metadata import vocabulary
from engine.nano.training.tokenizer import extend
from engine.nn.autoencoder import Autoencoder

BLOCK_STD = 0.02
"""Of the new parts of matrices inside blocks."""


# Shape and limits of the larger nano.
HEADS = 8
SINGLE_BLOCKS = 4
DECODER = (8, 16, 32, 96, 128)
"""Of an autoencoder that gets a fifth level; one of five stays as it is."""
TEXT_LENGTH = 96
NATIVE_SIZE = 256
MAX_REFERENCES = 4


def _spread(old: Tensor, rows: list[tuple[int, int]], columns: list[tuple[int, int]], std: float) -> Tensor:
    """Return a larger matrix that contains the old one.

    Each (old, new) run of rows and columns starts with the old one's.
    New rows are random; old rows do not read new columns.
    """
    height, width = (sum(new for _, new in runs) for runs in (rows, columns))
    grown = torch.randn(height, width) * std
    top = old_top = 0
    for old_rows, new_rows in rows:
        grown[top : top + old_rows] = 0
        left = old_left = 0
        for old_columns, new_columns in columns:
            part = old[old_top : old_top + old_rows, old_left : old_left + old_columns]
            grown[top : top + old_rows, left : left + old_columns] = part
            left, old_left = left + new_columns, old_left + old_columns
        top, old_top = top + new_rows, old_top + old_rows
    return grown


class _Widening:
    """The rules for each matrix, from width `old` to width `new`."""

    def __init__(self, old: TransformerShape, new: TransformerShape) -> None:
        self.hidden = (old.hidden, new.hidden)
        self.mlp = (old.mlp, new.mlp)
        # LayerNorm over channels of which some are nearly 0 makes the others larger by this.
        self.norm = math.sqrt(new.hidden / old.hidden)

    def into(self, old: Tensor, rows: list[tuple[int, int]]) -> Tensor:
        """Widen a matrix behind a LayerNorm."""
        return _spread(old / self.norm, rows, [self.hidden], BLOCK_STD)

    def modulation(self, old: Tensor, shifts: tuple[int, ...]) -> Tensor:
        """Widen a modulation, whose `shifts`-th parts grow with the LayerNorm."""
        parts = [part * (self.norm if i in shifts else 1.0) for i, part in enumerate(old.split(self.hidden[0]))]
        return _spread(torch.cat(parts), [self.hidden] * len(parts), [self.hidden], BLOCK_STD)

    def double(self, old: DoubleBlock, new: DoubleBlock) -> None:
        qkv, up = [self.hidden] * 3, [self.mlp] * 2
        for stream in ("img", "txt"):
            a, b = getattr(old, f"{stream}_attn"), getattr(new, f"{stream}_attn")
            b.qkv.weight.copy_(self.into(a.qkv.weight, qkv))
            b.proj.weight.copy_(_spread(a.proj.weight, [self.hidden], [self.hidden], BLOCK_STD))
            b.norm.load_state_dict(a.norm.state_dict())
            a, b = getattr(old, f"{stream}_mlp"), getattr(new, f"{stream}_mlp")
            b[0].weight.copy_(self.into(a[0].weight, up))
            b[2].weight.copy_(_spread(a[2].weight, [self.hidden], [self.mlp], BLOCK_STD))

    def single(self, old: SingleBlock, new: SingleBlock) -> None:
        rows = [self.hidden] * 3 + [self.mlp] * 2
        new.linear1.weight.copy_(self.into(old.linear1.weight, rows))
        new.linear2.weight.copy_(_spread(old.linear2.weight, [self.hidden], [self.hidden, self.mlp], BLOCK_STD))
        new.norm.load_state_dict(old.norm.state_dict())


def _outer(old: nn.Linear, new: nn.Linear, widening: _Widening) -> None:
    """Widen an outer matrix, its new channels a tenth as strong."""
    std = 0.1 * float(old.weight.std())
    columns = (old.weight.shape[1], new.weight.shape[1])
    new.weight.copy_(_spread(old.weight, [widening.hidden], [columns], std))


@torch.no_grad()
def widen(old: Transformer, shape: TransformerShape) -> Transformer:
    """Return a larger transformer that computes nearly what `old` does."""
    new, widening = Transformer(shape), _Widening(old.shape, shape)
    _outer(old.img_in, new.img_in, widening)
    _outer(old.txt_in, new.txt_in, widening)
    time = [(shape.time_channels, shape.time_channels)]
    new.time_in.in_layer.weight.copy_(_spread(old.time_in.in_layer.weight, [widening.hidden], time, BLOCK_STD))
    new.time_in.out_layer.weight.copy_(
        _spread(old.time_in.out_layer.weight, [widening.hidden], [widening.hidden], BLOCK_STD)
    )
    for name, shifts in (
        ("double_stream_modulation_img", (0, 3)),
        ("double_stream_modulation_txt", (0, 3)),
        ("single_stream_modulation", (0,)),
    ):
        a, b = getattr(old, name), getattr(new, name)
        b.lin.weight.copy_(widening.modulation(a.lin.weight, shifts))
    final = new.final_layer
    name = "adaLN_modulation.1.weight"
    final.get_parameter(name).copy_(widening.modulation(old.final_layer.get_parameter(name), (0,)))
    channels = [(shape.channels, shape.channels)]
    final.linear.weight.copy_(widening.into(old.final_layer.linear.weight, channels))
    for a, b in zip(old.double_blocks, new.double_blocks, strict=True):
        widening.double(a, b)  # type: ignore[arg-type] - a ModuleList
    new_blocks = iter(new.single_blocks)
    added = len(new.single_blocks) - len(old.single_blocks)
    for i, block in enumerate(old.single_blocks):
        if i >= len(old.single_blocks) - added:
            # A new block before each of the last ones; it adds nothing until it has learned something.
            silent = next(new_blocks)
            assert isinstance(silent, SingleBlock)
            nn.init.normal_(silent.linear1.weight, std=BLOCK_STD)
            nn.init.zeros_(silent.linear2.weight)
        widening.single(block, next(new_blocks))  # type: ignore[arg-type] - a ModuleList
    return new


@torch.no_grad()
def deepen(old: Autoencoder, decoder: tuple[int, ...]) -> Autoencoder:
    """Return an autoencoder with one level more, whose decoder is untrained.

    It encodes an image of twice the side as `old` encodes its 2 × 2 averages.
    """
    widths = old.shape.encoder
    new = Autoencoder(replace(old.shape, encoder=(widths[0], *widths), decoder=decoder))
    encoder: Any = new.encoder
    for name, part in old.encoder.named_children():
        if name != "down":
            getattr(encoder, name).load_state_dict(part.state_dict())
    for level, part in zip(encoder.down[1:], old.encoder.down, strict=True):
        level.load_state_dict(part.state_dict())
    for block in encoder.down[0]["block"]:
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
    halve = encoder.down[0]["downsample"].conv
    nn.init.zeros_(halve.weight)
    nn.init.zeros_(halve.bias)
    for channel in range(3):
        # Padded at the right and bottom: the kernel's first two rows and columns are the cell itself.
        halve.weight[channel, channel, :2, :2] = 0.25
    new.bn.load_state_dict(old.bn.state_dict())
    return new


def _edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


def grow(start: Path, to: Path) -> None:
    """Write the folder of a larger nano, untrained where it is new."""
    torch.manual_seed(0)
    shutil.copytree(start, to, dirs_exist_ok=True)
    config = json.loads((to / "transformer" / "config.json").read_text())
    old = load_transformer(start)
    config |= {"num_attention_heads": HEADS, "num_single_layers": SINGLE_BLOCKS}
    _edit_json(to / "transformer" / "config.json", **config)
    save_transformer(widen(old, transformer_shape(config)), to)
    extend(to)
    old_autoencoder = load_autoencoder(start)
    autoencoder = old_autoencoder
    if len(autoencoder.shape.encoder) < len(DECODER):
        autoencoder = deepen(autoencoder, DECODER)
    levels = len(autoencoder.shape.encoder)
    _edit_json(
        to / "vae" / "config.json", block_out_channels=autoencoder.shape.encoder,
        decoder_block_out_channels=autoencoder.shape.decoder, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, sample_size=NATIVE_SIZE,
    )  # fmt: skip
    save_autoencoder(autoencoder, to)
    klein = json.loads((to / "klein.json").read_text())
    klein |= {
        "text_length": TEXT_LENGTH,
        "native_size": NATIVE_SIZE,
        "least_size": NATIVE_SIZE,
        "max_references": MAX_REFERENCES,
        **vocabulary(),
    }
    (to / "klein.json").write_text(json.dumps(klein) + "\n")


if __name__ == "__main__":
    grow(WEIGHTS if sys.argv[1] == "-" else Path(sys.argv[1]), Path(sys.argv[2]))
