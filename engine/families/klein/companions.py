"""Companions of a single file, ranked: text encoder, autoencoder, tokenizer.

A candidate suits a transformer by its shapes. Of several, those in the file itself come first, then a diffusers
folder's own part beside it, then published ones before fine-tunes, then the smallest that is stored at least as
finely as the transformer: a coarser encoder would cost quality, a finer one memory for nothing. Those in a format
that is not read come last.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints import quant
from engine.checkpoints.files import Header, Shape, read_header
from engine.contract import BadWeights
from engine.families.klein import signatures
from engine.families.klein.folder import is_another_model, read_json, weights_files
from engine.families.klein.key_maps import autoencoder_name, encoder_name, transformer_name
from engine.families.klein.variants import Variant

COMFYUI_FOLDERS = ("vae", "text_encoders", "clip", "diffusion_models")
"""Folders of ComfyUI beside the one that holds transformers."""

_PUBLISHED = {
    signatures.TEXT_ENCODER: re.compile(
        r"qwen[-_]?3[-_](?:4b|8b)(?:[-_.](?:fp8\w*|fp4\w*|bf16|f16|(?:ud[-_])?i?q\d\w*))*", re.IGNORECASE
    ),
    signatures.AUTOENCODER: re.compile(r"(?:flux[-_.]?2[-_]vae|ae|full_encoder_small_decoder).*", re.IGNORECASE),
}
"""Names under which companions are published; a fine-tune has another."""


_ALIKE = 0.5
"""Bits a weight by which formats of one fineness differ: fp8 has 8.0 without scales, 8.001 with, Q8_0 8.5."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A candidate: a folder or file.

    bits: that a weight is stored in, 0 in a format that is not read.
    """

    path: Path
    component: str
    bits: float

    @property
    def is_published(self) -> bool:
        """Whether its name is one that companions are published under."""
        return self.path.is_dir() or _PUBLISHED[self.component].fullmatch(self.path.stem) is not None


@dataclass(frozen=True, slots=True)
class Needs:
    """The needs of a transformer, by its shapes.

    context: the width of the states it reads."""

    file: Path
    variant: Variant
    context: int
    channels: int
    bits: float

    @classmethod
    def of(cls, file: Path, variant: Variant) -> "Needs":
        """Read them from the shapes of the transformer in `file`."""
        tensors = shapes(file, transformer_name)
        named = {name: tensors[name] for name in tensors if len(tensors[name]) == 2}
        context = next((named[n][1] for n in ("txt_in.weight", "context_embedder.weight") if n in named), 0)
        channels = next((named[n][1] for n in ("img_in.weight", "x_embedder.weight") if n in named), 0)
        return cls(file, variant, context, channels, stored_format(read_header(file))[1])

    def suits_encoder(self, path: Path) -> bool:
        """Return whether a text encoder has the width and depth needed."""
        layers = self.variant.text_layers
        width, depth = encoder_size(path)
        return len(layers) * width == self.context and depth >= max(layers)

    def suits_autoencoder(self, path: Path) -> bool:
        """Return whether an autoencoder's tokens are this transformer's.

        They have as many channels, and stand for as many pixels.
        """
        found = autoencoder_shapes(path)
        channels = 4 * found.get("decoder.post_quant_conv.weight", (0,))[0]
        return channels == self.channels and pixels_per_token(found) == self.variant.pixels_per_token

    def rank(self, companion: Companion) -> tuple[bool, int, bool, bool, float, str]:
        """Return a sort key, the best first."""
        unreadable = companion.bits == 0
        inside = companion.path == self.file
        own_part = companion.path.parent == self.file.parent and companion.path.is_dir()
        coarser = companion.bits < min(self.bits, 16.0) - _ALIKE
        size = -companion.bits if coarser else companion.bits
        place = 0 if inside else 1 if own_part else 2
        return (unreadable, place, not companion.is_published, coarser, size, companion.path.name)


def candidates(home: Path, component: str) -> Iterator[Companion]:
    """Yield the text encoders or autoencoders in a folder or file."""
    part = {signatures.TEXT_ENCODER: "text_encoder", signatures.AUTOENCODER: "vae"}[component]
    if (home / part / "config.json").is_file():
        first = min((home / part).glob("*.safetensors"), default=None)
        yield Companion(home / part, component, _bits(first) if first else 0.0)
    for file in weights_files(home):
        if component in signatures.components_of(file):
            yield Companion(file, component, _bits(file))


def tokenizers(home: Path) -> Iterator[Path]:
    """Yield a folder's tokenizer, unless it is another model's."""
    if (home / "tokenizer").is_dir() and not is_another_model(home):
        yield home / "tokenizer"


def stored_format(header: Header) -> tuple[str, float]:
    """Return a file's format and bits a weight, "bf16" for plain."""
    try:
        label, bits = _format(header)
    except BadWeights:
        label, bits = "", 16.0
    return label or "bf16", bits


def _format(header: Header) -> tuple[str, float]:
    markers = quant.declared_markers(header.metadata)
    quantised, _ = quant.quantised_weights(header.entries, markers, lambda entry: b"{}")
    return quant.storage(quantised)


def _bits(file: Path) -> float:
    """Return a file's bits a weight, 0.0 if it cannot be read."""
    try:
        return _format(read_header(file))[1]
    except BadWeights:
        return 0.0


def shapes(path: Path, rename: Callable[[str], str]) -> dict[str, Shape]:
    """Return the shapes in a file or folder by our names."""
    files: Iterable[Path] = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found: dict[str, Shape] = {}
    for file in files:
        try:
            entries = read_header(file).entries
        except BadWeights:
            continue
        found |= {rename(name): entry.shape for name, entry in entries.items()}
    found.pop("", None)
    return found


def encoder_size(path: Path) -> tuple[int, int]:
    """Return width and layers of a text encoder, or zeros."""
    if path.is_dir():
        try:
            config = read_json(path / "config.json")
            return int(config.get("hidden_size", 0)), int(config.get("num_hidden_layers", 0))
        except (BadWeights, TypeError, ValueError):
            return 0, 0
    tensors = shapes(path, encoder_name)
    # A norm: its length is the width whatever the matrices are packed in.
    width = tensors.get("model.layers.0.input_layernorm.weight", (0,))[0]
    numbers = (re.match(r"model\.layers\.(\d{1,4})\.", name) for name in tensors)
    return width, 1 + max((int(found[1]) for found in numbers if found), default=-1)


def autoencoder_shapes(path: Path) -> dict[str, Shape]:
    """Return the shapes in an autoencoder."""
    return shapes(path, autoencoder_name)


_LEVEL = re.compile(r"encoder\.down(?:_blocks)?\.(\d{1,2})\.")


def pixels_per_token(autoencoder: dict[str, Shape]) -> int:
    """Return the pixels of a token on each side, by `autoencoder_shapes`."""
    numbers = (_LEVEL.match(name) for name in autoencoder)
    return 2 ** (1 + max((int(found[1]) for found in numbers if found), default=-1))


def has_small_decoder(path: Path) -> bool:
    """Return whether an autoencoder's decoder is narrower than its encoder."""
    found = autoencoder_shapes(path)
    return found.get("decoder.conv_in.weight", (0,))[0] < found.get("encoder.conv_out.weight", (0, 0))[1]
