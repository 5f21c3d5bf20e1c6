"""VARIANTS: one row per model, with all that differs between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

APACHE = "Apache-2.0"
NON_COMMERCIAL = "FLUX Non-Commercial"


FULL, FP8, NVFP4 = "bf16", "fp8", "nvfp4"


@dataclass(frozen=True, slots=True)
class File:
    """One published single file.

    bytes: exact where it is known, else 0. sha256: its first characters, where known.
    """

    repo: str
    name: str
    format: str = FULL
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model and the settings it was made for.

    kv: references see references only, at timestep 0, so that their keys and values can be kept.
    guidance: 1.0 means one pass a step; above 1.0 a second, unconditional pass steers the first.
    native_size: the square side, in pixels, that is painted when no size is asked for.
    max_size: the square side whose area is the most it paints by itself; larger images are resampled from it.
    least_size: the square side whose area smaller images and references are enlarged to; 0 for a model of all sizes.
    reference_size: the square side whose area a reference is shrunk to if it is larger.
    squares: whether squares are all that it practised.
    pixels_per_token: image pixels on each side that a token stands for, as its autoencoder has it.
    words: all that its prompts may hold; empty for a model that knows more than could be listed.
    nouns: those of the words that name a thing, each with the colours it is always painted in.
    shapes, colours: those of the words that name a thing of any colour, and the colours.
    text_length, text_layers: tokens the prompt is padded to; the Qwen3 layers whose states are stacked.
    hidden: the transformer's width, which tells a 4B from a 9B. files: the published single files.
    memory_gb: weights that are read, in bf16, plus about 2 GB of working memory at 1024 x 1024.
    Source of the rows: the model cards and diffusers' pipelines; sizes by the published files.
    """

    name: str
    title: str
    licence: str
    repo: str = ""
    gated: bool = False
    steps: int = 4
    guidance: float = 1.0
    kv: bool = False
    native_size: int = 1024
    max_size: int = 2048
    least_size: int = 0
    reference_size: int = 1024
    max_references: int = 4
    squares: bool = False
    pixels_per_token: int = 16
    text_length: int = 512
    text_layers: tuple[int, ...] = (9, 18, 27)
    words: frozenset[str] = frozenset()
    nouns: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    shapes: frozenset[str] = frozenset()
    colours: frozenset[str] = frozenset()
    memory_gb: float = 0.0
    hidden: int = 0
    files: tuple[File, ...] = ()

    @property
    def distilled(self) -> bool:
        """Whether it was trained to need no guidance."""
        return self.guidance <= 1.0


_REPO = "black-forest-labs/FLUX.2-"
_BASE = {"steps": 50, "guidance": 4.0}
_4B = {"licence": APACHE, "memory_gb": 15.5, "hidden": 3072}
_9B = {"licence": NON_COMMERCIAL, "gated": True, "memory_gb": 31.0, "hidden": 4096}

VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        Variant(
            name="nano",
            title="the embedded demo model",
            licence=APACHE,
            native_size=256,
            max_size=256,
            least_size=256,
            reference_size=256,
            max_references=4,
            squares=True,
            pixels_per_token=32,
            text_length=64,
            kv=True,
            text_layers=(1, 2, 3),
            memory_gb=0.1,
        ),
        Variant(
            name="klein-4b",
            title="FLUX.2 [klein] 4B",
            repo=_REPO + "klein-4B",
            files=(
                File(_REPO + "klein-4B", "flux-2-klein-4b.safetensors", FULL, 7_751_105_712, "ec3d4e73"),
                File(_REPO + "klein-4b-fp8", "flux-2-klein-4b-fp8.safetensors", FP8, 4_070_624_520, "97ed34fe"),
                File(_REPO + "klein-4b-nvfp4", "flux-2-klein-4b-nvfp4.safetensors", NVFP4, 2_460_413_488, "d8c5007b"),
            ),
            **_4B,
        ),
        Variant(
            name="klein-base-4b",
            title="FLUX.2 [klein] base 4B",
            repo=_REPO + "klein-base-4B",
            files=(
                File(_REPO + "klein-base-4B", "flux-2-klein-base-4b.safetensors", FULL, 7_751_105_712, "9c5fed22"),
                File(
                    _REPO + "klein-base-4b-fp8", "flux-2-klein-base-4b-fp8.safetensors", FP8, 4_089_498_488, "44bab3a8"
                ),
                File(_REPO + "klein-base-4b-nvfp4", "flux-2-klein-base-4b-nvfp4.safetensors", NVFP4),
            ),
            **_4B,
            **_BASE,
        ),
        Variant(
            name="klein-9b",
            title="FLUX.2 [klein] 9B",
            repo=_REPO + "klein-9B",
            files=(
                File(_REPO + "klein-9B", "flux-2-klein-9b.safetensors", FULL, 18_157_185_168, "0975d6b7"),
                File(_REPO + "klein-9b-fp8", "flux-2-klein-9b-fp8.safetensors", FP8, 9_433_061_528, "865ba09f"),
                File(_REPO + "klein-9b-nvfp4", "flux-2-klein-9b-nvfp4.safetensors", NVFP4),
            ),
            **_9B,
        ),
        Variant(
            name="klein-base-9b",
            title="FLUX.2 [klein] base 9B",
            repo=_REPO + "klein-base-9B",
            files=(
                File(_REPO + "klein-base-9B", "flux-2-klein-base-9b.safetensors", FULL, 18_157_185_168, "4a54fad7"),
                File(
                    _REPO + "klein-base-9b-fp8", "flux-2-klein-base-9b-fp8.safetensors", FP8, 9_567_278_472, "a9f5028c"
                ),
                File(_REPO + "klein-base-9b-nvfp4", "flux-2-klein-base-9b-nvfp4.safetensors", NVFP4),
            ),
            **_9B,
            **_BASE,
        ),
        Variant(
            name="klein-9b-kv",
            title="FLUX.2 [klein] 9B KV",
            repo=_REPO + "klein-9b-kv",
            kv=True,
            files=(
                File(_REPO + "klein-9b-kv", "flux-2-klein-9b-kv.safetensors", FULL, 18_157_185_168, "cbf07a8a"),
                File(_REPO + "klein-9b-kv-fp8", "flux-2-klein-9b-kv-fp8.safetensors", FP8, sha256="33f7da56"),
            ),
            **_9B,
        ),
    )
}

EMBEDDED = "nano"
"""The variant that is inside the package."""

AUTO_ORDER = ("klein-9b-kv", "klein-9b", "klein-4b")
"""Order in which `auto` prefers variants. Base variants are slow and for fine-tuning: used only when named."""

SMALL_DECODER = File(_REPO + "small-decoder", "full_encoder_small_decoder.safetensors")
"""A distilled autoencoder for every klein: 1.4 times as fast and small as the full one. Apache-2.0."""
