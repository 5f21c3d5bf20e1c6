"""Minimum work and time for an image, counted without weights.

The work is counted on our own modules. Work that is the same for every image of a size (modulations of the fixed noise
levels, rotary tables) counts nothing: it can be done once. FLOP are those of matrix products, convolutions and
attention; 1 multiply-add = 2 FLOP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.contract import GRID
from engine.families.klein.transformer import Modulations
from tests.bench.ceilings import Ceilings
from tests.bench.full_size_models import Giant, Nets, empty
from tests.bench.scenarios import Scenario

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Work:
    """Minimum work of a stage.

    flop: floating-point operations. bytes: of weights and cached keys that must be read.
    """

    flop: float
    bytes: float

    def __mul__(self, times: int) -> "Work":
        return Work(self.flop * times, self.bytes * times)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)


class Counts:
    """Counts the work of each part of a job for one model."""

    def __init__(self, giant: Giant, dtype: torch.dtype = torch.bfloat16) -> None:
        self.giant = giant
        self.dtype = dtype
        self.nets: Nets = empty(giant, dtype)
        self.text = lru_cache(self._text)
        self.encode = lru_cache(self._encode)
        self.decode = lru_cache(self._decode)
        self.step = lru_cache(self._step)
        self.prefill = lru_cache(self._prefill)

    def phases(self, scenario: Scenario, steps: int) -> dict[str, Work]:
        """Return the minimum work of a job by stage."""
        side, reference = scenario.side(self.giant), self.giant.reference
        tokens, seen = _tokens(side), scenario.references * _tokens(reference)
        phases = {"denoise": self.step(tokens, seen, scenario.kv) * steps, "decode": self.decode(side)}
        if scenario.new_prompt:
            phases["prompt"] = self.text()
        if scenario.references and not scenario.known:
            phases["references"] = self.encode(reference) * scenario.references
            if scenario.kv:
                phases["references"] += self.prefill(seen)
        return phases

    def seconds(self, scenario: Scenario, steps: int, ceilings: Ceilings) -> float:
        """Return the minimum time, with all stages at peak rates in sequence."""
        return sum(ceilings.seconds(work.flop, work.bytes) for work in self.phases(scenario, steps).values())

    def _text(self) -> Work:
        """Count the prompt's encoding, with the transformer's projection."""
        encoder, txt_in = self.nets.text_encoder, self.nets.transformer.txt_in
        length = self.giant.variant.text_length

        def read() -> None:
            states, turns = self._blank(1, length, encoder.shape.hidden), self._blank(1, length, encoder.shape.head_dim)
            for layer in layers:
                states = layer(states, None, (turns, turns))
            txt_in(self._blank(1, length, encoder.width))

        layers: Any = encoder.model.layers
        return Work(_flop(read), _weights(layers, txt_in))

    def _encode(self, side: int) -> Work:
        """Count the encoding of one reference to latent tokens."""
        net, img_in = self.nets.autoencoder, self.nets.transformer.img_in

        def encode() -> None:
            net.encode(self._blank(1, 3, side, side))
            img_in(self._blank(1, _tokens(side), self.giant.transformer.channels))

        return Work(_flop(encode), _weights(net.encoder, img_in))

    def _decode(self, side: int) -> Work:
        net = self.nets.autoencoder
        latent = self._blank(1, self.giant.transformer.channels, side // GRID, side // GRID)
        return Work(_flop(lambda: net.decode(latent)), _weights(net.decoder))

    def _step(self, canvas: int, references: int, kv: bool) -> Work:
        """Count one velocity.

        References are tokens, or with kv cached keys and values.
        """
        shape, net = self.giant.transformer, self.nets.transformer
        text = self._blank(1, self.giant.variant.text_length, shape.hidden)
        heads = (1, references, shape.hidden // shape.head_dim, shape.head_dim)
        blocks = shape.double_blocks + shape.single_blocks
        kept = [(self._blank(*heads), self._blank(*heads))] * blocks if kv and references else None
        seen = self._blank(1, references, shape.hidden) if references and not kv else None
        rope = self._rope(text.shape[1] + canvas + (0 if kv else references))
        x = self._blank(1, canvas, shape.channels)
        modulations = self._modulations()
        flop = _flop(lambda: net(x, text, modulations, rope, seen, kept))
        read = _weights(net.img_in, net.double_blocks, net.single_blocks, net.final_layer.linear)
        return Work(flop, read + (2 * blocks * kept[0][0].nbytes if kept else 0))

    def _prefill(self, references: int) -> Work:
        """Count the references' keys and values for a KV model."""
        net = self.nets.transformer
        seen = self._blank(1, references, self.giant.transformer.hidden)
        flop = _flop(lambda: net.prefill(seen, self._rope(references))) - self._modulation_flop()
        return Work(flop, _weights(net.double_blocks, net.single_blocks))

    def _modulations(self) -> Modulations:
        return self.nets.transformer.modulations(self._blank(1))

    def _modulation_flop(self) -> float:
        return _flop(self._modulations)

    def _rope(self, tokens: int) -> tuple[Tensor, Tensor]:
        half = self.giant.transformer.head_dim // 2
        return torch.empty(tokens, half, device=META), torch.empty(tokens, half, device=META)

    def _blank(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=META, dtype=self.dtype)


def _tokens(side: int) -> int:
    return (side // GRID) ** 2


@torch.inference_mode()
def _flop(do: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        do()
    return counter.get_total_flops()


def _weights(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
