"""Makes every known word one token of a folder's tokenizer.

python -m engine.nano.training.tokenizer FOLDER

A word that is one token is learned from each sentence it occurs in, not pieced together first. Old tokens keep their
numbers, so weights trained before go on knowing what they knew.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engine.nano.training.metadata import vocabulary
from engine.nano.training.model import TEXT_LENGTH
from engine.nano.words import KNOWN, NOUNS

_SPACE = "Ġ"
"""How byte-level BPE writes the space that belongs to a word."""


def _forms() -> list[str]:
    """Return the words as they occur in sentences.

    Inside, at the start, and at the start with a capital. Nouns follow an article.
    """
    inside = [f" {word}" for word in sorted(KNOWN)]
    first = [form for word in sorted(KNOWN - {*NOUNS}) for form in (word, word.capitalize())]
    return inside + first


def extend(folder: Path) -> int:
    """Add missing words to tokenizer and text encoder.

    Returns the number of tokens added.
    """
    path = folder / "tokenizer" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = settings["padding"] = None
    vocabulary, merges = settings["model"]["vocab"], settings["model"]["merges"]
    old = len(vocabulary) + len(settings["added_tokens"])
    ancestors: list[list[int]] = []
    for form in _forms():
        tokens = Tokenizer.from_str(json.dumps(settings)).encode(form, add_special_tokens=False).tokens
        # A word at the start of a sentence begins as the same word inside one; any other as the mean of its pieces.
        inside = vocabulary.get(_SPACE + form.strip().lower())
        while len(tokens) > 1:
            first, second, *rest = tokens
            merges.append([first, second])
            if first + second not in vocabulary:
                pieces = [vocabulary[first], vocabulary[second]]
                vocabulary[first + second] = old + len(ancestors)
                ancestors.append(pieces if rest or inside is None else [inside])
            tokens = [first + second, *rest]
    path.write_text(json.dumps(settings, ensure_ascii=False))
    _grow(folder, old, ancestors)
    return len(ancestors)


def _grow(folder: Path, old: int, ancestors: list[list[int]]) -> None:
    """Add an embedding row a new token, the mean of its ancestors'."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    rows = list(tensors["model.embed_tokens.weight"][:old].float())
    for parents in ancestors:
        rows.append(torch.stack([rows[i] for i in parents]).mean(0))
    tensors["model.embed_tokens.weight"] = torch.stack(rows).half()
    save_file(tensors, path, metadata={"format": "pt"})
    config_path = folder / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config["vocab_size"] = len(rows)
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    klein_path = folder / "klein.json"
    extras = json.loads(klein_path.read_text()) | {"text_length": TEXT_LENGTH, **vocabulary()}
    klein_path.write_text(json.dumps(extras) + "\n")


if __name__ == "__main__":
    print(extend(Path(sys.argv[1])), "tokens added")
