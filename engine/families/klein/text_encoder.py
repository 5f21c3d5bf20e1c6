"""Encode a prompt to states [text_length, layers · hidden].

The encoder is Qwen3, cut after the last layer that is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.contract import BadWeights
from engine.diffusion.parts import Parts, result_of
from engine.families.klein.chat_tokenizer import open_tokenizer
from engine.nn.qwen3 import Qwen3, Qwen3Shape


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the encoder reads it.

    ids, mask: [1, length]. cut: number of its tokens that did not fit.
    """

    ids: Tensor
    mask: Tensor
    cut: int


class Tokenizer:
    """Tokenizer of one user turn in the chat template.

    It pads on the right to a fixed length.
    """

    def __init__(self, folder: Path, length: int) -> None:
        """Load the tokenizer of a folder.

        Raises BadWeights if the folder holds no tokenizer, or one without the chat template or a pad token.
        """
        self.length = length
        try:
            self._tokenizer = open_tokenizer(folder)
            self._pad = self._tokenizer.pad
            empty, one = self._template(""), self._template("x")
            if one == empty:
                # transformers makes a tokenizer without words if the folder lacks them; then all prompts are equal.
                raise ValueError("it knows no words: tokenizer.json, or vocab.json and merges.txt, is missing")
        except Exception as problem:  # each library below has its own
            why = " ".join(str(problem).split())
            raise BadWeights(
                f"The tokenizer in {folder} cannot be used ({why[:120]}).", hint="Download it again."
            ) from None
        # The suffix after the prompt is the end of the template, as far as it is equal for two prompts.
        agree = 0
        while agree < min(len(empty), len(one)) and empty[-1 - agree] == one[-1 - agree]:
            agree += 1
        self._tail = empty[len(empty) - agree :]

    def _template(self, prompt: str) -> list[int]:
        return self._tokenizer.ids(self._tokenizer.turn(prompt))

    def __call__(self, prompt: str) -> Prompt:
        ids = self._template(prompt)
        cut = max(0, len(ids) - self.length)
        if cut:
            # Cutting at the right, as diffusers does, would remove the assistant's turn from a long prompt.
            ids = ids[: self.length - len(self._tail)] + self._tail
        padding = self.length - len(ids)
        return Prompt(
            ids=torch.tensor([ids + [self._pad] * padding]),
            mask=torch.tensor([[1] * len(ids) + [0] * padding]),
            cut=cut,
        )


class TextEncoder(nn.Module):
    """Qwen3 up to the last layer that is read."""

    def __init__(self, config: dict[str, Any], layers: tuple[int, ...]) -> None:
        """Build the network.

        config: of the whole Qwen3. layers: 1-based numbers of the layers whose outputs are stacked.
        """
        super().__init__()
        self.shape = Qwen3Shape.from_config(config)
        self.layers = layers
        self.width = len(layers) * self.shape.hidden
        self.model = Qwen3(self.shape, max(layers))

    def finish(self, device: torch.device) -> None:
        """Build the computed buffers on `device`, after loading."""
        self.model.compute_frequencies(device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids and mask, [b, length], to states [b, length, width].

        Pad tokens get states of their own, as in training: the transformer reads all rows without a mask.
        """
        return self.read(self.embed(ids), mask)

    def in_parts(self, ids: Tensor, mask: Tensor) -> Parts[Tensor]:
        """Encode like `forward` and yield the share that is done between layers."""
        return self._read_in_parts(self.embed(ids), mask)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the table's rows for the ids.

        [b, length] -> [b, length, hidden]. The table may be in host memory, which no CUDA graph can read.
        """
        return self.model.embed_tokens(ids)

    def read(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Encode rows of the table like `forward`."""
        return result_of(self._read_in_parts(embedded, mask))

    def _read_in_parts(self, states: Tensor, mask: Tensor) -> Parts[Tensor]:
        length, model = states.shape[1], self.model
        causal = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        attended = causal & mask.bool()[:, None, None, :]
        turns, count = model.turns(states), len(model.layers)
        read: dict[int, Tensor] = {}
        for number, layer in enumerate(model.layers, start=1):
            states = layer(states, attended, turns)
            if number in self.layers:
                read[number] = model.norm(states) if number == count else states
            if number < count:
                yield number / count
        return torch.cat([read[number] for number in self.layers], dim=-1)
