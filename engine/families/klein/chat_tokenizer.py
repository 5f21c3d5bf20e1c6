"""A model's tokenizer and chat template.

Read with the libraries below transformers, which takes 2 s of processor time to import. It opens what these cannot.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

Template = Callable[..., str]

OPTIONS = {"tools": None, "documents": None, "add_generation_prompt": True, "enable_thinking": False}
"""Options of the template. Source: diffusers' Flux2KleinPipeline.

Templates ask whether there are tools: transformers' are None, not undefined.
"""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")
"""Lists of a config. Some configs have a mapping there, of which only transformers makes sense."""
_OLD_FILES = ("added_tokens.json", "special_tokens_map.json")
"""Files that transformers reads beside a config without added_tokens_decoder."""


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
    for file in folder.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ValueError(f"{file.name} is no regular file")  # reading a pipe would wait
    return _from_file(folder) or _from_transformers(folder)


def _from_file(folder: Path) -> ChatTokenizer | None:
    """Open tokenizer.json, None if the folder needs transformers."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = _compile(folder, config)
        special = {name: _text(config[name]) for name in _SPECIAL if config.get(name)}
        pad = tokenizer.token_to_id(special["pad_token"])
        if pad is None or not _is_whole(folder, config, tokenizer):
            return None

        def turn(prompt: str) -> str:
            return template(messages=[{"role": "user", "content": prompt}], **special, **OPTIONS)

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


def _compile(folder: Path, config: Mapping[str, Any]) -> Template:
    """Compile the chat template with transformers' settings."""
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8-sig") if file.is_file() else config["chat_template"]
    # transformers' extensions serve tools and training.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own escapes HTML
    return environment.from_string(source).render


def _is_whole(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Return whether tokenizer.json has every added token.

    transformers adds to it those that are named elsewhere.
    """
    if "added_tokens_decoder" not in config and any((folder / name).is_file() for name in _OLD_FILES):
        return False
    named = [config[name] for name in _SPECIAL if config.get(name)]
    named += config.get("added_tokens_decoder", {}).values()
    for name in _MORE_SPECIAL:
        named += config.get(name) or ()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return added.issuperset(_text(token) for token in named)


def _text(token: Any) -> str:
    """Return the text of a token, given bare or with its options."""
    return token["content"] if isinstance(token, dict) else token


def _from_transformers(folder: Path) -> ChatTokenizer:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def turn(prompt: str) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, **OPTIONS)

    return ChatTokenizer(turn, lambda text: tokenizer(text)["input_ids"], tokenizer.decode, int(tokenizer.pad_token_id))
