"""What a tool call asks for, before anything of it is opened or painted."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from klein_mcp.errors import RequestError

MIN_SIDE, MAX_SIDE = 64, 2048
GRID = 16
"""Pixels: sizes are multiples of it, as one token of the model is 16 × 16."""
MAX_AREA = 2048 * 2048
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One to four pictures of one kind.

    images: references as the caller wrote them. keep_size: the first one's exact size and place of every pixel.
    seed: of the first picture; picture k is painted with seed + k.
    """

    tool: str
    prompt: str
    images: tuple[str, ...] = ()
    mask: str | None = None
    region: tuple[int, int, int, int] | None = None
    width: int | None = None
    height: int | None = None
    aspect: tuple[int, int] | None = None
    keep_size: bool = False
    count: int = 1
    seed: int = 0
    model: str = "auto"

    def to_json(self) -> dict[str, Any]:
        """Without what is at its default; the seed as text, because JSON readers round numbers over 2^53."""
        default = ImageRequest(self.tool, "")
        said = {name: value for name, value in asdict(self).items() if value != getattr(default, name)}
        return {"tool": self.tool, **said, "seed": str(self.seed)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ImageRequest":
        """Raises TypeError or ValueError for what no order was ever written as."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**{**values, "seed": int(data["seed"])})


def rounded(width: int | None, height: int | None, warnings: list[str]) -> tuple[int | None, int | None]:
    """A size the model can paint. Raises RequestError for half a size and for too large an area."""
    if (width is None) != (height is None):
        given, other = ("width", "height") if height is None else ("height", "width")
        raise RequestError(f"{given} came without {other}.", hint="Give both, or neither.")
    if width is None or height is None:
        return None, None
    if width * height > MAX_AREA:
        raise RequestError(f"{width}×{height} = {width * height / 1e6:.1f} MP; at most {MAX_AREA / 1e6:.1f} MP.")
    size = round(width / GRID) * GRID, round(height / GRID) * GRID
    if size != (width, height):
        warnings.append(f"{width}×{height} was rounded to {size[0]}×{size[1]}: sides are multiples of {GRID}")
    return size
