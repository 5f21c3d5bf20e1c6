"""Encode a prompt to states [text_length, layers · hidden].

The encoder is transformers' Qwen3, cut after the last layer that is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RotaryEmbedding

from engine.contract import BadWeights
from engine.diffusion.parts import Parts, result_of


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
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._pad = int(self._tokenizer.pad_token_id)
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
        turn = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return self._tokenizer(text)["input_ids"]

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
    """Qwen3 up to the last layer that is read.

    It has no language model head.
    """

    def __init__(self, config: dict[str, Any], layers: tuple[int, ...]) -> None:
        """Build the network.

        config: of the whole Qwen3. layers: 1-based numbers of the layers whose outputs are stacked.
        """
        super().__init__()
        whole = Qwen3Config(**config)
        self.layers = layers
        self.width = len(layers) * whole.hidden_size
        self.config = Qwen3Config(**config)
        self.config.num_hidden_layers = max(layers)
        self.config.layer_types = (whole.layer_types or [])[: max(layers)]
        self.model = Qwen3Model(self.config)
        # transformers applies the final norm to the last layer's state; states of earlier layers have none.
        if max(layers) < whole.num_hidden_layers:
            self.model.register_module("norm", nn.Identity())

    def finish(self, device: torch.device) -> None:
        """Build the computed buffers on `device`, after loading."""
        self.model.rotary_emb = Qwen3RotaryEmbedding(config=self.config).to(device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids and mask, [b, length], to states [b, length, width].

        Pad tokens get states of their own, as in training: the transformer reads all rows without a mask.
        """
        return result_of(self.in_parts(ids, mask))

    def in_parts(self, ids: Tensor, mask: Tensor) -> Parts[Tensor]:
        """Encode like `forward` and yield the share that is done between layers."""
        length, model = ids.shape[1], self.model
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        # transformers would ask the device whether there are pad tokens, which waits and makes two code paths.
        attended = causal & mask.bool()[:, None, None, :]
        states, positions = model.embed_tokens(ids), torch.arange(length, device=ids.device)[None]
        turns, count = model.rotary_emb(states, positions), len(model.layers)
        read: dict[int, Tensor] = {}
        for number, layer in enumerate(model.layers, start=1):
            states = layer(states, attention_mask=attended, position_embeddings=turns, position_ids=positions)
            if number in self.layers:
                read[number] = model.norm(states) if number == count else states
            if number < count:
                yield number / count
        return torch.cat([read[number] for number in self.layers], dim=-1)
