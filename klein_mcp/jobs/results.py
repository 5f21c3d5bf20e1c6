"""Results of a job.

Images in the library, or a job that goes on without its caller.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.contract import CacheUse


@dataclass(frozen=True, slots=True)
class Preview:
    """A small encoded image.

    base64: text, as every protocol that carries it wants it.
    """

    base64: str
    mime: str

    @classmethod
    def encode(cls, data: bytes, mime: str) -> "Preview":
        return cls(base64.b64encode(data).decode(), mime)

    @property
    def data(self) -> bytes:
        return base64.b64decode(self.base64)


@dataclass(frozen=True, slots=True)
class SavedImage:
    """An image that was made and is in the library under `handle`.

    changed: of an edit at its own size, `VisibleChange` as JSON: share, box, kept.
    alpha: of a transparent image, `AlphaChecks` as JSON. viewed_on: the name of the colour that previews show it on.
    read_as: the prompt as a small model read it, "" where that is how it came.
    painted: long edge of what was computed, where the file is enlarged from it and keeps no other detail; else 0.
    dtype, mode: number format and execution mode; "" where the engine did not say.
    """

    handle: str
    seed: int
    width: int
    height: int
    model: str
    fingerprint: str
    steps: int
    guidance: float
    dtype: str = ""
    mode: str = ""
    cache: Mapping[str, CacheUse] = field(default_factory=dict)
    changed: Mapping[str, Any] | None = None
    alpha: Mapping[str, Any] | None = None
    viewed_on: str = ""
    read_as: str = ""
    painted: int = 0
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SavedImage":
        return cls(**{**data, "seed": int(data["seed"]), "warnings": tuple(data["warnings"])})


@dataclass(frozen=True, slots=True)
class JobResult:
    """Everything a finished call returns.

    ms: by stage. preview: one image, or a sheet of several.
    """

    images: tuple[SavedImage, ...]
    warnings: tuple[str, ...]
    ms: Mapping[str, float]
    preview: Preview | None = None


@dataclass(frozen=True, slots=True)
class PendingJob:
    """A job that goes on without its caller.

    progress: 0 … 1. eta_s: seconds, None while unknown.
    """

    job: str
    state: str
    progress: float
    message: str
    eta_s: float | None
    warnings: tuple[str, ...] = ()
