"""The one request behind every front end, and its three builders."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from engine.contract import GRID, MAX_SEED, Aspect, Exact, KeepSource, Mode, Native, Size
from klein_mcp.errors import RequestError
from klein_mcp.foreign import well_formed
from klein_mcp.limits import EXACT, MAX_AREA

Preserve = Literal["auto", "off"]
"""Whether an edit puts the original's pixels back where it changed nothing."""
Background = Literal["auto", "transparent"]
"""transparent: the image is cut out, and the cut-out measured."""
Region = tuple[int, int, int, int]
"""x, y, width, height in pixels."""

UNPAINTED = "none"
"""The recorded model of an image that was cut out without painting, so that there was no seed."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One to four images of one kind.

    images, mask: references as the caller wrote them; library handles once they are resolved.
    seed: of the first image; image k is made with seed + k.
    steps, guidance: None for what the model was made for.
    preserve: of an edit at its own size.
    background: whether the image is to be transparent.
    partials: how many steps also report the image they head for; part of no provenance.
    mode: the implementation that made the image to be repeated; None leaves it to the engine. Part of no provenance.
    warnings: what building the request had to change, for the result.
    """

    tool: str
    prompt: str
    images: tuple[str, ...] = ()
    mask: str | None = None
    region: Region | None = None
    size: Size = field(default_factory=Native)
    count: int = 1
    seed: int = 0
    model: str = "auto"
    steps: int | None = None
    guidance: float | None = None
    preserve: Preserve = "auto"
    background: Background = "auto"
    partials: int = 0
    mode: Mode | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Leave out what is at its default.

        Write the seed as text, as JSON readers round numbers over 2^53.
        """
        default = ImageRequest(self.tool, "")
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {name: value for name, value in values.items() if value != getattr(default, name)}
        if "size" in changed:
            changed["size"] = _size_to_json(self.size)
        return {"tool": self.tool, **changed, "seed": str(self.seed)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ImageRequest":
        """Read a request, also one of an older klein-mcp.

        Raises TypeError, ValueError or KeyError.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        texts, count = (values["tool"], values["prompt"], values.get("model", "auto")), values.get("count", 1)
        if not all(isinstance(text, str) for text in texts) or type(count) is not int or not 0 < count <= MAX_COUNT:
            raise ValueError("it has a tool, a prompt, a model or a count that is none")
        values["size"] = _size_from_json(values)
        for name in ("width", "height", "aspect", "keep_size"):
            values.pop(name, None)
        return cls(**{**values, "seed": int(data["seed"])})


MAX_COUNT = 100
"""Images of one request in a file or a message; tools allow four, the OpenAI API ten."""


def _size_to_json(size: Size) -> dict[str, Any]:
    match size:
        case Exact(width, height):
            return {"exact": [width, height]}
        case Aspect(width, height):
            return {"aspect": [width, height]}
        case KeepSource():
            return {"keep_source": True}
        case Native():
            return {}


def _size_from_json(data: Mapping[str, Any]) -> Size:
    size: Mapping[str, Any] = data.get("size") or {}
    # Until 0.1 a request spelled its size out in four fields beside each other.
    if (size.get("keep_source") if size else data.get("keep_size")) is True:
        return KeepSource()
    exact: Any = size.get("exact") or (data.get("width"), data.get("height"))
    if None not in exact:
        return Exact(int(exact[0]), int(exact[1]))
    aspect: Any = size.get("aspect") or data.get("aspect")
    return Aspect(int(aspect[0]), int(aspect[1])) if aspect else Native()


def generate(
    prompt: str,
    *,
    width: int | None = None,
    height: int | None = None,
    aspect: str | None = None,
    count: int = 1,
    seed: int | None = None,
    model: str = "auto",
    steps: int | None = None,
    guidance: float | None = None,
    background: Background = "auto",
) -> ImageRequest:
    """Request new images from words.

    aspect: such as "16:9". seed: None for a random one. Raises RequestError.
    """
    size, warnings = _free_size(width, height, aspect)
    return ImageRequest(
        tool="generate_image",
        prompt=well_formed(prompt),
        size=size,
        count=count,
        seed=_seed(seed, count),
        model=model,
        steps=steps,
        guidance=guidance,
        background=background,
        warnings=warnings,
    )


def edit(
    image: str,
    prompt: str,
    *,
    mask: str | None = None,
    region: Sequence[int] | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    seed: int | None = None,
    model: str = "auto",
    steps: int | None = None,
    guidance: float | None = None,
    preserve: Preserve = "auto",
    background: Background = "auto",
) -> ImageRequest:
    """Request a changed image.

    It keeps the image's size unless another is given. Raises RequestError.
    """
    size, warnings = _free_size(width, height, None)
    if isinstance(size, Exact) and (region or mask):
        raise RequestError("region and mask keep the image's size.", hint="Leave out width and height.")
    return ImageRequest(
        tool="edit_image",
        prompt=well_formed(prompt),
        images=(image,),
        preserve=preserve,
        mask=mask,
        region=_region(region),
        size=size if isinstance(size, Exact) else KeepSource(),
        count=count,
        seed=_seed(seed, count),
        model=model,
        steps=steps,
        guidance=guidance,
        background=background,
        warnings=warnings,
    )


def compose(
    images: Sequence[str],
    prompt: str,
    *,
    width: int | None = None,
    height: int | None = None,
    aspect: str | None = None,
    count: int = 1,
    seed: int | None = None,
    model: str = "auto",
    steps: int | None = None,
    guidance: float | None = None,
    background: Background = "auto",
) -> ImageRequest:
    """Request a new image made of several. Raises RequestError."""
    size, warnings = _free_size(width, height, aspect)
    return ImageRequest(
        tool="compose_references",
        prompt=well_formed(prompt),
        images=tuple(images),
        size=size,
        count=count,
        seed=_seed(seed, count),
        model=model,
        steps=steps,
        guidance=guidance,
        background=background,
        warnings=(*_missing_references(prompt, len(images)), *warnings),
    )


def _free_size(width: int | None, height: int | None, aspect: str | None) -> tuple[Size, tuple[str, ...]]:
    """A size that the model can make, and warnings.

    Raises RequestError for half a size and for too large an area.
    """
    if (width is None) != (height is None):
        given, other = ("width", "height") if height is None else ("height", "width")
        raise RequestError(f"{given} came without {other}.", hint="Give both, or neither.")
    if width is None or height is None:
        if aspect is None:
            return Native(), ()
        across, along = aspect.split(":")
        return Aspect(int(across), int(along)), ()
    if width * height > MAX_AREA:
        raise RequestError(
            f"{width}×{height} = {width * height / 1e6:.1f} MP; at most {MAX_AREA / 1e6:.1f} MP.",
            hint="Make one side shorter.",
        )
    size = Exact(round(width / GRID) * GRID, round(height / GRID) * GRID)
    warnings = []
    if (size.width, size.height) != (width, height):
        rounded = f"{size.width}×{size.height}"
        warnings.append(f"{width}×{height} was rounded to {rounded}: sides are multiples of {GRID}")
    if aspect is not None:
        warnings.append("aspect_ratio was ignored: width and height say the shape")
    return size, tuple(warnings)


def _region(region: Sequence[int] | None) -> Region | None:
    if region is None:
        return None
    x, y, width, height = region
    return x, y, width, height


def _seed(asked: int | None, count: int) -> int:
    """Without one, a seed short enough to be read aloud. Raises RequestError."""
    if asked is None:
        return secrets.randbelow(2**32)
    if asked > (most := highest_seed(asked, count)):
        raise RequestError(
            f"seed {asked} leaves no room for {count} images; at most {most}.",
            hint="Choose a smaller seed, or none.",
        )
    return asked


def highest_seed(asked: int, count: int) -> int:
    """Return the largest first seed that leaves room for `count` images.

    The seeds of a request that came as a number stay numbers that every JSON reader keeps.
    """
    return (EXACT if asked <= EXACT else MAX_SEED) - count + 1


def _missing_references(prompt: str, given: int) -> list[str]:
    """A warning for each image that the prompt names and nobody gave."""
    named = {int(number) for number in re.findall(r"\bimage (\d{1,2})\b", prompt, re.IGNORECASE)}
    were = "1 reference was given" if given == 1 else f"{given} references were given"
    return [f"the prompt names image {number}; {were}" for number in sorted(named) if not 1 <= number <= given]
