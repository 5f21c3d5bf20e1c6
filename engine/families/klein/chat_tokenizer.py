"""A model's tokenizer and chat template.

Read with the libraries below transformers, which takes 2 s of processor time to import. It opens what these cannot.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

Template = Callable[..., str]

OPTIONS = {"add_generation_prompt": True, "enable_thinking": False}
"""Options of the template. Source: diffusers' Flux2KleinPipeline."""


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """Functions of a tokenizer.

    turn: prompt -> text of one user turn. ids: text -> ids, with special tokens recognised. pad: id of the pad token.
    """

    turn: Callable[[str], str]
    ids: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    pad: int


def open_tokenizer(folder: Path) -> ChatTokenizer:
    """Open the tokenizer of a folder.

    Raises whatever transformers raises for a folder that it cannot read.
    """
    return _from_file(folder) or _from_transformers(folder)


def _from_file(folder: Path) -> ChatTokenizer | None:
    """Open tokenizer.json, None if the folder needs transformers."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = folder / "chat_template.jinja"
        source = template.read_text(encoding="utf-8-sig") if template.is_file() else config["chat_template"]
        # transformers' settings. Its other extensions serve tools and training.
        compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
        added = [_text(token) for token in config.get("added_tokens_decoder", {}).values()]
        pad = tokenizer.token_to_id(_text(config["pad_token"]))
        if pad is None or any(tokenizer.token_to_id(token) is None for token in added):
            return None

        def turn(prompt: str) -> str:
            return compiled.render(messages=[{"role": "user", "content": prompt}], **OPTIONS)

        turn("x")
    except Exception:  # three libraries' own, some of which derive from nothing narrower
        return None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return ChatTokenizer(
        turn,
        lambda text: tokenizer.encode(text).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        pad,
    )


def _text(token: Any) -> str:
    """Return the text of a token, given bare or with its options."""
    return token["content"] if isinstance(token, dict) else token


def _from_transformers(folder: Path) -> ChatTokenizer:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def turn(prompt: str) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, **OPTIONS)

    return ChatTokenizer(turn, lambda text: tokenizer(text)["input_ids"], tokenizer.decode, int(tokenizer.pad_token_id))
