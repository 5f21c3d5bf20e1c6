"""Makes every known word one token of a folder's tokenizer.

`python -m engine.nano.training.tokenizer FOLDER` does so for a nano of the folder's nouns that shall learn what the
training's sentences have gained since, and says in its klein.json that it knows them.

A word that is one token is learned from each sentence it occurs in, not pieced together first. Old tokens keep their
numbers, so weights trained before go on knowing what they knew.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engine.nano.training import metadata
from engine.nano.training.folder import load_extras
from engine.nano.words import NOUNS, known

_SPACE = "Ġ"
"""How byte-level BPE writes the space that belongs to a word."""


def _forms(nouns: int) -> list[str]:
    """Return the words as they occur in sentences.

    Inside, at the start, and at the start with a capital. Nouns follow an article.
    """
    words = known(nouns)
    inside = [f" {word}" for word in sorted(words)]
    first = [form for word in sorted(words - {*NOUNS}) for form in (word, word.capitalize())]
    return inside + first


def extend(folder: Path, nouns: int = len(NOUNS)) -> int:
    """Add missing words to tokenizer and text encoder.

    nouns: of the world whose words they are. Returns the number of tokens added.
    """
    path = folder / "tokenizer" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = settings["padding"] = None
    vocabulary, merges = settings["model"]["vocab"], settings["model"]["merges"]
    before = Tokenizer.from_str(json.dumps(settings))
    embedding = _embedding(folder)
    rows = {token: embedding[i] for token, i in sorted(vocabulary.items(), key=lambda pair: pair[1])}
    old = len(rows)
    for form in _forms(nouns):
        if len(before.encode(form, add_special_tokens=False).tokens) == 1:
            continue
        # Made anew for each form: an earlier one may have brought some of its pieces together.
        tokens = Tokenizer.from_str(json.dumps(settings)).encode(form, add_special_tokens=False).tokens
        # A word at the start of a sentence begins as the same word inside one; any other as the mean of its pieces.
        inside = rows.get(_SPACE + form.strip().lower())
        while len(tokens) > 1:
            first, second, *rest = tokens
            merges.append([first, second])
            if first + second not in rows:
                mean = (rows[first] + rows[second]) / 2
                rows[first + second] = mean if rest or inside is None else inside
                vocabulary[first + second] = max(vocabulary.values()) + 1
            tokens = [first + second, *rest]
    # The library numbers special tokens after all others, whatever the file says.
    settings["model"]["vocab"] = {token: i for i, token in enumerate(rows)}
    added = len(rows) - old
    for i, token in enumerate(settings["added_tokens"]):
        rows[token["content"]] = embedding[before.token_to_id(token["content"])]
        token["id"] = old + added + i
    path.write_text(json.dumps(settings, ensure_ascii=False))
    _save_embedding(folder, torch.stack(list(rows.values())))
    return added


def _embedding(folder: Path) -> torch.Tensor:
    return load_file(folder / "text_encoder" / "model.safetensors")["model.embed_tokens.weight"].float()


def _save_embedding(folder: Path, rows: torch.Tensor) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = rows.half()
    save_file(tensors, path, metadata={"format": "pt"})
    config_path = folder / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config["vocab_size"] = len(rows)
    config_path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    chosen = Path(sys.argv[1])
    print("tokens added:", extend(chosen, len(load_extras(chosen)["nouns"])))
    metadata.write(chosen)
