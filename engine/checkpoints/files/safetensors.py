"""What a safetensors file says about itself: its tensors' names, formats, shapes and places; none of them is read."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engine.contract import BadWeights

Shape = tuple[int, ...]

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip
"""Bits of an element, by the format's name in a header. Source: the safetensors crate."""

_LONGEST = 100_000_000
"""Bytes of a header. Source: the safetensors crate's own limit."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file. name: as written there. begin, end: bytes from the start of the file."""

    file: Path
    name: str
    format: str
    shape: Shape
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """Everything a file says before its first tensor."""

    file: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> "Header":
        """Raises BadWeights, with the reason, for anything but whole safetensors."""
        try:
            return _read(file, file.stat().st_size)
        except PermissionError:
            raise BadWeights(
                f"{file} may not be read by this user.", hint="Change its permissions (chmod u+r) or its owner."
            ) from None
        except OSError as problem:
            raise BadWeights(f"{file} cannot be read: {problem.strerror}.", hint="Download it again.") from None


def _read(file: Path, size: int) -> Header:
    with file.open("rb") as stream:
        start = stream.read(8)
        if stranger := _by_magic(start):
            raise BadWeights(f"{file.name} is {stranger}.", hint="Get the model as safetensors.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _LONGEST or 8 + length > size:
            raise _broken(file, size, "its header is cut short or is none")
        text = stream.read(length)
    try:
        said = json.loads(text)
        metadata = said.pop("__metadata__", {})
        entries = {name: _entry(file, name, entry, 8 + length) for name, entry in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise _broken(file, size, f"its header makes no sense ({problem})") from None
    at = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: entry.begin):
        if entry.begin != at or entry.bytes * 8 != math.prod(entry.shape) * BITS[entry.format]:
            raise _broken(file, size, f"{entry.name} does not lie where its header says")
        at = entry.end
    if at != size:
        raise _broken(file, size, f"{at:,} bytes are named in its header")
    return Header(file, entries, metadata)


def _entry(file: Path, name: str, said: dict, base: int) -> Entry:
    begin, end = said["data_offsets"]
    if said["dtype"] not in BITS:
        raise ValueError(f"{name} is {said['dtype']}")
    return Entry(file, name, said["dtype"], tuple(said["shape"]), base + int(begin), base + int(end))


def _broken(file: Path, size: int, why: str) -> BadWeights:
    return BadWeights(
        f"{file.name} ({size:,} bytes) is not a whole safetensors file: {why}.", hint="Download it again."
    )


def _by_magic(start: bytes) -> str:
    if start.startswith(b"GGUF"):
        return "a GGUF file, which is not read yet"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return "a pickle, which could run code; only safetensors are read"
    if start.startswith(b"version "):
        return "a pointer of git-lfs, without the weights it points to"
    return ""


# What only one architecture has. First match wins; a key is part of a name, without what repackers put in front.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("LoRA", (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lokr_w", ".hada_w")),
    ("transformer", ("double_stream_modulation_img.lin",)),  # both layouts: `.lin.` and `.linear.`
    ("text encoder", ("layers.0.self_attn.q_norm.weight",)),
    ("autoencoder", ("decoder.post_quant_conv.weight", "post_quant_conv.weight")),
    ("an SDXL or SD checkpoint", ("model.diffusion_model.input_blocks.", "down_blocks.0.attentions.", "conditioner.")),
    ("a FLUX.1 model", ("double_blocks.0.img_mod.lin", "transformer_blocks.0.norm1.linear", "time_text_embed.")),
    ("a text encoder of another family", ("encoder.block.0.layer.0.SelfAttention", "text_model.encoder.layers.")),
)

PARTS = ("transformer", "autoencoder", "text encoder")


def kind(header: Header) -> str:
    """A part of klein, "LoRA", or what else the tensors' names tell; "" for nothing we know."""
    names = header.entries.keys()
    if any(name.endswith((".diff", ".diff_b", ".lora_A", ".lora_B")) for name in names):
        return "LoRA"
    found = next((kind for kind, signs in _SIGNS if any(sign in name for sign in signs for name in names)), "")
    # SD's autoencoders have the same names; only FLUX.2's keeps its latents' statistics.
    if found == "autoencoder" and "bn.running_mean" not in names:
        return "an autoencoder of another family"
    return found


def expect(header: Header, part: str) -> None:
    """Raises BadWeights for a file whose names tell that it is something else than `part`."""
    if (found := kind(header)) not in (part, ""):
        raise BadWeights(f"{header.file.name} is {_a(found)}, not a klein {part}.")


def _a(kind: str) -> str:
    if kind == "LoRA":
        return "a LoRA, which changes a model and is none (give it with --lora)"
    return kind if kind.startswith(("a ", "an ")) else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def kind_of(file: Path) -> str:
    """`kind` of a file; "" for one that cannot be read. Remembered until the file changes."""
    try:
        status = file.stat()
        return _kind_of(file, status.st_size, status.st_mtime_ns)
    except OSError:
        return ""


@lru_cache(maxsize=4096)
def _kind_of(file: Path, size: int, changed: int) -> str:
    try:
        return kind(Header.read(file))
    except BadWeights:
        return ""


def storage(header: Header) -> str:
    """How the weights of a transformer are stored: bf16 (or any full format), fp8, nvfp4."""
    formats = {entry.format for entry in header.entries.values() if len(entry.shape) == 2}
    return "nvfp4" if "U8" in formats else "fp8" if formats & {"F8_E4M3", "F8_E5M2"} else "bf16"
