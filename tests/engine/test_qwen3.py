"""Tests Qwen3 beside transformers' own, on weights of its own making."""

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from engine.nn.qwen3 import Qwen3, Qwen3Shape

CONFIG: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_states_are_those_of_transformers_bit_for_bit(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    theirs: Any = Qwen3Model(Qwen3Config(**CONFIG, attention_bias=bias)).eval()
    theirs.to(dtype)
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    theirs.rotary_emb = Qwen3RotaryEmbedding(theirs.config)  # `to` rounded its frequencies; `from_pretrained` does not
    ours = Qwen3(Qwen3Shape.from_config(theirs.config.to_dict())).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    ours.compute_frequencies(torch.device("cpu"))
    ids, mask = torch.randint(0, 50, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    attended = torch.ones(12, 12, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    with torch.inference_mode():
        states = ours.embed_tokens(ids)
        turns = ours.turns(states)
        for layer in ours.layers:
            states = layer(states, attended, turns)
        states = ours.norm(states)
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(states, expected)


def test_base_of_the_rotary_positions_is_read_from_either_form() -> None:
    without = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}
    assert Qwen3Shape.from_config(without | {"rope_theta": 1e6}).theta == 1e6
    assert Qwen3Shape.from_config(CONFIG | {"rope_theta": 1e6}).theta == 5000
    default: Any = Qwen3Config().rope_parameters
    assert Qwen3Shape.from_config(without | {"rope_scaling": None}).theta == default["rope_theta"]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"num_attention_heads": "two"},
        {"num_attention_heads": 5},
        {"vocab_size": -1},
    ],
)
def test_what_it_does_not_compute_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rotary positions with|num_attention_heads|vocab_size"):
        Qwen3Shape.from_config(CONFIG | change)
