"""VARIANTS: one frozen row per model. Whatever differs between two kleins is said here and nowhere else."""

from dataclasses import dataclass

APACHE = "Apache-2.0"
NON_COMMERCIAL = "FLUX Non-Commercial"


@dataclass(frozen=True, slots=True)
class Variant:
    """What a model was made for.

    kv: references see references only, at timestep 0, so that their keys and values can be kept.
    guidance: 1.0 means one pass a step; above 1.0 a second, unconditional pass steers the first.
    native_size: the square side, in pixels, that is painted when no size is asked for.
    max_size: the square side whose area is the most it paints by itself; larger pictures are resampled from it.
    reference_size: the square side whose area a reference is shrunk to if it is larger.
    text_length, text_layers: tokens the prompt is padded to; the Qwen3 layers whose states are stacked.
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
    reference_size: int = 1024
    max_references: int = 4
    text_length: int = 512
    text_layers: tuple[int, ...] = (9, 18, 27)
    memory_gb: float = 0.0

    @property
    def distilled(self) -> bool:
        """Whether it was trained to need no guidance."""
        return self.guidance <= 1.0


_BASE = {"steps": 50, "guidance": 4.0}
_GATED = {"licence": NON_COMMERCIAL, "gated": True, "memory_gb": 31.0}
_REPO = "black-forest-labs/FLUX.2-"

VARIANTS: dict[str, Variant] = {
    row.name: row
    for row in (
        Variant(
            name="nano",
            title="the embedded demo model",
            licence=APACHE,
            native_size=128,
            max_size=128,
            reference_size=128,
            max_references=2,
            text_length=24,
            text_layers=(1, 2, 3),
            memory_gb=0.1,
        ),
        Variant("klein-4b", "FLUX.2 [klein] 4B", APACHE, _REPO + "klein-4B", memory_gb=15.5),
        Variant("klein-base-4b", "FLUX.2 [klein] base 4B", APACHE, _REPO + "klein-base-4B", memory_gb=15.5, **_BASE),
        Variant("klein-9b", "FLUX.2 [klein] 9B", repo=_REPO + "klein-9B", **_GATED),
        Variant("klein-base-9b", "FLUX.2 [klein] base 9B", repo=_REPO + "klein-base-9B", **_GATED, **_BASE),
        Variant("klein-9b-kv", "FLUX.2 [klein] 9B KV", repo=_REPO + "klein-9b-kv", kv=True, **_GATED),
    )
}

EMBEDDED = "nano"
"""The variant that is inside the package."""
