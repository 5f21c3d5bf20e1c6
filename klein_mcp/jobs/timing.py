"""Records how long images took here, and estimates the next one."""

import contextlib
import json
import math
from math import log
from pathlib import Path
from typing import Any

from engine.contract import Exact, Job, Native, Result
from engine.families.klein.variants import VARIANTS
from klein_mcp import atomic
from klein_mcp.private import read_private_text

HISTORY = "history.json"
"""File in the data folder: how long images took, and the model that auto took last."""

MEASUREMENTS = 32
"""Measurements per model; older ones say less about the machine as it is now."""

_MEGAPIXEL = 1024 * 1024
_SIZES = (512, 768, 1024, 1536, 2048)


class TimingHistory:
    """Seconds by model and pixels.

    They are kept in a small file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._seconds: dict[str, list[tuple[float, float]]] = {}
        self._native: dict[str, int] = {}  # pixels of an image of which nobody gave the size
        self._auto = ""  # the model that auto took last
        if path:
            with contextlib.suppress(
                OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError
            ):
                content = json.loads(read_private_text(path))
                seconds = {model: _measurements(seen) for model, seen in content["seconds"].items()}
                native = {model: int(pixels) for model, pixels in content["native"].items() if int(pixels) > 0}
                self._seconds, self._native, self._auto = seconds, native, str(content.get("auto", ""))

    def note(self, job: Job, result: Result, seconds: float) -> None:
        """Record one measurement, if it is one of the default steps."""
        if not (math.isfinite(seconds) and seconds > 0) or _share_of_steps(job, result.model) != 1:
            return
        height, width = result.image.shape[:2]
        if job.model == "auto":
            self._auto = result.model
        for model in {job.model, result.model}:  # the job may name "auto"
            if isinstance(job.size, Native) and not job.references:
                self._native[model] = width * height
            seen = self._seconds.setdefault(model, [])
            seen.append((_pixels(job, result.model, width * height), seconds))
            del seen[:-MEASUREMENTS]
        if self._path:
            with contextlib.suppress(OSError):  # a full disk costs an estimate, not the image
                atomic.atomic_write(
                    self._path, json.dumps({"seconds": self._seconds, "native": self._native, "auto": self._auto})
                )

    def seconds(self, job: Job) -> float | None:
        """Estimate the seconds of `job`.

        None for a model that has made no image here yet.
        """
        if isinstance(job.size, Exact):
            canvas = job.size.width * job.size.height
        elif job.references:
            canvas = job.references[0].shape[0] * job.references[0].shape[1]
        else:
            canvas = self._native.get(job.model, _MEGAPIXEL)
        estimate = self._estimate(job.model, _pixels(job, self._auto if job.model == "auto" else job.model, canvas))
        return (
            None
            if estimate is None
            else estimate * _share_of_steps(job, self._auto if job.model == "auto" else job.model)
        )

    def tables(self) -> dict[str, dict[str, float]]:
        """Return seconds for an image without references, by model and size."""
        return {model: self._table(model) for model, seen in self._seconds.items() if seen and model != "auto"}

    def _table(self, model: str) -> dict[str, float]:
        if side := _only_side(model):
            # The seconds are those of any image.
            return {f"{side}x{side}": _rounded(self._nearest(model, side * side)[1])}
        return {f"{side}x{side}": _rounded(self._estimate(model, side * side) or 0.0) for side in _SIZES}

    def _estimate(self, model: str, asked: float) -> float | None:
        """Scale the seconds of the nearest measurement to `asked` pixels."""
        if not self._seconds.get(model):
            return None
        known, seconds = self._nearest(model, asked)
        return seconds * asked / known

    def _nearest(self, model: str, asked: float) -> tuple[float, float]:
        """Return (pixels, seconds) of the latest of the measurements nearest in size."""
        # Rounded, so that about the same size counts as equally near and the later one wins.
        return min(reversed(self._seconds[model]), key=lambda one: round(abs(log(one[0] / asked)), 1))


def _share_of_steps(job: Job, model: str) -> float:
    """Return the job's steps as a multiple of the model's own."""
    row = VARIANTS.get(model)
    return job.steps / row.steps if job.steps and row else 1


def _rounded(seconds: float) -> float:
    """Round to a tenth, or two digits below ten.

    A small model takes some time, too.
    """
    return round(seconds, 1) if seconds >= 10 else float(f"{seconds:.2g}")


def _measurements(seen: Any) -> list[tuple[float, float]]:
    """Return (pixels, seconds) that can be divided by."""
    pairs = [(float(pixels), float(seconds)) for pixels, seconds in seen][-MEASUREMENTS:]
    return [pair for pair in pairs if all(math.isfinite(value) and value > 0 for value in pair)]


def _only_side(model: str) -> int:
    """Return the only side at which a small model computes.

    0 for a model that computes at the size that is asked for.
    """
    row = VARIANTS.get(model)
    return row.native_size if row and row.native_size < _SIZES[0] else 0


def _pixels(job: Job, model: str, canvas: int) -> int:
    """Return the pixels that the model computes and reads.

    No more than a megapixel of each reference.
    """
    if side := _only_side(model):
        return side**2 * (1 + len(job.references))
    return canvas + sum(min(image.shape[0] * image.shape[1], _MEGAPIXEL) for image in job.references)


def latest_auto(home: Path) -> str:
    """Return the model that auto took last, else ""."""
    try:
        auto = json.loads(read_private_text(home / HISTORY))["auto"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return auto if isinstance(auto, str) else ""
